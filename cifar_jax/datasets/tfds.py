"""CIFAR as TensorFlow Datasets prepares it in ArrayRecord files, which are read without TensorFlow."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from cifar_jax.datasets.cifar import IMAGE_SHAPE, Cifar
from cifar_jax.datasets.info import SPLITS, Arrays
from cifar_jax.datasets.layout import Layout
from cifar_jax.errors import UserError


def find(info: Cifar, folder: Path, named: bool) -> Path | None:
    """The folder of the dataset's version, in or above which `folder` may be."""
    name, version = info.tfds.split("/")
    for place in (folder, folder / version, folder / name / version):
        if os.path.isfile(place / "dataset_info.json") and place.absolute().parts[-2:] == (name, version):
            if any(place.glob(f"{name}-train.array_record*")):
                return place
            # TFDS' default format; only TensorFlow reads it, and we don't depend on TensorFlow.
            message = f"{place}: it holds TFRecord files; prepare it with file_format='array_record'"
            if named:
                raise UserError(message)
            print(f"passing over {message}", file=sys.stderr)
    return None


def read(info: Cifar, path: Path) -> Arrays:
    """The folder of a version to arrays, in the order of the examples' ids. Raises: UserError."""
    try:  # here: importing them costs a second, and a cached start does not need it
        import array_record.python.array_record_module  # noqa: F401  # not on every platform; TFDS reads with it
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"{path}: reading it needs tensorflow-datasets and array-record ({error}): install them, or name an "
            "official archive with --data-dir"
        ) from error
    arrays: Arrays = {}
    for split in SPLITS:
        try:
            source = tfds.data_source(
                info.tfds.replace("/", ":"), split=split, data_dir=path.absolute().parents[1], download=False
            )
            # TFDS shuffles; the ids (train_00000, …) number the examples as they were read from their origin.
            examples = sorted(source.__getitems__(range(len(source))), key=lambda example: example["id"])
            images = np.stack([example["image"] for example in examples])
            labels = np.array([example[info.tfds_label] for example in examples])
        except Exception as error:  # the readers below TFDS raise whatever they like for a damaged file
            shard = _damaged_shard(info, path, split)
            raise UserError(f"{shard}: can't read the {split} split ({error}): prepare the folder anew") from error
        if images.shape != (info.size(split), *IMAGE_SHAPE):
            raise UserError(
                f"{path}: the {split} split has {len(images)} of {info.size(split)} images: prepare it anew"
            )
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
    return arrays


def _files(info: Cifar, path: Path) -> list[Path]:
    return [path / "dataset_info.json", *sorted(path.glob(f"{info.tfds.partition('/')[0]}-*.array_record*"))]


LAYOUT = Layout(find, read, _files, lambda info: f"{info.tfds} of TFDS")


def _damaged_shard(info: Cifar, folder: Path, split: str) -> Path:
    """The file that can't be read, which the readers' messages do not name; the folder if each can be."""
    from array_record.python.array_record_module import ArrayRecordReader

    for shard in sorted(folder.glob(f"{info.tfds.partition('/')[0]}-{split}.array_record*")):
        try:
            ArrayRecordReader(str(shard)).read_all()
        except Exception:  # a C++ status, as RuntimeError or ValueError
            return shard
    return folder
