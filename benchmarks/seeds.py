"""What the modes of benchmarks.accuracy share: their flags, a training for each seed, and what is said of them."""

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
from cifar_jax.train import train_and_evaluate
from cifar_jax.training import FailedTraining

Framework = Literal["jax", "pytorch"]
Stop = Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Accuracy over seeds: name a --recipe, an --ablation or a --parity."""

    out: Path
    """Folder for the JSON."""
    name: str | None = None
    """Name of the JSON file, without .json; None: accuracy_, ablation_ or parity_ and what was named, and --dtype."""
    recipe: str | None = None
    """Train this recipe with every seed."""
    ablation: str | None = None
    """Train this recipe and its variants with 5,000 training images held out."""
    parity: ModelName | None = None
    """Train this model's reference recipe in JAX and in PyTorch, and compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of every training."""
    frameworks: tuple[Framework, ...] = ("jax", "pytorch")
    """Of --parity. With one of them nothing is compared and no JSON written: to divide the work."""
    runs: Path = Path("runs")
    """Where the trainings are kept, and resumed from."""
    num_epochs: int | None = None
    """None: the recipe's."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation; None: the recipe's. Another one needs other --runs."""
    dataset: DatasetName | None = None
    """The data; None: the recipe's."""
    data_dir: str | None = None
    """Where to look for the dataset first."""


def configure(arguments: Arguments, recipe: str, workdir: str, seed: int, **changes: Any) -> Config:
    """A recipe for one training of this command. Raises UserError for an unknown one."""
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    num_epochs = RECIPES[recipe].num_epochs if arguments.num_epochs is None else arguments.num_epochs
    share = num_epochs / RECIPES[recipe].num_epochs  # a shorter training has fewer epochs of each image size, too
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
    """train_and_evaluate, but a diverged training is a UserError: a mean of the seeds that are left would be too good.

    One that is stalled goes on, with a warning, and counts in the mean.
    """
    try:
        return train_and_evaluate(config, dataset, stop)
    except FailedTraining as failed:
        raise UserError(f"seed {config.seed}: {failed.what}: change the recipe") from failed


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1; None for one value) and number of accuracies."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}


def origin(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the trainings, which other processes may have made: their 'hardware', 'versions' and 'date'."""
    versions = {
        name: {summary["versions"].get(name, "none") for summary in summaries} for name in summaries[0]["versions"]
    }
    return {
        "hardware": "; ".join(sorted({summary["hardware"] for summary in summaries})),
        "versions": {name: " and ".join(sorted(values)) for name, values in versions.items()},
        "date": " and ".join(sorted({summary["date"] for summary in summaries})),
    }
