"""Trainer and Evaluator: keep a dataset on the devices, compile steps and run one pass over the images."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.batches import epoch_order, take_batch
from cifar_jax.configs.base import Config
from cifar_jax.host import compiler_options
from cifar_jax.normalization import fold, merge
from cifar_jax.optimizer import create_averaging_share
from cifar_jax.parallel import default_steps_per_call, parallelize, repeat, replicate
from cifar_jax.train_step import (
    Metrics,
    TrainState,
    create_eval_step,
    create_statistics_step,
    create_train_state,
    create_train_step,
)

FOLD_IMAGES = 2500  # training images for the statistics that `fold` uses
MAX_PENDING_CALLS = 2  # calls queued on the device; JAX would queue 32, which delays the response to a signal


def create_history(num_steps: int) -> Metrics:
    """Allocates device arrays for the metrics of `num_steps` steps, which are fetched once and not step by step.

    Returns: {'loss': float32 [num_steps], 'correct': int32 [num_steps], 'count': int32 [num_steps]}, all zero.
    """
    zeros = lambda dtype: jnp.zeros((num_steps,), dtype)
    return {"loss": zeros(jnp.float32), "correct": zeros(jnp.int32), "count": zeros(jnp.int32)}


def _record(history: Metrics, index: jax.Array, metrics: Metrics) -> Metrics:
    return {name: values.at[index].set(metrics[name]) for name, values in history.items()}


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
        per_call = config.steps_per_call or default_steps_per_call(config.model, devices)
        self.steps_per_call = min(per_call, self.steps_per_epoch)
        self.state: TrainState = replicate(create_train_state(config, self.steps_per_epoch, images[:256]), devices)
        self.history: Metrics = {}
        self.clear_history()
        self._data = replicate((images, labels), devices)
        self._num_images = len(labels)
        self._compiled: dict[int, Callable[..., Any]] = {}
        self._statistics: Callable[..., Any] | None = None

    def clear_history(self) -> None:
        """Resets the metrics at the start of an epoch."""
        self.history = replicate(create_history(self.steps_per_epoch), self.devices)

    def order(self, epoch: int) -> jax.Array:
        """Returns the order of the images in an epoch, int32 [N], on every device."""
        return replicate(epoch_order(self.config.seed, epoch, self._num_images), self.devices)

    def compile(self, image_size: int, order: jax.Array) -> Callable[..., Any]:
        """Returns the compiled call of several steps for images of this size. Each size compiles once."""
        if image_size not in self._compiled:
            compile_for = self._create_train_steps(image_size)
            self._compiled[image_size] = compile_for(
                self.state, self.history, *self._data, order, np.int32(0), np.int32(0)
            )
        return self._compiled[image_size]

    def run_steps(self, order: jax.Array, start: int, count: int, image_size: int = 32) -> jax.Array:
        """Starts steps start … start + count - 1 of an order in one call and does not wait for them.

        Args: order: int32 [N]; count: at most steps_per_call. Returns: the last step's loss, a float32 scalar.
        """
        run = self.compile(image_size, order)
        self.state, self.history, loss = run(
            self.state, self.history, *self._data, order, np.int32(start), np.int32(count)
        )
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
        pending: collections.deque[jax.Array] = collections.deque()
        step = start
        while step < self.steps_per_epoch and not stop():
            count = min(self.steps_per_call, self.steps_per_epoch - step)
            pending.append(self.run_steps(order, step, count, image_size))
            step += count
            done = pending.popleft().block_until_ready() if len(pending) > MAX_PENDING_CALLS else None
            on_progress(count, done)
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
        params, statistics = self.state.averaged_params, []
        count = min(FOLD_IMAGES, self._num_images) // len(self.devices)
        size = min(self.config.eval_batch_size // len(self.devices), count)
        if self._statistics is None:
            step = self._create_statistics_step(size)
            self._statistics = step(params, *self._data, np.int32(0))
        for start in range(0, count - size + 1, size):
            statistics.append(self._statistics(params, *self._data, np.int32(start * len(self.devices))))
        self.state = self.state.replace(folded_params=jax.jit(fold)(params, jax.jit(merge)(statistics)))

    def _create_statistics_step(self, size: int) -> Any:
        """Returns the compiler (see `parallelize`) of (params, images, labels, start) → statistics.

        Each device computes them from `size` images.
        """
        statistics_step = create_statistics_step(self.config)

        def step(params, images, labels, start, device):  # type: ignore[no-untyped-def]
            order = jnp.arange(labels.shape[0], dtype=jnp.int32)
            return statistics_step(params, take_batch(images, labels, order, start + device * size, size))

        options = compiler_options(self.config, size * len(self.devices), self.devices)
        return parallelize(step, self.devices, (), options)

    def _create_train_steps(self, image_size: int) -> Any:
        """Returns the compiler (see `parallelize`) of several steps, which donate state and history:

        (state, history, images, labels, order, start, count) → (state, history, loss of the last step).
        """
        config, train_step = self.config, create_train_step(self.config, image_size)
        per_device_batch_size = config.batch_size // len(self.devices)
        share = create_averaging_share(config, self.steps_per_epoch)
        wrap = config.normalization == "batch"

        def train_steps(state, history, images, labels, order, start, count, device):  # type: ignore[no-untyped-def]
            def one(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
                state, history = carry
                first = i * config.batch_size + device * per_device_batch_size
                batch = take_batch(images, labels, order, first, per_device_batch_size, wrap=wrap)
                epoch = jnp.asarray(state.step // self.steps_per_epoch)
                batch |= {"epoch": epoch, "averaging_share": share(state.step + 1)}
                state, metrics = train_step(state, batch)
                return state, _record(history, i, metrics)

            state, history = repeat(one, start, count, (state, history), self.steps_per_call)
            return state, history, history["loss"][start + count - 1]

        options = compiler_options(config, config.batch_size, self.devices, self.steps_per_call)
        return parallelize(train_steps, self.devices, (0, 1), options)


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
        # At most all examples, rounded up to a multiple of the number of devices.
        batch_size = -(-min(config.eval_batch_size, self._size) // len(devices)) * len(devices)
        self.num_steps = -(-self._size // batch_size)
        self.steps_per_call = config.steps_per_call or default_steps_per_call(config.model, devices)
        eval_step = create_eval_step(config, dropout, flip_tta)
        per_device_batch_size = batch_size // len(devices)

        def eval_steps(history, state, images, labels, start, count, device):  # type: ignore[no-untyped-def]
            order = jnp.arange(labels.shape[0], dtype=jnp.int32)

            def one(i: jax.Array, history: Metrics) -> Metrics:
                first = (i * len(devices) + device) * per_device_batch_size
                batch = take_batch(images, labels, order, first, per_device_batch_size) | {"start": first}
                return _record(history, i, eval_step(state, batch))

            return repeat(one, start, count, history, self.steps_per_call)

        options = compiler_options(config, config.eval_batch_size, devices, self.steps_per_call)
        compile_for = parallelize(eval_steps, devices, (0,), options)
        self._eval_steps = compile_for(self.create_history(), state, *self._data, np.int32(0), np.int32(0))

    def create_history(self) -> Metrics:
        """Allocates the metrics of one pass on every device."""
        return replicate(create_history(self.num_steps), self._devices)

    def run_steps(self, history: Metrics, state: TrainState, start: int, count: int) -> Metrics:
        """Evaluates batches start … start + count - 1 in one call. Returns: the history, in the argument's buffers."""
        return self._eval_steps(history, state, *self._data, np.int32(start), np.int32(count))

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
