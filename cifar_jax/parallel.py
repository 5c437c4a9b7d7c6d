"""Selects devices and runs steps on them. This is the only module that calls pmap.

A step is a pure function of (state, batch) on one device. `Parallel` runs it on all devices of all processes: state and
dataset are replicated, each device takes its slice of every global batch, and pmean averages the gradients.
pmap is in maintenance mode (JAX runs it as jit + shard_map), and replacing it changes only this file. Two caveats:
shard_map returns gradients of replicated parameters already summed, and pmap does not report a forgotten pmean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from cifar_jax.configs.base import Config
from cifar_jax.errors import UserError
from cifar_jax.host import release_memory
from cifar_jax.keys import plain, with_keys
from cifar_jax.models import get_model
from cifar_jax.processes import broadcast

AXIS = "devices"
MIN_BATCH_OF_A_CORE = 16  # with fewer images, communication between cores costs more than the second core gains
ACCELERATOR_STEPS_PER_CALL = 1000  # enough to hide the dispatch time


def dividing_count(batch_size: int, at_most: int, multiple_of: int = 1) -> int:
    """Returns the largest number of devices, up to `at_most`, that divides the batch evenly; 0 if none does."""
    counts = range(multiple_of, at_most + 1, multiple_of)
    return max((n for n in counts if batch_size % n == 0), default=0)


def select_devices(config: Config) -> list[jax.Device]:
    """Returns a run's devices: config.num_devices of them, else all; on a CPU no more than the batch can feed.

    Each CPU core gets at least MIN_BATCH_OF_A_CORE images. Several processes give the same number of devices each, and
    their devices come one process after another.
    Raises: UserError if there are too few devices, they can't share the batch evenly, or processes are not connected.
    """
    processes = jax.process_count()
    if processes > 1 and not jax.distributed.is_initialized():
        raise UserError(f"this is one of {processes} processes: connect them with --coordinator auto")
    devices = jax.local_devices() if processes == 1 else jax.devices()
    most = len(devices)
    if devices[0].platform == "cpu":
        most = max(processes, min(most, config.batch_size // MIN_BATCH_OF_A_CORE))
        even = config.mixes and config.batch_size % 2 == 0  # mixing takes pairs of a device's images
        default = dividing_count(config.batch_size // 2 if even else config.batch_size, most, processes)
    else:
        default = most
    total = config.num_devices or default or processes
    if total > len(devices):
        where = "this machine has" if processes == 1 else "there are"
        raise UserError(f"--num-devices {total}: {where} only {len(devices)}")
    if total % processes:
        raise UserError(f"--num-devices {total}: must be a multiple of {processes}, the number of processes")
    if config.batch_size % total:
        fewer = dividing_count(config.batch_size, total - 1, processes)
        advice = f", or --num-devices {fewer}" if fewer else ""
        raise UserError(
            f"--batch-size {config.batch_size} can't be divided evenly over {total} devices: use a multiple of {total}"
            + advice
        )
    if processes == 1:
        return devices[:total]
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    return [device for number in sorted(by_process) for device in by_process[number][: total // processes]]


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Copies every array of the tree to every device. Several processes must hold the same arrays."""
    sharding = _sharding(devices, jax.sharding.PartitionSpec())
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    mine = [device for device in devices if device.process_index == jax.process_index()]

    def copied(array: Any) -> jax.Array:
        copies = [jax.device_put(array, device) for device in mine]
        return jax.make_array_from_single_device_arrays(copies[0].shape, sharding, copies)

    return jax.tree.map(copied, tree)


def local(tree: Any) -> Any:
    """Returns the arrays of a replicated tree as arrays of this process alone, on its first device."""
    alone = lambda array: array if array.is_fully_addressable else array.addressable_data(0)
    return jax.tree.map(alone, tree)


def share(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Gives all processes the arrays of process 0. Args: tree: in each process, arrays of the same shapes and types."""
    if jax.process_count() == 1:
        return tree
    return replicate(with_keys(broadcast(plain(tree)), tree), devices)


def _sharding(devices: Sequence[jax.Device], spec: jax.sharding.PartitionSpec) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), (AXIS,)), spec)


def has_constant_bounds(devices: Sequence[jax.Device]) -> bool:
    """Whether a loop over steps should have a number of steps that is known when it is compiled.

    On an accelerator the host would otherwise read the loop's condition after each step. On a CPU that costs nothing,
    and one program serves calls of all lengths.
    """
    return devices[0].platform != "cpu"


def choose_steps_per_call(config: Config, devices: Sequence[jax.Device], num_steps: int) -> int:
    """Returns the largest number of steps that one compiled call runs in a pass of `num_steps`.

    It is the recipe's number; else on a CPU the network's, elsewhere that of `accelerator_steps_per_call`.
    """
    if config.steps_per_call is not None:
        return min(config.steps_per_call, num_steps)
    if devices[0].platform == "cpu":
        return min(get_model(config.model).CPU_STEPS_PER_CALL, num_steps)
    return accelerator_steps_per_call(num_steps)


def accelerator_steps_per_call(num_steps: int) -> int:
    """Returns the steps of a call on an accelerator, in a pass of `num_steps`: at most ACCELERATOR_STEPS_PER_CALL.

    It is no less than half of them if the calls of a pass can then be equally long, which needs one program only.
    """
    most = min(ACCELERATOR_STEPS_PER_CALL, num_steps)
    return max((count for count in range(most // 2, most + 1) if count and num_steps % count == 0), default=most)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """`function(*args, device_index)`, pmapped over the devices with replicated arguments and results.

    Attributes: donate: positions of arguments whose buffers are reused; options: XLA's compiler options.
    """

    function: Callable[..., Any]
    devices: Sequence[jax.Device]
    donate: tuple[int, ...]
    options: dict[str, Any]

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers the function for such arguments: arrays, or jax.ShapeDtypeStruct for devices that are not here."""
        return self._lower(args, jax.ShapeDtypeStruct((len(self.devices),), np.int32))

    def compile(self, *args: Any) -> Callable[..., Any]:
        """Returns the function, compiled for such arrays. It can't be recompiled by accident."""
        numbers = np.arange(len(self.devices), dtype=np.int32)
        each = _sharding(self.devices, jax.sharding.PartitionSpec(AXIS))  # pmap takes whole arrays across processes
        index = jax.make_array_from_callback(numbers.shape, each, lambda part: numbers[part])
        release_memory()  # what earlier steps have freed would add to what the compiler needs
        compiled = self._lower(args, index).compile(self.options)
        release_memory()
        return lambda *args: compiled(*args, index)

    def _lower(self, args: Sequence[Any], index: Any) -> jax.stages.Lowered:
        in_axes = (None,) * len(args) + (0,)
        parallel = jax.pmap(
            self.function, AXIS, in_axes=in_axes, out_axes=None, donate_argnums=self.donate, devices=list(self.devices)
        )
        with jax.set_mesh(None):  # pmap has a mesh of its own, and refuses one of the calling program
            return parallel.lower(*args, index)


def repeat(step: Callable[[Any, Any], Any], start: jax.Array, count: jax.Array | int, carry: Any, at_most: int) -> Any:
    """Runs carry = step(i, carry) for i from start to start + count - 1. There is no loop if `at_most` is 1.

    Args: count: an int32 scalar; an int makes the loop's bounds constants.
    """
    if at_most == 1:
        return step(start, carry)
    if isinstance(count, int):
        return lax.fori_loop(0, count, lambda i, carry: step(start + i, carry), carry)
    return lax.fori_loop(start, start + count, step, carry)
