"""Measures training and inference throughput of JAX, PyTorch and Keras, and their share of the matrix-product rate.

python -m benchmarks.throughput --out DIR [--models …] [--batch-sizes …] [--frameworks …] [--dtype bfloat16] …

Each backend has its own process. Backends are compiled and warmed up one by one. Then they take turns in alternating
order, phase by phase and round by round, so that a drift of the machine's speed affects all alike. Training is the
whole loop: gather batches from uint8 images on the device by a shuffled order, scale, augment, forward with dropout,
backward, update. Inference is the whole evaluation: gather, scale, forward, loss, number of correct predictions.
DIR/NAME.json gets medians over the rounds and is rewritten after each workload. It names backends that fail, with the
reason. The file calls backends "contenders" for compatibility with earlier results.

Measure on an idle machine: if other processes compute, PyTorch's OpenMP threads wait for each other, which slows
PyTorch down tenfold.
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

MATRIX_SIZES = {"cpu": (1024, 2048)}  # on other platforms 4096 and 8192
FLOPS = "forward: sum over layers of 2·H_out·W_out·kh·kw·I·O (dense: 2·I·O); training: 3·forward - first layer's"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures training and inference in images per second, in JAX, PyTorch and Keras."""

    out: Path
    """Folder for the JSON file."""
    name: str = "throughput"
    """Name of the JSON file without .json."""
    models: tuple[ModelName, ...] = tuple(MODELS)
    """Networks."""
    batch_sizes: tuple[int, ...] | None = None
    """Batch sizes for all networks; None: 64 for all_cnn, 4 and 128 for lenet5."""
    frameworks: tuple[Family, ...] = ("jax", "pytorch", "pytorch-compile", "keras")
    """Frameworks to measure. JAX is always included. PyTorch runs contiguous and channels_last."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation type. Parameters stay float32."""
    phases: tuple[Phase, ...] = PHASES
    """Phases to measure."""
    rounds: int = 7
    """Number of rounds. Each backend is timed once per round."""
    seconds_per_round: float = 2.0
    """Seconds per backend and round, at least one step."""
    timeout: float = 600.0
    """Seconds after which a backend that does not respond is dropped."""


def measure(workload: Workload, backends: list[str], arguments: Arguments) -> dict[str, Any]:
    """Returns {'environment', 'contenders': raw values by name, 'absent': reasons by name}.

    Raises: UserError if JAX fails.
    """
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}

    def ask(method: str, *args: Any) -> Iterator[tuple[str, Any]]:
        """Yields (name, answer) of each backend in turn, and drops backends that fail."""
        for name in list(workers):
            try:
                answer = workers[name].call(method, *args)
            except Absent as reason:
                if name == "jax":
                    raise UserError(f"the JAX backend failed: {reason}") from reason
                print(f"{name} is left out: {reason}", file=sys.stderr)
                absent[name] = str(reason)
                workers.pop(name).close()
            else:
                yield name, answer

    try:
        workers["jax"] = Worker("jax", workload, None, arguments.timeout)
        jax_itself = dict(ask("describe"))["jax"]
        for name in backends[1:]:  # all start in parallel, then compile one by one
            workers[name] = Worker(name, workload, jax_itself["platform"], arguments.timeout)
        results = {name: {"threads": answer["threads"], "phases": {}} for name, answer in ask("describe")}
        for phase in arguments.phases:
            for name, answer in ask("warm_up", phase, arguments.seconds_per_round):
                results[name]["phases"][phase] = answer | {"rounds": []}
        for _ in range(arguments.rounds):
            for phase in arguments.phases:
                for name, rate in ask("run_round", phase):
                    results[name]["phases"][phase]["rounds"].append(rate)
            workers = dict(reversed(workers.items()))  # otherwise each would always follow the same backend
        for name, peak in ask("peak_memory"):  # before the matrix products
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
    """Adds medians, JAX's ratios and shares of the matrix-product rate to measured workloads.

    Returns: the rate in FLOP/s, the highest of any backend and matrix size, as the device's practical limit.
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
        raise UserError("--rounds, --batch-sizes, --seconds-per-round and --timeout must be above 0")
    if not (arguments.models and arguments.phases):
        raise UserError("--models and --phases must each name one or more")
    backends = [name for family in FAMILIES if family in {"jax", *arguments.frameworks} for name in FAMILIES[family]]
    sizes_of = lambda model: arguments.batch_sizes or default_batch_sizes(model)
    tasks = [(model, size) for model in arguments.models for size in sizes_of(model)]
    file = output_file(arguments.out, arguments.name)
    jax.config.update("jax_platforms", "cpu")  # this process only counts FLOPs and leaves a GPU to the workers
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
        write_result(file, content, complete=len(workloads) == len(tasks))
        for backend, values in workloads[name]["contenders"].items():
            rates = (f"{values['phases'][phase]['images_per_second']:12,.1f}" for phase in arguments.phases)
            print(f"{name:18} {backend:32} {' '.join(rates)} images/s ({', '.join(arguments.phases)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
