"""Reads CIFAR in Hugging Face's layout: parquet files with PNG files in the column `img`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from cifar_jax.datasets.cifar import Cifar
from cifar_jax.datasets.info import SPLITS, Arrays
from cifar_jax.datasets.layout import Layout, matching, starts_with
from cifar_jax.datasets.records import read_records
from cifar_jax.errors import UserError


def find(info: Cifar, folder: Path, named: bool) -> Path | None:
    """Returns the parquet files' folder: the folder that the user named, or a subfolder of it."""
    if named and os.path.isfile(folder) and starts_with(folder, b"PAR1"):
        raise UserError(f"{folder}: name the folder of all train-*.parquet and test-*.parquet files, not one of them")
    places = (folder / info.hugging_face, folder) if named else ()
    return next((place for place in places if matching(place, "train-*.parquet")), None)


def read(info: Cifar, path: Path) -> Arrays:
    """Reads images in the order of the file names and of the rows in each file. Raises: UserError."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: reading parquet files needs pyarrow: pip install pyarrow")
    arrays: Arrays = {}
    for split in SPLITS:
        files = matching(path, f"{split}-*.parquet")
        try:
            images, labels, _ = read_records(
                {"kind": "parquet", "files": [str(file) for file in files], "label": info.hugging_face_label},
                files,
                info.size(split),
            )
        except ValueError as error:
            place = files[0] if len(files) == 1 else path
            raise UserError(f"{place}: can't read the {split} split ({error}): download it again") from error
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
    return arrays


LAYOUT = Layout(
    find,
    read,
    lambda info, path: matching(path, "*.parquet"),
    lambda info: str(Path(info.hugging_face, "{train,test}-*.parquet")),
)
