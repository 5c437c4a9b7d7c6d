"""CIFAR as TensorFlow Datasets prepares it in ArrayRecord files, which are read without TensorFlow."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from cifar_jax.datasets.cifar import Cifar
from cifar_jax.datasets.info import SPLITS, Arrays
from cifar_jax.datasets.layout import Layout, matching
from cifar_jax.datasets.records import read_records
from cifar_jax.errors import UserError


def find(info: Cifar, folder: Path, named: bool) -> Path | None:
    """The folder of the dataset's version, in or above which `folder` may be."""
    if not info.tfds:
        return None
    name, version = info.tfds.split("/")
    for place in (folder, folder / version, folder / name / version):
        if os.path.isfile(place / "dataset_info.json") and place.absolute().parts[-2:] == (name, version):
            if matching(place, f"{name}-train.array_record*"):
                return place
            # TFDS' default format; only TensorFlow reads it, and we don't depend on TensorFlow.
            message = f"{place}: it holds TFRecord files; prepare it with file_format='array_record'"
            if named:
                raise UserError(message)
            print(f"passing over {message}", file=sys.stderr)
    return None


def read(info: Cifar, path: Path) -> Arrays:
    """The folder of a version to arrays, in the order of the examples' ids. Raises: UserError."""
    for package in ("tensorflow_datasets", "array_record"):  # the latter is not on every platform
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
            raise UserError(f"{path}: can't read the {split} split ({error}): prepare the folder anew") from error
        # TFDS shuffles; the ids (train_00000, …) number the examples as they were read from their origin.
        order = sorted(range(len(ids)), key=ids.__getitem__)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[order], labels[order]
    return arrays


def _files(info: Cifar, path: Path) -> list[Path]:
    return [path / "dataset_info.json", *matching(path, f"{info.tfds.partition('/')[0]}-*.array_record*")]


LAYOUT = Layout(find, read, _files, lambda info: info.tfds and f"{info.tfds} of TFDS")
