"""Training and inference throughput beside PyTorch and Keras, and the part of the hardware's matrix-product rate used.

python -m benchmarks.throughput --out DIR [--models …] [--batch-sizes …] [--frameworks …] [--dtype bfloat16] …

Each backend has a process of its own; they are compiled and warmed up one by one, then take turns, phase by phase
and round by round, forth and back, so that a drifting machine hurts all alike. Training is the whole loop: batches
gathered by a shuffled order from uint8 images on the device, scaling, augmentation if any, forward with dropout,
backward, update. Inference is the whole evaluation: gather, scaling, forward, loss and number of correct ones. Medians
over the rounds go to DIR/NAME.json, written anew after each workload. A backend that fails is named there with its
reason. The file calls backends contenders, as files that were measured earlier do.

Measure on a quiet machine: where others compute, PyTorch's OpenMP threads wait for each other in vain, and it slows
down tenfold.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks import output_file, write_result
from benchmarks.backends import FAMILIES, Family
from benchmarks.worker import Absent, Worker
from benchmarks.workloads import PHASES, Phase, Workload, create_workload, default_batch_sizes, flops_per_image
from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs.base import ModelName
from cifar_jax.environment import describe_command
from cifar_jax.errors import UserError
from cifar_jax.models import MODELS

MATRIX_SIZES = {"cpu": (1024, 2048)}  # and 4096, 8192 elsewhere
FLOPS = "forward: sum over layers of 2·H_out·W_out·kh·kw·I·O (dense: 2·I·O); training: 3·forward - first layer's"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures training and inference in images a second, beside PyTorch and Keras."""

    out: Path
    """Folder for the JSON file."""
    name: str = "throughput"
    """Name of the JSON file, without .json."""
    models: tuple[ModelName, ...] = tuple(MODELS)
    """The networks."""
    batch_sizes: tuple[int, ...] | None = None
    """Of all networks; None: the reference recipe's, 64 for all_cnn, 4 for lenet5 and then 128."""
    frameworks: tuple[Family, ...] = ("jax", "pytorch", "pytorch-compile", "keras")
    """Who takes part, JAX always; PyTorch's contiguous and channels_last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    phases: tuple[Phase, ...] = PHASES
    """What is measured."""
    rounds: int = 7
    """Each backend is timed once a round."""
    seconds_per_round: float = 2.0
    """How long a backend runs in a round, one step at least."""
    timeout: float = 600.0
    """Seconds after which a backend that does not answer is left out."""


def measure(workload: Workload, backends: list[str], arguments: Arguments) -> dict[str, Any]:
    """{'environment', 'contenders': raw values by name, 'absent': reasons by name}.

    Raises: UserError if JAX fails.
    """
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}

    def ask(method: str, *args: Any) -> Iterator[tuple[str, Any]]:
        """(name, answer) of one backend after the other; one that fails takes no part any more."""
        for name in list(workers):
            try:
                answer = workers[name].call(method, *args)
            except Absent as reason:
                if name == "jax":
                    raise UserError(f"JAX must take part: {reason}") from reason
                print(f"{name} is absent: {reason}", file=sys.stderr)
                absent[name] = str(reason)
                workers.pop(name).close()
            else:
                yield name, answer

    try:
        workers["jax"] = Worker("jax", workload, None, arguments.timeout)
        jax_itself = dict(ask("describe"))["jax"]
        for name in backends[1:]:  # they start side by side, and are compiled one by one
            workers[name] = Worker(name, workload, jax_itself["platform"], arguments.timeout)
        results = {name: {"threads": answer["threads"], "phases": {}} for name, answer in ask("describe")}
        for phase in arguments.phases:
            for name, answer in ask("warm_up", phase, arguments.seconds_per_round):
                results[name]["phases"][phase] = answer | {"rounds": []}
        for _ in range(arguments.rounds):
            for phase in arguments.phases:
                for name, rate in ask("run_round", phase):
                    results[name]["phases"][phase]["rounds"].append(rate)
            workers = dict(reversed(workers.items()))  # else each would always follow the same one
        for name, peak in ask("peak_memory"):  # before the matrices
            results[name]["peak_memory_bytes"] = peak
        for size in MATRIX_SIZES.get(jax_itself["platform"], (4096, 8192)):
            for name, rate in ask("multiply", size):
                results[name].setdefault("matrix_products", {})[str(size)] = rate
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "environment": jax_itself["environment"],
        "contenders": {name: result for name, result in results.items() if name not in absent},
        "absent": absent,
    }


def summarize(workloads: dict[str, dict[str, Any]]) -> float:
    """Adds medians, JAX's ratios and shares of the matrix-product rate to measured workloads, and returns that rate.

    The rate, in FLOP/s, is the highest that any backend reached in any size: the device's practical limit.
    """
    everyone = [backend for workload in workloads.values() for backend in workload["contenders"].values()]
    limit = max(rate for backend in everyone for rate in backend["matrix_products"].values())
    for workload in workloads.values():
        backends = workload["contenders"]
        for backend in backends.values():
            for phase, values in backend["phases"].items():
                median = statistics.median(values["rounds"])
                values["images_per_second"] = median
                values["share_of_matrix_rate"] = round(median * workload["flops_per_image"][phase] / limit, 4)
        workload["best_pytorch"] = {}
        for phase in backends["jax"]["phases"]:
            medians = {name: values["phases"][phase]["images_per_second"] for name, values in backends.items()}
            pytorch = [name for name in medians if name.startswith("pytorch")]
            if pytorch:
                best = max(pytorch, key=medians.__getitem__)
                ratio = round(medians["jax"] / medians[best], 3)
                workload["best_pytorch"][phase] = {"contender": best, "jax_ratio": ratio}
    return limit


@command
def main() -> int:
    arguments = parse_arguments(Arguments, prog="python -m benchmarks.throughput")
    if min(arguments.rounds, *(arguments.batch_sizes or ()), arguments.seconds_per_round, arguments.timeout) <= 0:
        raise UserError("--rounds, --batch-sizes, --seconds-per-round and --timeout take numbers above 0")
    if not (arguments.models and arguments.phases):
        raise UserError("--models and --phases: name one or more")
    backends = [name for family in FAMILIES if family in {"jax", *arguments.frameworks} for name in FAMILIES[family]]
    sizes_of = lambda model: arguments.batch_sizes or default_batch_sizes(model)
    tasks = [(model, size) for model in arguments.models for size in sizes_of(model)]
    file = output_file(arguments.out, arguments.name)
    jax.config.update("jax_platforms", "cpu")  # this process only counts FLOPs: a GPU is all the workers'
    load_average = os.getloadavg()[0]
    workloads: dict[str, dict[str, Any]] = {}
    for model, batch_size in tasks:
        recipe, workload = create_workload(model, batch_size, arguments.dtype)
        measured = measure(workload, backends, arguments)
        environment = measured.pop("environment")
        name = f"{model}_batch{batch_size}"
        workloads[name] = {
            "model": model,
            "batch_size": batch_size,
            "recipe": recipe,
            "config": dataclasses.asdict(workload.plain),
            "config_augmented": dataclasses.asdict(workload.augmented),
            "flops_per_image": flops_per_image(workload.plain),
            **measured,
        }
        limit = summarize(workloads)
        content = {
            "command": describe_command("-m benchmarks.throughput", sys.argv[1:]),
            **environment,
            "load_average_before": load_average,
            "dtype": arguments.dtype,
            "rounds": arguments.rounds,
            "seconds_per_round": arguments.seconds_per_round,
            "flops": FLOPS,
            "matrix_flops_per_second": limit,
            "workloads": workloads,
        }
        write_result(file, content)
        for backend, values in workloads[name]["contenders"].items():
            rates = (f"{values['phases'][phase]['images_per_second']:12,.1f}" for phase in arguments.phases)
            print(f"{name:18} {backend:32} {' '.join(rates)} images/s ({', '.join(arguments.phases)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
