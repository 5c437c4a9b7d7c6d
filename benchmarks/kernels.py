"""Measures the speedup of each CPU kernel of cifar_jax/ops in the whole training step.

python -m benchmarks.kernels --out DIR [--rounds N] [--workloads …]

All variants of a workload are compiled first and then timed in turns, in alternating order, so that a drift of the
machine's speed affects all alike. The variant with keep_memory comes last, because keep_memory can't be undone.
DIR/kernels.json gets the medians over the rounds and the ratios to the plain variant. A step is forward, backward and
update in float32 on random images, with dropout and the recipe's augmentation. All variants except the last three
measure a kernel without the others, because gains differ once Winograd's form replaces some convolutions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import output_file, write_result
from benchmarks.workloads import create_workload
from cifar_jax import host, multi_step, ops
from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config
from cifar_jax.datasets import get_dataset
from cifar_jax.environment import describe_command, describe_environment
from cifar_jax.errors import UserError
from cifar_jax.host import check_devices, keep_memory, use_cpu_cores
from cifar_jax.ops import cpu, direct, winograd
from cifar_jax.ops.reference import lax_convolution, lax_max_pool
from cifar_jax.parallel import replicate, select_devices
from cifar_jax.trainer import Trainer

# name: (config, steps per round)
WORKLOADS = {
    "lenet5_batch4": (RECIPES["lenet5_reference"], 200),
    "lenet5_batch128": (create_workload("lenet5", 128, "float32")[1].augmented, 8),
    "all_cnn_batch64": (RECIPES["all_cnn_reference"], 2),
}
ALL = ("gradient", "winograd", "large", "row", "few channels", "pool", "dropout")
# name: the parts of ops that replace JAX's own; "cores": a large batch is divided over the CPU's cores; "memory": the
# process keeps freed memory
FORMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "kernel gradient": ("gradient",),
    "kernel gradient, Winograd": ("gradient", "winograd"),
    "kernel gradient, large": ("gradient", "large"),
    "kernel gradient, padded row": ("gradient", "row"),
    "kernel gradient, few channels": ("gradient", "few channels"),
    "max pool": ("pool",),
    "dropout": ("dropout",),
    "all": ALL,
    "all, cores as devices": (*ALL, "cores"),
    "all, cores as devices, memory kept": (*ALL, "cores", "memory"),
}


@contextlib.contextmanager
def only(parts: tuple[str, ...]) -> Iterator[None]:
    """Context in which programs for the CPU use only these parts of ops, and JAX's own forms of the others."""
    convolution = ops.convolution if "gradient" in parts else lax_convolution
    pool = cpu.max_pool if "pool" in parts else lax_max_pool
    threefry = lambda key, probability, shape, first: jax.random.bernoulli(key, probability, shape)
    mask = ops.bernoulli_mask if "dropout" in parts else threefry
    channels = direct.CHANNELS if "few channels" in parts else 1
    pays = winograd.pays if "winograd" in parts else lambda kernel, size: False
    large_kernel = direct.LARGE_KERNEL if "large" in parts else sys.maxsize
    options = host.compiler_options if "memory" in parts else lambda *_: {}
    unpadded = direct.unpadded_convolution if "row" in parts else functools.partial(lax_convolution, pads="VALID")
    with (
        mock.patch.object(ops, "convolution", convolution),
        mock.patch.object(ops, "max_pool", pool),
        mock.patch.object(ops, "bernoulli_mask", mask),
        mock.patch.object(direct, "CHANNELS", channels),
        mock.patch.object(direct, "LARGE_KERNEL", large_kernel),
        mock.patch.object(direct, "unpadded_convolution", unpadded),
        mock.patch.object(winograd, "pays", pays),
        mock.patch.object(multi_step, "compiler_options", options),
    ):
        yield


def create_timer(config: Config) -> Callable[[int], float]:
    """Compiles the training step. Returns: timer(number of steps) → milliseconds per step."""
    devices, size = select_devices(config), 4 * config.batch_size
    images = np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(size, dtype=np.int32) % get_dataset(config.dataset).num_classes
    steps = Trainer(dataclasses.replace(config, steps_per_call=1), images, labels, devices)
    order = replicate(jnp.arange(size, dtype=jnp.int32), devices)

    def timer(num_steps: int) -> float:
        start = time.perf_counter()
        for i in range(num_steps):
            steps.run_steps(order, i % 4, 1)
        jax.block_until_ready(steps.state)
        return (time.perf_counter() - start) / num_steps * 1000

    timer(2)
    return timer


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times the training step with each CPU kernel of cifar_jax.ops alone, and with all."""

    out: Path
    """Folder for kernels.json."""
    rounds: int = 5
    """Number of rounds. Each variant is timed once per round."""
    workloads: tuple[Literal["lenet5_batch4", "lenet5_batch128", "all_cnn_batch64"], ...] = tuple(WORKLOADS)
    """Networks and batch sizes to train."""


@command
def main() -> int:
    arguments = parse_arguments(Arguments, prog="python -m benchmarks.kernels")
    use_cpu_cores()
    check_devices()
    if not arguments.workloads or arguments.rounds < 1:
        raise UserError("--workloads must name one or more, and --rounds must be 1 or more")
    file = output_file(arguments.out, "kernels")
    all_timers: dict[str, dict[str, Callable[[int], float]]] = {}
    all_times: dict[str, dict[str, list[float]]] = {}
    for workload in arguments.workloads:
        config, num_steps = WORKLOADS[workload]
        timers = {}
        for form, parts in FORMS.items():
            with only(parts):
                timers[form] = create_timer(dataclasses.replace(config, num_devices=None if "cores" in parts else 1))
        all_timers[workload] = timers
        times = all_times[workload] = {form: [] for form in FORMS}
        for number in range(arguments.rounds):
            for form in list(timers)[:: -1 if number % 2 else 1]:
                if "memory" not in FORMS[form]:
                    times[form].append(timers[form](num_steps))
    keep_memory()  # can't be undone, so its rounds come last
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for workload, times in all_times.items():
        config, num_steps = WORKLOADS[workload]
        for form, timer in all_timers[workload].items():
            if "memory" in FORMS[form]:
                timer(num_steps)
                times[form] += [timer(num_steps) for _ in range(arguments.rounds)]
        plain = statistics.median(times["plain"])
        results[workload] = {}
        for form, values in times.items():
            median = statistics.median(values)
            results[workload][form] = {
                "ms_per_step": round(median, 3),
                "images_per_second": round(1000 * config.batch_size / median, 1),
                "speedup": round(plain / median, 3),
                "rounds_ms": [round(value, 3) for value in values],
            }
            print(f"{workload:16} {form:33} {median:9.2f} ms per step, {plain / median:.2f}× plain")
    content = {
        "command": describe_command("-m benchmarks.kernels", sys.argv[1:]),
        **describe_environment(jax.local_devices()[:1]),
        "results": results,
    }
    write_result(file, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
