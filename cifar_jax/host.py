"""The CPU at work: its cores as devices, memory that is kept, options of the compiler."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from typing import Any

import jax

from cifar_jax.configs.base import Config
from cifar_jax.errors import UserError

# mallopt's parameters (malloc.h): free bytes that are given back, bytes asked for ahead, number of blocks mapped.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HEAP_BYTES = 60 * 2**20  # below the 64 MiB of a heap of the C library
_LARGEST_ARRAY = {"all_cnn": 34 * 36 * 96 * 4, "lenet5": 32 * 32 * 32 * 4}  # bytes of an image's largest, padded


def cpu_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_cores() -> None:
    """Makes every core of the CPU a device. For commands, before anything asks JAX for its devices.

    XLA runs parts of a step on one core; with its batch divided, LeNet-5's step at 128 is 1.5 times faster on two.
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


def compiler_options(config: Config, batch_size: int, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """XLA's for a step: on the CPU its temporary arrays in blocks of _HEAP_BYTES, which `keep_memory` can keep.

    Not if a single array were larger: XLA warns of each.
    """
    fits = batch_size // len(devices) * _LARGEST_ARRAY[config.model] <= _HEAP_BYTES
    return {"xla_multiheap_size_constraint_per_heap": _HEAP_BYTES} if devices[0].platform == "cpu" and fits else {}


def prepare_cpu() -> None:
    """What commands do after reading their flags, so that the CPU is used well: see use_cpu_cores and keep_memory.

    Raises: UserError if JAX has no device.
    """
    use_cpu_cores()
    keep_memory()
    check_devices()


def check_devices() -> None:
    """Raises: UserError if JAX has no device, as JAX_PLATFORMS names one that is not there."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"JAX finds no device: install for it (README), or unset JAX_PLATFORMS={asked}") from error
