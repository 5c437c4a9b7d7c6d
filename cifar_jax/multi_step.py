"""The programs that devices run: several steps a call on a dataset that stays on every device.

They are functions of the recipe and the devices alone. trainer.py compiles them for its arrays. They can also be
lowered for shapes and for devices that this machine lacks (see `parallel.Parallel.lower`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cifar_jax.batches import take_batch
from cifar_jax.configs.base import Config
from cifar_jax.host import compiler_options
from cifar_jax.optimizer import create_averaging_share
from cifar_jax.parallel import Parallel, repeat
from cifar_jax.train_step import (
    Metrics,
    TrainState,
    create_eval_step,
    create_statistics_step,
    create_train_step,
)


def _record(history: Metrics, index: jax.Array, metrics: Metrics) -> Metrics:
    return {name: values.at[index].set(metrics[name]) for name, values in history.items()}


def create_train_steps(
    config: Config,
    devices: Sequence[jax.Device],
    image_size: int,
    steps_per_epoch: int,
    steps_per_call: int,
    constant: bool = False,
) -> Parallel:
    """Returns several training steps on images resized to image_size, which donate state and history:

    (state, history, images, labels, order, start, count) → (state, history, loss of the last step).

    With a teacher, its logits, float16 [N, views, C], come after the labels.
    Args: constant: each call runs steps_per_call steps, whatever its count, in a loop with constant bounds.
    """
    train_step = create_train_step(config, image_size)
    per_device_batch_size = config.batch_size // len(devices)
    share = create_averaging_share(config, steps_per_epoch)
    wrap = config.normalization == "batch"

    def train_steps(state, history, images, labels, *rest):  # type: ignore[no-untyped-def]
        *teacher, order, start, count, device = rest

        def one(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, history = carry
            first = i * config.batch_size + device * per_device_batch_size
            batch = take_batch(images, labels, order, first, per_device_batch_size, wrap=wrap)
            epoch = jnp.asarray(state.step // steps_per_epoch)
            batch |= {"epoch": epoch, "averaging_share": share(state.step + 1)}
            if teacher:
                batch["teacher_logits"] = teacher[0]
            state, metrics = train_step(state, batch)
            return state, _record(history, i, metrics)

        count = steps_per_call if constant else count
        state, history = repeat(one, start, count, (state, history), steps_per_call)
        return state, history, history["loss"][start + count - 1]

    options = compiler_options(config, config.batch_size, devices, steps_per_call)
    return Parallel(train_steps, devices, (0, 1), options)


def round_eval_batch_size(config: Config, devices: Sequence[jax.Device], num_images: int) -> int:
    """Returns the images of an evaluation step: at most all, rounded up to a multiple of the number of devices."""
    return -(-min(config.eval_batch_size, num_images) // len(devices)) * len(devices)


def create_eval_steps(
    config: Config,
    devices: Sequence[jax.Device],
    num_images: int,
    steps_per_call: int,
    dropout: bool = False,
    flip_tta: bool = False,
    constant: bool = False,
) -> Parallel:
    """Returns several evaluation steps: (history, state, images, labels, start, count) → history, which is donated.

    Args: dropout, flip_tta: see create_eval_step; constant: see create_train_steps.
    """
    eval_step = create_eval_step(config, dropout, flip_tta)
    per_device_batch_size = round_eval_batch_size(config, devices, num_images) // len(devices)

    def eval_steps(history, state, images, labels, start, count, device):  # type: ignore[no-untyped-def]
        order = jnp.arange(labels.shape[0], dtype=jnp.int32)

        def one(i: jax.Array, history: Metrics) -> Metrics:
            first = (i * len(devices) + device) * per_device_batch_size
            batch = take_batch(images, labels, order, first, per_device_batch_size) | {"start": first}
            return _record(history, i, eval_step(state, batch))

        return repeat(one, start, steps_per_call if constant else count, history, steps_per_call)

    options = compiler_options(config, config.eval_batch_size, devices, steps_per_call)
    return Parallel(eval_steps, devices, (0,), options)


def create_statistics_steps(config: Config, devices: Sequence[jax.Device], size: int) -> Parallel:
    """Returns (params, images, labels, start) → statistics, which each device computes from `size` images."""
    statistics_step = create_statistics_step(config)

    def step(params, images, labels, start, device):  # type: ignore[no-untyped-def]
        order = jnp.arange(labels.shape[0], dtype=jnp.int32)
        return statistics_step(params, take_batch(images, labels, order, start + device * size, size))

    return Parallel(step, devices, (), compiler_options(config, size * len(devices), devices))
