"""A recipe's optimizer: learning-rate schedule, parameter averaging, SGD, Keras' SGD, Muon, SAM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cifar_jax.configs.base import Config
from cifar_jax.models import get_model
from cifar_jax.parallel import AXIS
from cifar_jax.symmetry import symmetric_gradients


def swa_steps(config: Config, steps_per_epoch: int) -> tuple[int, int]:
    """Returns (first step, steps per cycle) of stochastic weight averaging; 0 steps per cycle: there are no cycles."""
    total_steps = config.num_epochs * steps_per_epoch
    cycle_steps = int(config.swa_fraction * total_steps / config.swa_cycles)
    return total_steps - config.swa_cycles * cycle_steps, cycle_steps


def create_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning-rate schedule: step, int32 scalar from 0 → rate, float32 scalar."""
    start, cycle_steps = swa_steps(config, steps_per_epoch)
    rate, warmup = config.learning_rate, min(round(config.warmup_fraction * start), start - 1)
    corners = jnp.array([0, max(warmup, 1), start], jnp.float32)
    rates = jnp.array([0 if warmup else rate, rate, 0], jnp.float32)
    schedule = {
        "constant": optax.constant_schedule(rate),
        "inverse_time": lambda step: rate / (1.0 + config.lr_decay * step),  # Keras 2's SGD(decay=…), optimizers.py
        "cosine": optax.warmup_cosine_decay_schedule(0.0, rate, warmup, start),
        "one_cycle": lambda step: jnp.interp(step, corners, rates),
    }[config.schedule]
    if cycle_steps:
        cycle = optax.linear_schedule(config.swa_learning_rate, 0.0, cycle_steps)
        starts = [start + number * cycle_steps for number in range(config.swa_cycles)]
        schedule = optax.join_schedules([schedule, *[cycle] * config.swa_cycles], starts)
    return lambda step: schedule(jnp.asarray(step, jnp.float32))  # optax would mix the step's type with float32


def create_averaging_share(config: Config, steps_per_epoch: int) -> Callable[[jax.Array | int], jax.Array]:
    """Returns share(steps taken, int32) → weight of the current parameters in their average, float32.

    Before the cycles of stochastic weight averaging the average is an exponential moving average. Then it becomes the
    mean of that average and of the parameters at the end of each cycle.
    """
    start, cycle_steps = swa_steps(config, steps_per_epoch)

    def share(step: jax.Array | int) -> jax.Array:
        taken = jnp.asarray(step, jnp.float32)
        moving = 1 - jnp.minimum(config.ema_decay, taken / (taken + 10))  # forgets the initial parameters quickly
        if cycle_steps == 0:
            return moving
        ended = jnp.where((step - start) % cycle_steps == 0, 1 / (1 + (taken - start) / cycle_steps), 0.0)
        return jnp.where(step <= start, moving, ended)

    return share


def create_tx(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """Returns the recipe's optimizer. With sam_rho its update needs grad_fn(params, _) and the mapped axis AXIS.

    Keras keeps the rate inside the velocity, v ← μv − lr_t·g. PyTorch and optax.sgd keep it outside, p ← p − lr_t·v.
    The two optimizers differ when the rate changes.
    """
    schedule = create_schedule(config, steps_per_epoch)
    frozen = [_freeze(config)] if config.whitening or config.normalization_scale == "fixed" else []
    layers = get_model(config.model).LAYERS
    symmetric = [symmetric_gradients(layers)] if config.mirror_symmetry else []
    clip = [optax.clip_by_global_norm(config.gradient_clip)] if config.gradient_clip else []
    first = [*frozen, *symmetric, *clip]  # frozen parameters count neither in the clipped norm nor in Muon's steps
    if config.optimizer == "muon":
        tx = optax.chain(*first, _create_muon(config, schedule, last_layer=layers[-1]))
    else:
        trace = optax.trace(config.momentum, config.nesterov)
        rate = optax.scale_by_learning_rate(schedule)
        parts = [rate, trace] if config.optimizer == "keras_sgd" else [trace, rate]
        decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
        tx = optax.chain(*first, *decay, *parts)
    if config.normalize_kernels:
        tx = optax.chain(tx, _normalize_kernels(config, layers[:-1]))
    if frozen:  # again: weight decay has moved them
        tx = optax.chain(tx, *frozen)
    if config.sam_rho:
        climb = optax.chain(*frozen, *symmetric, optax.contrib.normalize(), optax.sgd(config.sam_rho))
        tx = optax.contrib.sam(tx, climb, opaque_mode=True, batch_axis_name=AXIS)
    return optax.with_extra_args_support(tx)


def _create_muon(config: Config, schedule: optax.Schedule, last_layer: str) -> optax.GradientTransformation:
    """Returns Muon for all kernels except the last layer's, as matrices [inputs, outputs], and Adam for the rest."""

    def dimension_numbers(params: Any) -> Any:
        matrix = lambda x: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,))
        adams = lambda path, x: x.ndim == 1 or path[0].key == last_layer
        return jax.tree_util.tree_map_with_path(lambda path, x: None if adams(path, x) else matrix(x), params)

    factor = (config.adam_learning_rate or config.learning_rate) / config.learning_rate
    return optax.contrib.muon(
        schedule,
        adam_learning_rate=None if factor == 1 else lambda step: factor * schedule(step),
        beta=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimension_numbers,
        consistent_rms=None if config.normalize_kernels else 0.2,
    )


def _normalize_kernels(config: Config, layers: Sequence[str]) -> optax.GradientTransformation:
    """Changes updates so that the updated kernels of these layers have norm √outputs, without whitening filters."""

    def update(updates: Any, params: Any) -> Any:
        def rescale(name: str) -> jax.Array:
            first = _count_whitening_filters(config, name, params[name]["kernel"])
            kernel, update = params[name]["kernel"][..., first:], updates[name]["kernel"]
            moved = kernel + update[..., first:]
            scaled = moved * (kernel.shape[-1] ** 0.5 / jnp.linalg.norm(moved.ravel())) - kernel
            return update.at[..., first:].set(scaled) if first else scaled

        return {**updates, **{name: {**updates[name], "kernel": rescale(name)} for name in layers}}

    return optax.stateless(update)


def _count_whitening_filters(config: Config, layer: str, kernel: jax.Array) -> int:
    """Returns how many of a kernel's filters, the first ones, whiten and are not trained."""
    if not config.whitening or layer != get_model(config.model).LAYERS[0]:
        return 0
    return min(2 * math.prod(kernel.shape[:-1]), kernel.shape[-1])


def _freeze(config: Config) -> optax.GradientTransformation:
    """Sets the updates of fixed scales and whitening filters to 0."""

    def freeze(path: Any, update: jax.Array) -> jax.Array:
        layer, part = path[0].key, path[1].key
        if part == "scale" and config.normalization_scale == "fixed":
            return jnp.zeros_like(update)
        if part == "kernel" and (count := _count_whitening_filters(config, layer, update)):
            return update.at[..., :count].set(0)
        return update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(freeze, updates))
