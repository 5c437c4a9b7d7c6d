"""CPU runtime: cores as devices, memory that the process keeps, compiler options."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cifar_jax.compilation import use_compilation_cache
from cifar_jax.configs.base import Config
from cifar_jax.errors import UserError, is_lost_process, one_line
from cifar_jax.models import get_model

# Parameters of mallopt (malloc.h): free bytes before trimming, bytes of padding per request, number of mapped blocks.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all cores, of each period
_HEAP_BYTES = 60 * 2**20  # below the 64 MiB of glibc's heaps


def cpu_cores() -> int:
    """Number of CPU cores available to this process, also with the limit of a container (cgroup v2) or of SLURM."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max" if there is no limit
        quota, period = map(int, _CPU_LIMIT.read_text().split())
        cores = min(cores, -(-quota // period))
    with contextlib.suppress(ValueError):
        cores = min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", "")))
    return max(cores, 1)


def use_cpu_cores() -> None:
    """Makes every CPU core a JAX device. Commands call it before JAX lists its devices.

    XLA runs parts of a step on one core only. Dividing the batch over two cores makes LeNet-5's step at batch 128 1.5
    times as fast.
    """
    unset = "JAX_NUM_CPU_DEVICES" not in os.environ and "device_count" not in os.environ.get("XLA_FLAGS", "")
    if unset:
        with contextlib.suppress(RuntimeError):  # JAX has already created its devices
            jax.config.update("jax_num_cpu_devices", cpu_cores())


def keep_memory() -> None:
    """Makes glibc keep freed memory for the process. Other C libraries are left as they are.

    By default glibc returns a step's large buffers to the system, which maps and zeroes them again in the next step:
    LeNet-5's step at batch 256 then takes 1.6 times as long. Each thread allocates from heaps of 64 MiB. An empty heap
    is kept if the padding is larger. Larger blocks are mapped every time: see `compiler_options`.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 2**28)


def release_memory() -> None:
    """Makes glibc return the memory that is free now, such as the 350 MB that compiling All-CNN's step has used."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def has_huge_pages() -> bool:
    """Whether Linux maps large blocks of memory in pages of 2 MiB, which takes little time.

    The system is set to use them for all blocks, or for those for which a program asks. glibc asks, from version 2.35
    on, if the process was started with GLIBC_TUNABLES=glibc.malloc.hugetlb=1. Setting the variable later has no effect.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # another system or C library
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        if "[madvise]" not in setting:
            return "[always]" in setting
        started_with = Path("/proc/self/environ").read_text(errors="replace").split("\0")
        tunables = next((line.partition("=")[2] for line in started_with if line.startswith("GLIBC_TUNABLES=")), "")
        library, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        asks = library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        return asks and "glibc.malloc.hugetlb=1" in tunables.split(":")
    return False


@functools.cache
def _largest_activation(model: str) -> int:
    """Returns the bytes of the largest layer output for one image, in float32, padded for the next layer."""
    network = get_model(model)()
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    outputs = lambda: network.init_with_output(jax.random.key(0), jnp.zeros(images.shape), capture_intermediates=True)
    _, variables = jax.eval_shape(outputs)
    layers = [variables["intermediates"][name]["__call__"][0] for name in network.LAYERS]
    return max((x.shape[1] + 2) * (x.shape[2] + 4) * x.shape[3] * 4 if x.ndim == 4 else x.size * 4 for x in layers)


def compiler_options(
    config: Config, batch_size: int, devices: Sequence[jax.Device], steps_per_call: int = 1
) -> dict[str, Any]:
    """Returns XLA's options for a step of the recipe.

    On a GPU, config.deterministic excludes operations that add in a varying order, and the choice of operations by
    timing (xla.proto: xla_gpu_deterministic_ops). On a CPU the options limit blocks of temporary arrays to what
    `keep_memory` keeps, which makes All-CNN's step 12 to 20 % faster than with one large block of small pages.

    There is no limit if one large block costs nothing: with huge pages, or for several steps a call, which allocate
    only once. The program can then be stored in the compilation cache, which takes only programs with one block. Nor is
    there a limit that a single array exceeds: XLA would print warnings.
    """
    if devices[0].platform == "gpu" and config.deterministic:
        return {"xla_gpu_deterministic_ops": True}
    if devices[0].platform != "cpu" or steps_per_call > 1 or has_huge_pages():
        return {}
    if batch_size // len(devices) * _largest_activation(config.model) > _HEAP_BYTES:
        return {}
    return {"xla_multiheap_size_constraint_per_heap": _HEAP_BYTES}


def prepare_host() -> None:
    """Prepares the CPU (see use_cpu_cores, keep_memory) and checks devices. Commands call it after parsing flags.

    Raises: UserError if JAX has no device.
    """
    use_cpu_cores()
    keep_memory()
    if not jax.distributed.is_initialized():  # GPUs of several processes tune together, so all or none must compile
        use_compilation_cache()
    check_devices()


def check_devices() -> None:
    """Checks that JAX has a device. Raises: UserError if not: one fails, or JAX_PLATFORMS names a missing platform."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        if jax.distributed.is_initialized() and is_lost_process(error):  # they tell each other their devices
            raise
        reason = one_line(error) or type(error).__name__
        if asked := os.environ.get("JAX_PLATFORMS"):
            missing = f"JAX finds no device for JAX_PLATFORMS={asked} ({reason})"
            raise UserError(f"{missing}: install JAX for it (see README) or unset the variable") from error
        raise UserError(f"JAX can't use a device ({reason}): set JAX_PLATFORMS=cpu to do without it") from error
