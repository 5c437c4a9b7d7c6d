"""The training and evaluation programs of recipes, compiled for a TPU topology and described in numbers."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import hlo
from benchmarks.scaling import CHIPS
from cifar_jax.configs.base import Config
from cifar_jax.datasets import get_dataset
from cifar_jax.errors import UserError
from cifar_jax.multi_step import create_eval_steps, create_train_steps, round_eval_batch_size
from cifar_jax.parallel import Parallel, choose_steps_per_call, has_constant_bounds
from cifar_jax.train_step import TrainState
from cifar_jax.trainer import create_history

CHIPS_PER_HOST = (2, 2)
METRICS_BYTES = 64  # more than the loss and the counts of a step have
SCALAR = jax.ShapeDtypeStruct((), jnp.int32)


def topology_shape(name: str) -> tuple[str, tuple[int, int]]:
    """Returns (chip, chips per axis): 'v5e:2x4' → ('v5e', (2, 4)). Raises: UserError."""
    match = re.fullmatch(r"(\w+):([1-9]\d*)x([1-9]\d*)", name)
    if match is None or match[1] not in CHIPS:
        raise UserError(f"--topology {name}: write CHIP:AxB, such as v5e:2x4, with a chip of {', '.join(CHIPS)}")
    return match[1], (int(match[2]), int(match[3]))


def topology_devices(name: str) -> list[jax.Device]:
    """Returns the chips of a topology, which can be compiled for and not be used. Raises: UserError."""
    _, shape = topology_shape(name)
    bounds = [min(sizes) for sizes in zip(shape, CHIPS_PER_HOST)] + [1]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=bounds)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topology {name}: libtpu refuses it ({reason}): try another one") from error
    return list(found.devices)


def fit_batch(config: Config, chips: int) -> tuple[Config, str]:
    """Returns the recipe for this number of chips, and 'strong' if its batch divides. Else each chip gets the whole
    recipe's batch, 'weak', which is another training."""
    if config.batch_size % chips == 0:
        return config, "strong"
    return dataclasses.replace(config, batch_size=config.batch_size * chips), "weak"


def shapes(tree: Any) -> Any:
    """Returns the tree with a ShapeDtypeStruct for each array."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@functools.cache
def dataset_sizes(name: str) -> tuple[int, int]:
    """Returns the numbers of training and test images. Only a dataset that does not declare them is loaded."""
    info = get_dataset(name)
    if hasattr(info, "train_size") and hasattr(info, "test_size"):
        return info.train_size, info.test_size
    dataset = info.load()
    return len(dataset.train_labels), len(dataset.test_labels)


def dataset_shapes(num_images: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Returns the shapes of images and labels."""
    images = jax.ShapeDtypeStruct((num_images, 32, 32, 3), jnp.uint8)
    return images, jax.ShapeDtypeStruct((num_images,), jnp.int32)


def training(config: Config, devices: list[jax.Device], state: TrainState) -> tuple[Parallel, tuple[Any, ...], int]:
    """Returns (the training program at 32×32 pixels, the shapes of its arguments, steps per call)."""
    images, labels = dataset_shapes(dataset_sizes(config.dataset)[0])
    steps_per_epoch = -(-labels.shape[0] // config.batch_size)
    per_call = choose_steps_per_call(config, devices, steps_per_epoch)
    program = create_train_steps(config, devices, 32, steps_per_epoch, per_call, has_constant_bounds(devices))
    history = shapes(create_history(steps_per_epoch))
    return program, (state, history, images, labels, labels, SCALAR, SCALAR), per_call


def evaluation(config: Config, devices: list[jax.Device], state: TrainState) -> tuple[Parallel, tuple[Any, ...], int]:
    """Returns (the evaluation program, the shapes of its arguments, steps per call)."""
    images, labels = dataset_shapes(dataset_sizes(config.dataset)[1])
    num_steps = -(-labels.shape[0] // round_eval_batch_size(config, devices, labels.shape[0]))
    per_call = choose_steps_per_call(config, devices, num_steps)
    constant = has_constant_bounds(devices)
    program = create_eval_steps(config, devices, labels.shape[0], per_call, constant=constant)
    history = shapes(create_history(num_steps))
    return program, (history, state, images, labels, SCALAR, SCALAR), per_call


PHASES = {"training": training, "evaluation": evaluation}


def surprises(program: hlo.Program, phase: str, gradient_bytes: int, num_donated: int, num_chips: int) -> list[str]:
    """Returns what a step should not have, in words.

    Expected are all-reduces of gradients (training) and of metrics, results in the donated buffers, no float64 and no
    transfer between chip and host.
    """
    found = hlo.collectives(program)
    reduced = sum(x["times"] * x["bytes"] for x in found)
    expected = gradient_bytes if phase == "training" and num_chips > 1 else 0
    checks = {
        "collectives other than all-reduce": all(x["operation"] == "all-reduce" for x in found),
        "collectives outside of the steps": all(x["per"] == "step" for x in found),
        f"{reduced} bytes of all-reduce for {expected} bytes of gradients": 0 <= reduced - expected <= METRICS_BYTES,
        "float64": "f64[" not in program.text,
        "transfers between chip and host": not hlo.transfers(program),
        "state or metrics not in the donated buffers": hlo.donated(program) == num_donated,
    }
    return [surprise for surprise, ok in checks.items() if not ok]


def count_gradient_bytes(config: Config, params: Any) -> int:
    """Returns the bytes of the gradients of all parameters that are trained."""
    fixed = lambda path: path[-1].key == "scale" and config.normalization_scale == "fixed"
    leaves = jax.tree.leaves_with_path(params)
    return sum(x.size * x.dtype.itemsize for path, x in leaves if not fixed(path))


def compile_program(config: Config, topology: str, phase: str, state: TrainState) -> dict[str, Any]:
    """Compiles a program. Returns: its entry in the result file. Sizes are per chip, FLOPs and cycles per step."""
    devices = topology_devices(topology)
    program, arguments, steps_per_call = PHASES[phase](config, devices, state)
    lowered = program.lower(*arguments)
    start, cpu_start = time.perf_counter(), time.process_time()
    compiled = lowered.compile(program.options)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    module = hlo.parse(compiled.as_text(), steps_per_call)
    gradients = count_gradient_bytes(config, state.params)
    num_donated = len(jax.tree.leaves([arguments[position] for position in program.donate]))
    step = hlo.cycles(module, module.step)
    call = hlo.cycles(module, module.entry) if module.entry != module.step else (0, 0)
    num_images = arguments[2].shape[0]  # in both phases the third argument
    batch_size = config.batch_size
    if phase == "evaluation":
        batch_size = round_eval_batch_size(config, devices, num_images)
    return {
        "chips": len(devices),
        "hosts": len({device.process_index for device in devices}),
        "batch_size": batch_size,
        "num_images": num_images,
        "images_per_chip": batch_size // len(devices),
        "steps_per_call": steps_per_call,
        "compile_seconds": round(seconds, 1),
        "compile_cpu_seconds": round(cpu_seconds, 1),  # of all threads; other work on the machine does not add to it
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"] - hlo.copied_per_call(module),
        "bytes_copied_per_call": hlo.copied_per_call(module),
        "cycles": step[0],
        "cycles_per_call": call[0],
        "operations_without_estimate": step[1] + call[1],
        "xla_optimal_seconds": max(costs["optimal_seconds"], 0) or None,  # negative if XLA has no cost for an operation
        "gradient_bytes": gradients,
        "loops": hlo.loops(module),
        "collectives": hlo.collectives(module),
        "surprises": surprises(module, phase, gradients, num_donated, len(devices)),
    }
