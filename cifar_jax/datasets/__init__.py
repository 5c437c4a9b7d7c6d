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
    "check_images",
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


def check_images(images: Any, name: str = "images") -> None:
    """Raises: UserError, with the name, unless the images are an array, uint8 [N, 32, 32, 3]."""
    if _form(images)[0] != "uint8" or images.shape[1:] != IMAGE_SHAPE:
        raise UserError(f"{name} {' '.join(_form(images)).rstrip()}: must be uint8 [N, 32, 32, 3]")


def check_dataset(dataset: Dataset, name: str, holdout: int) -> None:
    """Checks that a dataset made by a program suits recipes for `name` that hold out this many images.

    Raises: UserError if its info is not the registry's of this name, its arrays are not as Dataset describes them, or
    there are no test images and none are held out.
    """
    info = dataset.info
    if info.name != name:  # whose classes would be recorded
        raise UserError(f"the images are of {info.name}, and the recipe's dataset is {name}: set it to {info.name}")
    if info != get_dataset(name):
        raise UserError(f"the dataset's info differs from the registry's entry {name}: add an entry of another name")
    for split in SPLITS:
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        check_images(images, f"{split}_images")
        kind, shape = _form(labels)
        if not kind.startswith(("int", "uint")) or labels.shape != images.shape[:1]:
            found = f"{kind} {shape}".rstrip()
            raise UserError(f"{split}_labels {found}: must be a NumPy array of whole numbers [{len(images)}]")
        if not len(images):
            if split == "test" and holdout:
                continue
            raise UserError(f"there are no {split} images: give some, or a recipe with holdout for test images")
        if labels.min() < 0 or labels.max() >= info.num_classes:
            found = f"{labels.min()} to {labels.max()}"
            raise UserError(f"{split}_labels are from {found}: must be from 0 to {info.num_classes - 1}")


def _form(array: Any) -> tuple[str, str]:
    """Returns an array's type and shape, or another object's class."""
    if hasattr(array, "dtype") and hasattr(array, "shape"):
        return str(array.dtype), str(list(array.shape))
    return type(array).__name__, ""


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
