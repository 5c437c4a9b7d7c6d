"""From a dataset's name and a folder to uint8 NHWC images and int32 labels: a registry of datasets.

A dataset is one entry of DATASETS. Importing this module reads no file and imports no reader.
"""

from __future__ import annotations

import dataclasses
import os

from cifar_jax.datasets.cifar import CIFAR
from cifar_jax.datasets.digits import DIGITS
from cifar_jax.datasets.info import Dataset, DatasetInfo
from cifar_jax.errors import UserError

__all__ = ["DATASETS", "Dataset", "DatasetInfo", "get_dataset", "hold_out", "load_dataset"]

DATASETS: dict[str, DatasetInfo] = {**CIFAR, DIGITS.name: DIGITS}


def get_dataset(name: str) -> DatasetInfo:
    """The registry's entry of that name, without loading it. Raises: UserError, with the choices, for any other."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a dataset of the registry; docs/data.md says where it is looked for.

    Raises: UserError, naming the file, for a file that is short or corrupt, or when the download fails.
    """
    return get_dataset(name).load(data_dir)


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Splits the last `count` training images off as the test set. Raises: UserError if that leaves none."""
    if count == 0:
        return dataset
    kept = len(dataset.train_labels) - count
    if kept < 1:
        raise UserError(f"--holdout {count}: there are only {len(dataset.train_labels)} training images")
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:kept],
        train_labels=dataset.train_labels[:kept],
        test_images=dataset.train_images[kept:],
        test_labels=dataset.train_labels[kept:],
    )
