"""Trainer and Evaluator: keep a dataset on the devices, compile steps and run one pass over the images."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.batches import epoch_order
from cifar_jax.configs.base import Config
from cifar_jax.errors import UserError
from cifar_jax.multi_step import (
    create_eval_steps,
    create_statistics_steps,
    create_train_steps,
    round_eval_batch_size,
)
from cifar_jax.normalization import fold, merge
from cifar_jax.parallel import choose_steps_per_call, has_constant_bounds, replicate
from cifar_jax.train_step import Metrics, TrainState, create_train_state

FOLD_IMAGES, FOLD_BATCH = 2500, 250  # training images for `fold`'s statistics, in all and on a device at a time
# Calls queued on the devices. JAX would queue 32, which delays the response to a signal. Then it waits in threads that
# the cores of a CPU need, so two of them can wait for each other for ever.
MAX_PENDING_CALLS = 2


def create_history(num_steps: int) -> Metrics:
    """Allocates device arrays for the metrics of `num_steps` steps, which are fetched once and not step by step.

    Returns: {'loss': float32 [num_steps], 'correct': int32 [num_steps], 'count': int32 [num_steps]}, all zero.
    """
    zeros = lambda dtype: jnp.zeros((num_steps,), dtype)
    return {"loss": zeros(jnp.float32), "correct": zeros(jnp.int32), "count": zeros(jnp.int32)}


class Trainer:
    """Trains one recipe on images that stay on the devices.

    Attributes:
      state: the TrainState on every device. Each call of steps replaces it and reuses its buffers.
      history: the metrics of the current epoch's steps, see `create_history`.
      steps_per_epoch: steps of one pass over the images.
      steps_per_call: largest number of steps that one compiled call runs.
    """

    def __init__(
        self,
        config: Config,
        images: np.ndarray,
        labels: np.ndarray,
        devices: Sequence[jax.Device],
        steps_per_epoch: int | None = None,
    ) -> None:
        """Args: images: uint8 [N, 32, 32, 3]; labels: int32 [N]; steps_per_epoch: None: the steps of one pass."""
        self.config, self.devices = config, devices
        self.steps_per_epoch = steps_per_epoch or -(-len(labels) // config.batch_size)
        self.steps_per_call = choose_steps_per_call(config, devices, self.steps_per_epoch)
        self.state: TrainState = replicate(create_train_state(config, self.steps_per_epoch, images[:256]), devices)
        self.history: Metrics = {}
        self.clear_history()
        self._data = replicate((images, labels), devices)
        self._teacher_logits: tuple[jax.Array, ...] = ()
        self._num_images = len(labels)
        self._compiled: dict[tuple[int, bool], Callable[..., Any]] = {}
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._finished_loss: jax.Array | None = None
        self._statistics: Callable[..., Any] | None = None

    def teach(self, logits: np.ndarray) -> None:
        """Takes the logits of the recipe's teacher, float16 [N, views, C] (see `teacher.compute_teacher_logits`)."""
        self._teacher_logits = (replicate(logits, self.devices),)

    def clear_history(self) -> None:
        """Resets the metrics at the start of an epoch."""
        self.history = replicate(create_history(self.steps_per_epoch), self.devices)

    def order(self, epoch: int) -> jax.Array:
        """Returns the order of the images in an epoch, int32 [N], on every device."""
        return replicate(epoch_order(self.config.seed, epoch, self._num_images), self.devices)

    def compile(self, image_size: int, order: jax.Array) -> None:
        """Compiles the calls of an epoch with images of this size. Without this, `run_steps` compiles them."""
        for count in {self.steps_per_call, self.steps_per_epoch % self.steps_per_call} - {0}:
            self.program(image_size, order, count)

    def program(self, image_size: int, order: jax.Array, count: int) -> Callable[..., Any]:
        """Returns the compiled call of `count` steps for images of this size.

        One program serves calls of any length, except where loops have constant bounds: there it serves those that are
        shorter than steps_per_call, and full calls have their own.
        """
        constant = has_constant_bounds(self.devices) and count == self.steps_per_call
        if self.config.teacher is not None and not self._teacher_logits:
            raise UserError("only cifar_jax.train can train a recipe with a teacher")
        if (image_size, constant) not in self._compiled:
            lengths = self.steps_per_epoch, self.steps_per_call
            steps = create_train_steps(self.config, self.devices, image_size, *lengths, constant)
            self._compiled[image_size, constant] = steps.compile(
                self.state, self.history, *self._data, *self._teacher_logits, order, np.int32(0), np.int32(0)
            )
        return self._compiled[image_size, constant]

    def run_steps(self, order: jax.Array, start: int, count: int, image_size: int = 32) -> jax.Array:
        """Starts steps start … start + count - 1 of an order in one call and waits for an earlier call, if at all.

        Args: order: int32 [N]; count: at most steps_per_call. Returns: the last step's loss, a float32 scalar.
        """
        run = self.program(image_size, order, count)
        self.state, self.history, loss = run(
            self.state, self.history, *self._data, *self._teacher_logits, order, np.int32(start), np.int32(count)
        )
        self._pending.append(loss)
        if len(self._pending) > MAX_PENDING_CALLS:
            self._finished_loss = self._pending.popleft().block_until_ready()
        return loss

    def run_epoch(
        self,
        epoch: int,
        start: int,
        stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, jax.Array | None], None] = lambda count, loss: None,
    ) -> int:
        """Runs an epoch from step `start` to its end or until `stop` returns True. Returns: the number of steps done.

        Args: on_progress: called after each call with its number of steps and the loss of an earlier call, or None.
        """
        order, image_size = self.order(epoch), self.config.image_size(epoch)
        self._pending.clear()
        self._finished_loss, step = None, start
        while step < self.steps_per_epoch and not stop():
            count = min(self.steps_per_call, self.steps_per_epoch - step)
            self.run_steps(order, step, count, image_size)
            step += count
            on_progress(count, self._finished_loss)
        jax.block_until_ready(self.state)
        return step

    def epoch_metrics(self) -> dict[str, Any]:
        """Returns {'loss', 'accuracy': means over the epoch's training images; 'batch_loss': float32 [steps]}."""
        loss, correct, count = (np.asarray(self.history[name]) for name in ("loss", "correct", "count"))
        total = max(count.sum(), 1)  # 0 before the first step
        mean = float((loss.astype(np.float64) * count).sum() / total)
        return {"loss": mean, "accuracy": float(correct.sum() / total), "batch_loss": loss}

    def fold(self) -> None:
        """With normalisation, computes state.folded_params from the averaged parameters and FOLD_IMAGES images."""
        if self.config.normalization == "none":
            return
        params, devices = self.state.averaged_params, len(self.devices)
        count = max(1, min(FOLD_IMAGES, self._num_images) // devices)  # of each device
        batches = -(-count // FOLD_BATCH)
        size = count // batches
        if self._statistics is None:
            step = create_statistics_steps(self.config, self.devices, size)
            self._statistics = step.compile(params, *self._data, np.int32(0))
        starts = [np.int32(number * size * devices) for number in range(batches)]
        statistics = [self._statistics(params, *self._data, start) for start in starts]
        self.state = self.state.replace(folded_params=jax.jit(fold)(params, jax.jit(merge)(statistics)))


class Evaluator:
    """Evaluates states on images that stay on the devices. Every image counts exactly once. Compiles once."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        images: np.ndarray,
        labels: np.ndarray,
        devices: Sequence[jax.Device],
        dropout: bool = False,
        flip_tta: bool = False,
    ) -> None:
        """Args: images: uint8 [N, 32, 32, 3]; labels: int32 [N]; dropout, flip_tta: see create_eval_step."""
        self._data = replicate((images, labels), devices)
        self._devices, self._size = devices, len(labels)
        self.num_steps = -(-self._size // round_eval_batch_size(config, devices, self._size))
        self.steps_per_call = choose_steps_per_call(config, devices, self.num_steps)
        self._create = lambda constant: create_eval_steps(
            config, devices, self._size, self.steps_per_call, dropout, flip_tta, constant
        )
        self._compiled: dict[bool, Callable[..., Any]] = {}
        self.compile(state, self.steps_per_call)

    def create_history(self) -> Metrics:
        """Allocates the metrics of one pass on every device."""
        return replicate(create_history(self.num_steps), self._devices)

    def compile(self, state: TrainState, count: int) -> Callable[..., Any]:
        """Returns the compiled call of `count` steps, see `Trainer.compile`."""
        constant = has_constant_bounds(self._devices) and count == self.steps_per_call
        if constant not in self._compiled:
            arguments = self.create_history(), state, *self._data, np.int32(0), np.int32(0)
            self._compiled[constant] = self._create(constant).compile(*arguments)
        return self._compiled[constant]

    def run_steps(self, history: Metrics, state: TrainState, start: int, count: int) -> Metrics:
        """Evaluates batches start … start + count - 1 in one call. Returns: the history, in the argument's buffers."""
        return self.compile(state, count)(history, state, *self._data, np.int32(start), np.int32(count))

    def __call__(self, state: TrainState, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Returns {'loss': mean over the examples, nats, 'accuracy': from 0 to 1}; None if `stop` ended the pass."""
        history = self.create_history()
        for start in range(0, self.num_steps, self.steps_per_call):
            history = self.run_steps(history, state, start, min(self.steps_per_call, self.num_steps - start))
            jax.block_until_ready(history)
            if stop():
                return None
        sums = {name: np.asarray(values).astype(np.float64).sum() for name, values in history.items()}
        assert sums["count"] == self._size, "every example is counted exactly once"
        return {"loss": sums["loss"] / self._size, "accuracy": sums["correct"] / self._size}
