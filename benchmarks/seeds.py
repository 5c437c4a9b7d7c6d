"""Shared by the modes of benchmarks.accuracy: flags, one run per seed, and statistics of the runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config, DatasetName, ModelName
from cifar_jax.datasets import Dataset
from cifar_jax.errors import UserError
from cifar_jax.outcomes import FailedTraining
from cifar_jax.train import train_and_evaluate

Framework = Literal["jax", "pytorch"]
Stop = Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures accuracy over seeds. Give --recipe, --ablation or --parity."""

    out: Path
    """Folder for the JSON file."""
    name: str | None = None
    """Name of the JSON file without .json; None: {accuracy,ablation,parity}_NAME, with _DTYPE if --dtype is given."""
    recipe: str | None = None
    """Train this recipe with every seed."""
    ablation: str | None = None
    """Train this recipe and its variants, and test on 5,000 held-out training images."""
    parity: ModelName | None = None
    """Train this network's reference recipe in JAX and PyTorch, and compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    frameworks: tuple[Framework, ...] = ("jax", "pytorch")
    """Frameworks of --parity. With only one, nothing is compared and no JSON is written."""
    runs: Path = Path("runs")
    """Folder of the runs, which resume from it."""
    num_epochs: int | None = None
    """Number of epochs; None: the recipe's."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Computation type; None: the recipe's. Another type needs other --runs."""
    dataset: DatasetName | None = None
    """Dataset; None: the recipe's."""
    data_dir: str | None = None
    """Folder of the dataset; None: the standard places (docs/data.md)."""


def configure(arguments: Arguments, recipe: str, workdir: str, seed: int, **changes: Any) -> Config:
    """Returns the config of one run of this command. Raises: UserError for an unknown recipe."""
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    num_epochs = RECIPES[recipe].num_epochs if arguments.num_epochs is None else arguments.num_epochs
    share = num_epochs / RECIPES[recipe].num_epochs  # a shorter run also has fewer epochs of each image size
    rounded = [(size, round(share * epochs)) for size, epochs in RECIPES[recipe].image_sizes]
    sizes = tuple((size, epochs) for size, epochs in rounded if epochs)
    return dataclasses.replace(
        RECIPES[recipe],
        workdir=str(arguments.runs / workdir),
        seed=seed,
        num_epochs=num_epochs,
        dtype=arguments.dtype or RECIPES[recipe].dtype,
        dataset=arguments.dataset or RECIPES[recipe].dataset,
        data_dir=arguments.data_dir,
        **{"image_sizes": sizes} | changes,
    )


def train_in_jax(config: Config, dataset: Dataset, stop: Stop) -> dict[str, Any]:
    """Runs train_and_evaluate. Raises: UserError for a diverged run: a mean over the other seeds would be biased.

    A stalled run continues with a warning and counts in the mean.
    """
    try:
        return train_and_evaluate(config, dataset, stop)
    except FailedTraining as failed:
        raise UserError(f"seed {config.seed}: {failed.what}: change the recipe") from failed


def spread(values: list[float]) -> dict[str, Any]:
    """Returns {'mean', 'std': standard deviation (n - 1), None for one value, 'n'}."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}


def origin(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Combines 'hardware', 'versions' and 'date' of runs, which may have been made by other processes."""
    versions = {
        name: {summary["versions"].get(name, "none") for summary in summaries} for name in summaries[0]["versions"]
    }
    return {
        "hardware": "; ".join(sorted({summary["hardware"] for summary in summaries})),
        "versions": {name: " and ".join(sorted(values)) for name, values in versions.items()},
        "date": " and ".join(sorted({summary["date"] for summary in summaries})),
    }
