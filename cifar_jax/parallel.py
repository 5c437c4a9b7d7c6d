"""Devices, and the only place that calls pmap.

A step is a pure function of (state, batch) on one device. `parallelize` runs it on all local devices: the state and
the dataset are replicated, each device takes its slice of every global batch, and gradients are averaged with pmean.
pmap is in maintenance mode (JAX runs it as jit + shard_map); leaving it means changing this file alone. Beware: under
shard_map gradients of replicated parameters arrive already summed, and here a forgotten pmean is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.configs.base import Config
from cifar_jax.errors import UserError
from cifar_jax.models import get_model

AXIS = "devices"
MIN_BATCH_OF_A_CORE = 16  # with fewer, the hand-over between cores costs more than the second core gains
ACCELERATOR_STEPS_PER_CALL = 1000  # enough to hide the dispatch


def dividing_count(batch_size: int, at_most: int) -> int:
    """The largest number of devices, up to `at_most`, that a batch divides over."""
    return max(n for n in range(1, at_most + 1) if batch_size % n == 0)


def select_devices(config: Config) -> list[jax.Device]:
    """The local devices of a run: config.num_devices, else all; CPU cores only where each gets MIN_BATCH_OF_A_CORE.

    Raises: UserError if there are too few, if the batch does not divide, or if there are several processes.
    """
    if jax.process_count() > 1:
        raise UserError(f"training with {jax.process_count()} processes is not supported: start one process")
    devices = jax.local_devices()
    count = config.num_devices or len(devices)
    if config.num_devices is None and devices[0].platform == "cpu":
        most = max(1, config.batch_size // MIN_BATCH_OF_A_CORE)
        count = dividing_count(config.batch_size, min(count, most))
    if count > len(devices):
        raise UserError(f"--num-devices {count}: this machine has {len(devices)}")
    if config.batch_size % count:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide over {count} devices: "
            f"use a multiple of {count}, or --num-devices {dividing_count(config.batch_size, count - 1)}"
        )
    return devices[:count]


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """A copy of every array on every device."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def default_steps_per_call(model: str, devices: Sequence[jax.Device]) -> int:
    """How many steps one compiled call runs unless the recipe says so."""
    return get_model(model).CPU_STEPS_PER_CALL if devices[0].platform == "cpu" else ACCELERATOR_STEPS_PER_CALL


def parallelize(
    function: Callable[..., Any], devices: Sequence[jax.Device], donate: tuple[int, ...], options: dict[str, Any]
) -> Any:
    """pmaps `function(*args, device_index)`. Arguments and results are replicated; `options` are the compiler's.

    Returns a compiler: called with example arguments it gives the compiled function, which can't compile again.
    """
    index = jnp.arange(len(devices), dtype=jnp.int32)

    def compile_for(*args: Any) -> Callable[..., Any]:
        in_axes = (None,) * len(args) + (0,)
        parallel = jax.pmap(
            function, AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donate, devices=list(devices)
        )
        compiled = parallel.lower(*args, index).compile(options)
        return lambda *args: compiled(*args, index)

    return compile_for


def repeat(step: Callable[[Any, Any], Any], start: jax.Array, count: jax.Array, carry: Any, at_most: int) -> Any:
    """`step(i, carry)` for i in start … start+count; without a loop if `at_most` one step is run."""
    return step(start, carry) if at_most == 1 else lax.fori_loop(start, start + count, step, carry)
