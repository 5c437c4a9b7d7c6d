"""Compiles the training and evaluation steps of recipes for TPUs, with TPU's own compiler and without a TPU.

python -m benchmarks.tpu_compile --out DIR [--recipe …] [--topology v5e:1x1 v6e:2x2 …] [--dtype …]

libtpu (pip install -e '.[tpu]') compiles on any x86-64 Linux machine for chips that the machine lacks. The programs are
those of cifar_jax.multi_step, which training and evaluation run, through the same pmap. pmap accepts the chips of
several hosts, so every topology takes the same way. Nothing is executed, and the arguments are shapes.

DIR/NAME.json gets each program's compile time, memory, FLOPs, bytes, XLA's estimate of cycles, its collectives and
surprises: what a step should not have. It is rewritten after each program. The exit status is 1 if there is a surprise.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks import output_file, write_result
from benchmarks.tpu_programs import (
    CHIPS_PER_HOST,
    PHASES,
    compile_program,
    dataset_sizes,
    fit_batch,
    shapes,
    topology_devices,
    topology_shape,
)
from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config
from cifar_jax.environment import PACKAGES, describe_command, describe_environment
from cifar_jax.errors import UserError
from cifar_jax.parallel import Parallel, replicate
from cifar_jax.train_step import create_train_state
from cifar_jax.trainer import create_history

MAIN_RECIPES = ("lenet5", "all_cnn")
MORE_TOPOLOGIES = ("v5e:1x1", "v5e:4x4", "v5e:16x16", "v6e:2x2")  # for the main recipes
TOPOLOGY = "v5e:2x2"  # for all recipes
# libtpu would ask the machine's metadata server for its TPU, and admit one process at a time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compiles the training and evaluation steps of recipes for TPUs. Needs libtpu and no TPU."""

    out: Path
    """Folder for the JSON file."""
    name: str = "tpu_compile"
    """Name of the JSON file without .json."""
    recipe: tuple[str, ...] | None = None
    """Recipes. None: all recipes for v5e:2x2, and lenet5 and all_cnn for other topologies too."""
    topology: tuple[str, ...] | None = None
    """Chips and their arrangement, such as v5e:4x4 or v6e:1x1. None with --recipe: v5e:2x2."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation type. Parameters stay float32."""


def prepare_compiler() -> None:
    """Sets what libtpu needs. Called before JAX lists its devices. Raises: UserError without libtpu."""
    if find_spec("libtpu") is None:
        raise UserError("libtpu, the compiler for TPUs, is not installed: pip install -e '.[tpu]' (Linux on x86-64)")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", CHIPS_PER_HOST[0] * CHIPS_PER_HOST[1])  # for dispatch_seconds


def dispatch_seconds(config: Config) -> float:
    """Returns the host's time for one call: median over calls of a program that returns a recipe's state at once.

    It runs on as many CPU devices as a host of the topologies has chips.
    """
    devices = jax.local_devices()
    state, history = create_train_state(config, 1), create_history(1)
    state, history, data = replicate((state, history, np.zeros(4, np.int32)), devices)
    function = lambda state, history, images, labels, order, start, count, device: (state, history, history["loss"][0])
    program = Parallel(function, devices, (0, 1), {})
    scalar = np.int32(0)
    run = program.compile(state, history, data, data, data, scalar, scalar)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        state, history, loss = run(state, history, data, data, data, scalar, scalar)
        times.append(time.perf_counter() - start)
        jax.block_until_ready(loss)
    return statistics.median(times)


def plan(arguments: Arguments) -> list[tuple[str, str]]:
    """Returns the (recipe, topology) pairs to compile. Raises: UserError for unknown names."""
    for recipe in arguments.recipe or ():
        if recipe not in RECIPES:
            raise UserError(f"--recipe {recipe}: choose one of {', '.join(RECIPES)}")
    for topology in arguments.topology or ():
        topology_shape(topology)
    if () in (arguments.recipe, arguments.topology):
        raise UserError("--recipe and --topology must each name one or more")
    if arguments.recipe or arguments.topology:
        recipes = arguments.recipe or tuple(RECIPES)
        return [(recipe, topology) for recipe in recipes for topology in arguments.topology or (TOPOLOGY,)]
    pairs = [(recipe, TOPOLOGY) for recipe in RECIPES]
    return pairs + [(recipe, topology) for recipe in MAIN_RECIPES for topology in MORE_TOPOLOGIES]


@command
def main() -> int:
    arguments = parse_arguments(Arguments, prog="python -m benchmarks.tpu_compile")
    pairs = plan(arguments)
    file = output_file(arguments.out, arguments.name)
    prepare_compiler()
    content: dict[str, Any] = {
        "command": describe_command("-m benchmarks.tpu_compile", sys.argv[1:]),
        **describe_environment(jax.local_devices()[:1], (*PACKAGES, "libtpu")),
        "dtype": arguments.dtype,
        "dispatch_seconds": {},
        "programs": [],
    }
    for name, topology in pairs:
        devices = topology_devices(topology)
        config, scaling = fit_batch(dataclasses.replace(RECIPES[name], dtype=arguments.dtype), len(devices))
        if name not in content["dispatch_seconds"]:
            content["dispatch_seconds"][name] = dispatch_seconds(config)
        steps_per_epoch = -(-dataset_sizes(config.dataset)[0] // config.batch_size)
        state = shapes(create_train_state(config, steps_per_epoch))
        for phase in PHASES:
            program = {"recipe": name, "topology": topology, "phase": phase, "scaling": scaling}
            program |= compile_program(config, topology, phase, state)
            content["programs"].append(program)
            write_result(file, content, complete=len(content["programs"]) == len(pairs) * len(PHASES))
            cost = f"{program['compile_cpu_seconds']:6.1f} s of CPU time, {program['cycles']:10,} cycles a step"
            print(f"{name:18} {topology:10} {phase:10} {cost}", *program["surprises"])
    return int(any(program["surprises"] for program in content["programs"]))


if __name__ == "__main__":
    sys.exit(main())
