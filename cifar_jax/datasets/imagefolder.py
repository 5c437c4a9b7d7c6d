"""Reads CIFAR from folders of PNG files: train/CLASS/*.png and test/CLASS/*.png."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from cifar_jax.datasets.cifar import IMAGE_SHAPE, Cifar
from cifar_jax.datasets.info import SPLITS, Arrays
from cifar_jax.datasets.layout import Layout, read_regular
from cifar_jax.datasets.png import SIZE_LIMIT, decode_png
from cifar_jax.errors import UserError


def find(info: Cifar, folder: Path, named: bool) -> Path | None:
    """Returns the folder if the user named it. Elsewhere a folder `train` could be anything."""
    return folder if named and all(_classes(folder / split) for split in SPLITS) else None


def read(info: Cifar, path: Path) -> Arrays:
    """Reads images in the order of the classes, and of the file names in each class (see mix_classes).

    Raises: UserError.
    """
    arrays: Arrays = {}
    for split in SPLITS:
        classes = _classes(path / split)
        if different := sorted(set(classes) ^ set(info.class_names)):
            raise UserError(
                f"{path / split}: its folders must be the classes of {info.title}: {different[0]} is "
                f"{'missing' if different[0] in info.class_names else 'not a class'}"
            )
        files = [(label, file) for label, name in enumerate(info.class_names) for file in _pngs(path / split / name)]
        if len(files) != info.size(split):
            raise UserError(f"{path / split}: has {len(files)} of {info.size(split)} PNG files: add the missing files")
        images = np.empty((len(files), *IMAGE_SHAPE), np.uint8)
        for i, (_, file) in enumerate(files):
            try:
                images[i] = decode_png(read_regular(file, SIZE_LIMIT, info))
            except ValueError as error:
                raise UserError(f"{file}: {error}") from error
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = np.array([label for label, _ in files])
    return arrays


def _classes(folder: Path) -> list[str]:
    """Returns the visible subfolders; [] if the folder can't be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []


def _pngs(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [folder / name for name in sorted(names) if name.lower().endswith(".png") and not name.startswith(".")]


def _files(info: Cifar, path: Path) -> list[Path]:
    return [file for split in SPLITS for name in _classes(path / split) for file in _pngs(path / split / name)]


LAYOUT = Layout(find, read, _files, lambda info: "train/CLASS/*.png and test/CLASS/*.png")
