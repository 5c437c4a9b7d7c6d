"""Checks of training: a recipe's optimizer over given gradients, and free steps of the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.configs.base import Config
from cifar_jax.optimizer import create_tx
from cifar_jax.parallel import replicate
from cifar_jax.trainer import Trainer
from cifar_jax.weights.params import Params
from parity.check import WHY_FLOAT64, Check, difference
from parity.ours import as_dtype, dividing_devices, initial_params, scaled
from parity.reference import FedOptimizer, Reference


def jax_optimizer(config: Config, params: Params, gradients: Sequence[Params]) -> Params:
    """Applies the recipe's optimizer to these gradients in turn. Returns: the params."""
    tx = create_tx(config, steps_per_epoch=782)

    def step(carry: tuple[Any, Any], gradient: Any) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    carry = jax.tree.map(jnp.asarray, params), tx.init(params)
    (params, _), _ = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))(
        carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    )
    return params


def check_optimizer(config: Config, fed: FedOptimizer) -> list[Check]:
    """Compares the optimizers over the same 100 gradients of a tensor of 1,000 values. `fed`: the other framework's."""
    checks = []
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=1000) * 0.05}
    gradients = [{"kernel": rng.normal(size=1000) * 0.1} for _ in range(100)]
    why = "float32 rounding of 100 steps: floor 4e-9, Keras 2e-7; with the rate outside the velocity 1e-4"
    rows = (("float32", 5e-7, why), ("float64", 1e-14, WHY_FLOAT64))
    for dtype, tolerance, why in rows:
        with jax.enable_x64(dtype == "float64"):
            ours = jax_optimizer(config, as_dtype(start, dtype), as_dtype(gradients, dtype))
            theirs = fed(config, as_dtype(start, dtype), as_dtype(gradients, dtype))
        name = f"optimizer of {config.model}_reference, 100 fed gradients, {dtype}"
        checks.append(Check(name, difference(ours, theirs), tolerance, why))
    return checks


def without_randomness(config: Config) -> Config:
    """Returns the recipe without dropout and augmentation."""
    return dataclasses.replace(
        config, dropout_rates=(0.0,) * len(config.dropout_rates), rotation_degrees=0.0, shift_fraction=0.0,
        crop_padding=0, random_flip=False, alternating_flip=False, cutout_size=0,
    )  # fmt: skip


def jax_trajectories(
    config: Config, starts: Sequence[Params], images: np.ndarray, labels: np.ndarray, batch_size: int
) -> list[Params]:
    """Trains from each start on every batch in turn, without dropout and augmentation. Returns: the final weights.

    Args: starts: initial params; images: uint8 [N, 32, 32, 3]; labels: int32 [N].
    """
    config = dataclasses.replace(without_randomness(config), batch_size=batch_size, steps_per_call=1)
    devices, ends = dividing_devices(batch_size), []
    trainer = Trainer(config, images, labels, devices)
    fresh, order = trainer.state, replicate(np.arange(len(labels), dtype=np.int32), devices)
    for params in starts:
        state = fresh.replace(params=params, opt_state=fresh.tx.init(params))
        trainer.state = replicate(jax.tree.map(jnp.copy, state), devices)  # a step donates its state's buffers
        for step in range(trainer.steps_per_epoch):
            trainer.run_steps(order, step, 1)
        ends.append(jax.device_get(trainer.state.params))
    return ends


def check_trajectory(
    reference: type[Reference], config: Config, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> list[Check]:
    """Compares free steps of the recipe on the same batches. A control starts from weights that are one ulp larger."""
    params = initial_params(config.model)
    moved = jax.tree.map(lambda leaf: np.nextafter(leaf, np.float32(np.inf), dtype=np.float32), params)
    ours, control = jax_trajectories(config, (params, moved), images, labels, batch_size)
    floor = difference(ours, control)
    parts = [slice(i, i + batch_size) for i in range(0, len(labels), batch_size)]
    their_batches = [(scaled(images[part], config.model), labels[part]) for part in parts]
    error = difference(ours, reference(config.model, params).train(config, their_batches))
    why = f"10 times the distance, {floor:.1e}, of a control whose initial weights are one ulp larger; at least 1e-7"
    name = f"{config.model}_reference: {len(parts)} free steps of {batch_size}"
    return [Check(name, error, max(10 * floor, 1e-7), why)]
