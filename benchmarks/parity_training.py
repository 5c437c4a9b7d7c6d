"""Parity for benchmarks.accuracy: trains a reference recipe in JAX and PyTorch and compares mean accuracies."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import jax
import scipy.stats

from benchmarks.pytorch_training import train_in_pytorch, unsupported_fields, with_pytorch_on_cpu
from benchmarks.seeds import Arguments, Stop, configure, origin, spread, train_in_jax
from benchmarks.workloads import reference_recipe
from cifar_jax.datasets import load_dataset
from cifar_jax.errors import UserError
from cifar_jax.weights import pytorch

TRAINERS = {"jax": train_in_jax, "pytorch": train_in_pytorch}


def compare(accuracies: dict[str, list[float]]) -> dict[str, Any]:
    """Computes mean, standard deviation (n - 1) and Welch's t-test from the last test accuracies by framework.

    The test's results are None if all seeds of each framework have the same accuracy.
    """
    results: dict[str, Any] = {name: spread(values) for name, values in accuracies.items()}
    statistics: dict[str, Any] = {"confidence_interval_95": None, "p_value": None}
    if any(len(set(values)) > 1 for values in accuracies.values()):
        test = scipy.stats.ttest_ind(accuracies["jax"], accuracies["pytorch"], equal_var=False)
        interval = [float(bound) for bound in test.confidence_interval(0.95)]
        statistics = {"confidence_interval_95": interval, "p_value": float(test.pvalue)}
    difference = results["jax"]["mean"] - results["pytorch"]["mean"]
    return results | {"difference": difference} | statistics


def _check(arguments: Arguments, recipe: str) -> bool:
    """Checks the flags. Returns: whether both frameworks are to be trained. Raises: UserError."""
    if arguments.dtype == "bfloat16":
        raise UserError("--dtype bfloat16: --parity compares in float32, as the notebook computes")
    if len(set(arguments.frameworks)) < max(1, len(arguments.frameworks)):
        raise UserError(f"--frameworks {' '.join(arguments.frameworks)}: name one or more, each once")
    compared = set(arguments.frameworks) == set(TRAINERS)
    if compared and len(set(arguments.seeds)) < 2:
        raise UserError("--seeds: a comparison needs two or more seeds")
    fields = unsupported_fields(configure(arguments, recipe, "", 0))
    if fields:
        raise UserError(f"--parity: training {recipe} in PyTorch does not support {', '.join(fields)}")
    if "pytorch" in arguments.frameworks:
        pytorch.import_torch()  # fails now and not after JAX's first run
    return compared


def run_parity(arguments: Arguments, model: str, stop: Stop) -> dict[str, Any] | None:
    """Returns the content of parity_MODEL.json; None if only one framework was trained.

    Raises: UserError for flags that can't be compared; Interrupted.
    """
    recipe = reference_recipe(model)
    compared = _check(arguments, recipe)
    config = configure(arguments, recipe, "", 0)
    dataset = load_dataset(config.dataset, arguments.data_dir)
    all_runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.frameworks}
    for seed in arguments.seeds:
        for name in arguments.frameworks:
            run = configure(arguments, recipe, f"parity_{model}/{name}_seed{seed}", seed)
            with jax.default_matmul_precision("highest"):  # otherwise NVIDIA GPUs use TensorFloat-32
                all_runs[name].append(TRAINERS[name](run, dataset, stop))
    if not compared:
        return None
    curves = {
        name: [[row["test_accuracy"] for row in run["metrics"]] for run in runs] for name, runs in all_runs.items()
    }
    trained = origin(all_runs["jax"])  # PyTorch's runs do not store theirs
    trained["versions"]["torch"] = importlib.metadata.version("torch")
    result = compare({name: [run[-1] for run in runs] for name, runs in curves.items()})
    p = "none, as no seed differs" if result["p_value"] is None else f"{result['p_value']:.2f}"
    print(f"difference {result['difference']:+.2%}, p = {p}")
    return {
        "recipe": recipe,
        "dataset": config.dataset,
        "num_epochs": config.num_epochs,
        **with_pytorch_on_cpu(trained),
        "seeds": list(arguments.seeds),
        "test_accuracy_by_epoch": curves,
        "last_epoch": result,
    }
