"""The CPU runtime: cores as devices, memory that the process keeps, options of the compiler."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cifar_jax.errors import UserError
from cifar_jax.models import get_model

# mallopt's parameters (malloc.h): free bytes that are given back, bytes asked for ahead, number of blocks mapped.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HEAP_BYTES = 60 * 2**20  # below the 64 MiB of a heap of the C library


def cpu_cores() -> int:
    """Number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_cores() -> None:
    """Makes every core of the CPU a device. For commands, before anything asks JAX for its devices.

    XLA runs parts of a step on one core. With its batch divided over two cores, LeNet-5's step at batch 128 is 1.5
    times as fast.
    """
    unset = "JAX_NUM_CPU_DEVICES" not in os.environ and "device_count" not in os.environ.get("XLA_FLAGS", "")
    if unset:
        with contextlib.suppress(RuntimeError):  # the devices are there already
            jax.config.update("jax_num_cpu_devices", cpu_cores())


def keep_memory() -> None:
    """Makes the C library (glibc; of others nothing is asked) keep freed memory for the process.

    By default a step's large buffers are given back to the system, and mapped and zeroed again in the next step:
    LeNet-5's step at 256 then takes 1.6 times as long. A thread's memory comes in heaps of 64 MiB: an empty one is kept
    if more than that is asked for ahead; a larger block is mapped each time, see `compiler_options`.
    """
    with contextlib.suppress(OSError, AttributeError):  # no such library or function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 2**28)


@functools.cache
def _largest_activation(model: str) -> int:
    """Bytes of the largest output of a layer for one image, in float32, padded for the next layer."""
    network = get_model(model)()
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    outputs = lambda: network.init_with_output(jax.random.key(0), jnp.zeros(images.shape), capture_intermediates=True)
    _, variables = jax.eval_shape(outputs)
    layers = [variables["intermediates"][name]["__call__"][0] for name in network.LAYERS]
    return max((x.shape[1] + 2) * (x.shape[2] + 4) * x.shape[3] * 4 if x.ndim == 4 else x.size * 4 for x in layers)


def compiler_options(model: str, batch_size: int, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """XLA's options for a step: on a CPU its temporary arrays come in blocks that `keep_memory` can keep.

    Not if a single array is larger than a block, as XLA warns of each.
    """
    if devices[0].platform != "cpu" or batch_size // len(devices) * _largest_activation(model) > _HEAP_BYTES:
        return {}
    return {"xla_multiheap_size_constraint_per_heap": _HEAP_BYTES}


def prepare_host() -> None:
    """What commands do after reading their flags: uses the CPU well (see use_cpu_cores, keep_memory), checks devices.

    Raises: UserError if JAX has no device.
    """
    use_cpu_cores()
    keep_memory()
    check_devices()


def check_devices() -> None:
    """Raises: UserError if JAX has no device, because JAX_PLATFORMS names one that is not there."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"JAX finds no device: install for it (README), or unset JAX_PLATFORMS={asked}") from error
