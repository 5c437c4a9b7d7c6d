"""Reads CIFAR as prepared by TensorFlow Datasets in ArrayRecord files, without TensorFlow."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from cifar_jax.console import say
from cifar_jax.datasets.cifar import Cifar
from cifar_jax.datasets.info import SPLITS, Arrays
from cifar_jax.datasets.layout import Layout, matching
from cifar_jax.datasets.records import read_records
from cifar_jax.errors import UserError


def find(info: Cifar, folder: Path, named: bool) -> Path | None:
    """Returns the folder NAME/VERSION: `folder` itself or below it."""
    if not info.tfds:
        return None
    name, version = info.tfds.split("/")
    for place in (folder, folder / version, folder / name / version):
        if os.path.isfile(place / "dataset_info.json") and place.absolute().parts[-2:] == (name, version):
            if matching(place, f"{name}-train.array_record*"):
                return place
            # TFRecord is TFDS' default format. Reading it needs TensorFlow, which this package does not depend on.
            message = f"{place}: TFRecord files can't be read: prepare the dataset with file_format='array_record'"
            if named:
                raise UserError(message)
            say(f"note: skipped {message}", error=True)
    return None


def read(info: Cifar, path: Path) -> Arrays:
    """Reads a version's folder in the order of the examples' ids. Raises: UserError."""
    for package in ("tensorflow_datasets", "array_record"):  # array_record is not available on every platform
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{path}: reading it needs tensorflow-datasets and array-record: install them, or name an official "
                "archive with --data-dir"
            )
    name = info.tfds.partition("/")[0]
    arrays: Arrays = {}
    for split in SPLITS:
        request = {"kind": "tfds", "name": info.tfds.replace("/", ":"), "split": split, "label": info.tfds_label}
        files = matching(path, f"{name}-{split}.array_record*")
        try:
            images, labels, ids = read_records(
                {**request, "folder": str(path.absolute().parents[1])}, files, info.size(split)
            )
        except ValueError as error:
            raise UserError(f"{path}: can't read the {split} split ({error}): prepare the dataset again") from error
        # TFDS shuffles the examples. Their ids (train_00000, …) give the order in which TFDS read them.
        order = sorted(range(len(ids)), key=ids.__getitem__)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[order], labels[order]
    return arrays


def _files(info: Cifar, path: Path) -> list[Path]:
    return [path / "dataset_info.json", *matching(path, f"{info.tfds.partition('/')[0]}-*.array_record*")]


LAYOUT = Layout(find, read, _files, lambda info: info.tfds and f"{info.tfds} of TFDS")
