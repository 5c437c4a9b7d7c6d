"""Selects devices and runs steps on them. This is the only module that calls pmap.

A step is a pure function of (state, batch) on one device. `parallelize` runs it on all local devices: the state and
the dataset are replicated, each device takes its slice of every global batch, and pmean averages the gradients.
pmap is in maintenance mode (JAX runs it as jit + shard_map), and replacing it changes only this file. Two caveats:
shard_map returns gradients of replicated parameters already summed, and pmap does not report a forgotten pmean.
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
MIN_BATCH_OF_A_CORE = 16  # with fewer images, communication between cores costs more than the second core gains
ACCELERATOR_STEPS_PER_CALL = 1000  # enough to hide the dispatch time


def dividing_count(batch_size: int, at_most: int) -> int:
    """Returns the largest number of devices, up to `at_most`, that divides the batch evenly."""
    return max(n for n in range(1, at_most + 1) if batch_size % n == 0)


def select_devices(config: Config) -> list[jax.Device]:
    """Returns a run's local devices: config.num_devices of them, else all; on a CPU no more than the batch can feed.

    Each CPU core gets at least MIN_BATCH_OF_A_CORE images.
    Raises: UserError if there are too few devices, the batch does not divide, or there are several processes.
    """
    if jax.process_count() > 1:
        raise UserError(f"training with {jax.process_count()} processes is not supported: start a single process")
    devices = jax.local_devices()
    count = config.num_devices or len(devices)
    if config.num_devices is None and devices[0].platform == "cpu":
        most = max(1, config.batch_size // MIN_BATCH_OF_A_CORE)
        count = dividing_count(config.batch_size, min(count, most))
    if count > len(devices):
        raise UserError(f"--num-devices {count}: this machine has only {len(devices)}")
    if config.batch_size % count:
        raise UserError(
            f"--batch-size {config.batch_size} can't be divided evenly over {count} devices: "
            f"use a multiple of {count}, or --num-devices {dividing_count(config.batch_size, count - 1)}"
        )
    return devices[:count]


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Copies every array of the tree to every device."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def default_steps_per_call(model: str, devices: Sequence[jax.Device]) -> int:
    """Returns the number of steps that one compiled call runs if the recipe does not set it."""
    return get_model(model).CPU_STEPS_PER_CALL if devices[0].platform == "cpu" else ACCELERATOR_STEPS_PER_CALL


def parallelize(
    function: Callable[..., Any], devices: Sequence[jax.Device], donate: tuple[int, ...], options: dict[str, Any]
) -> Any:
    """pmaps `function(*args, device_index)` with replicated arguments and results.

    Args: donate: positions of arguments whose buffers are reused; options: XLA's compiler options.
    Returns: compile_for(*example arguments) → the compiled function, which can't be recompiled by accident.
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
    """Runs carry = step(i, carry) for i from start to start + count - 1. There is no loop if `at_most` is 1."""
    return step(start, carry) if at_most == 1 else lax.fori_loop(start, start + count, step, carry)
