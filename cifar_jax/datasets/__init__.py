"""Registry of datasets: loads uint8 NHWC images and int32 labels by a dataset's name.

A dataset is one entry of DATASETS. Importing this module neither reads files nor imports readers.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from cifar_jax.datasets.cifar import CIFAR, IMAGE_SHAPE
from cifar_jax.datasets.digits import DIGITS
from cifar_jax.datasets.info import SPLITS, Dataset, DatasetInfo
from cifar_jax.errors import UserError

__all__ = [
    "DATASETS",
    "Dataset",
    "DatasetInfo",
    "check_dataset",
    "get_dataset",
    "hold_out",
    "load_dataset",
    "mix_classes",
]

DATASETS: dict[str, DatasetInfo] = {**CIFAR, DIGITS.name: DIGITS}


def get_dataset(name: str) -> DatasetInfo:
    """Returns a dataset's entry without loading it. Raises: UserError, listing the names, for an unknown name."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a dataset. Args: data_dir: its folder; None: the standard places (docs/data.md).

    Images that are sorted by class are mixed, see `mix_classes`.
    Raises: UserError, naming the file, if a file is incomplete or corrupt, or the download fails.
    """
    return mix_classes(get_dataset(name).load(data_dir))


def check_dataset(dataset: Dataset, name: str) -> None:
    """Checks that a dataset made by a program suits recipes for the registry's dataset `name`.

    Raises: UserError if its info is another, or if its arrays are not as Dataset describes them.
    """
    info = dataset.info
    if info.name != name:  # whose classes would be recorded
        raise UserError(f"the images are of {info.name}, and the recipe's dataset is {name}: set it to {info.name}")
    if info != get_dataset(name):
        raise UserError(f"the dataset's info differs from the registry's entry {name}: add an entry of another name")
    for split in SPLITS:
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE or not len(images):
            found = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"{split}_images are {found}: must be uint8 [N, 32, 32, 3], one or more, from 0 to 255")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            found = f"{labels.dtype} {list(labels.shape)}"
            raise UserError(f"{split}_labels are {found}: must be whole numbers [{len(images)}]")
        if labels.min() < 0 or labels.max() >= info.num_classes:
            found = f"{labels.min()} to {labels.max()}"
            raise UserError(f"{split}_labels are from {found}: must be from 0 to {info.num_classes - 1}")


def mix_classes(dataset: Dataset) -> Dataset:
    """Puts a split whose images are sorted by class into a random order, which is always the same.

    Parts of a split serve as samples of it: held-out images, those that give a normalised network its statistics. In a
    sorted split these would be images of one class.
    """
    changed: dict[str, Any] = {}
    for split in SPLITS:
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        if len(labels) > dataset.info.num_classes and (np.diff(labels) >= 0).all() and labels[0] < labels[-1]:
            order = np.random.default_rng(0).permutation(len(labels))
            changed |= {f"{split}_images": images[order], f"{split}_labels": labels[order]}
    return dataclasses.replace(dataset, **changed)


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Replaces the test set by the last `count` training images. Raises: UserError if no training image is left."""
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
