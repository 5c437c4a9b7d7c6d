"""Reads CIFAR from one .npz file with Keras' names: x_train, y_train, x_test, y_test."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from cifar_jax.datasets.cifar import IMAGE_SHAPE, Cifar
from cifar_jax.datasets.info import SPLITS, Arrays
from cifar_jax.datasets.layout import Layout, starts_with
from cifar_jax.errors import UserError

_STEP = 2**20


def find(info: Cifar, folder: Path, named: bool) -> Path | None:
    """Returns the .npz file that the user named, or NAME.npz in the folder that the user named."""
    for path in (folder, folder / f"{info.name}.npz") if named else ():
        if os.path.isfile(path) and starts_with(path, b"PK\3\4"):
            return path
    return None


def read(info: Cifar, path: Path) -> Arrays:
    """Reads images, uint8 [N, 32, 32, 3], and labels of any integer type, [N] or [N, 1]. Raises: UserError."""
    arrays: Arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith(".npy") for name in archive.namelist()):
                raise UserError(f"{path}: a zip archive, not a .npz file: unpack it and name the folder")
            for split in SPLITS:
                count = info.size(split)
                arrays[f"{split}_images"] = _read_array(archive, f"x_{split}", [(count, *IMAGE_SHAPE)], "u")
                labels = _read_array(archive, f"y_{split}", [(count,), (count, 1)], "iu")
                arrays[f"{split}_labels"] = labels.reshape(count)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error)[:200].split()) or type(error).__name__
        raise UserError(f"{path}: not {info.title} as a .npz file ({reason}): write the file again") from error
    return arrays


LAYOUT = Layout(find, read, lambda info, path: [path], lambda info: f"{info.name}.npz")


def _read_array(archive: zipfile.ZipFile, name: str, shapes: list[tuple[int, ...]], kinds: str) -> np.ndarray:
    """Reads an array of one of these shapes and dtype kinds. Both are checked before memory is allocated."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack more than requested
        raise ValueError(f"{name} has a compression that NumPy does not use")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"{name} has an unknown version of NumPy's format")
        if shape not in shapes or fortran_order or dtype.kind not in kinds:
            raise ValueError(f"{name} has a wrong shape, order or type: {shape}, {dtype}"[:200])
        if dtype.kind == kinds == "u" and dtype != np.uint8:
            raise ValueError(f"{name} has type {dtype}, must be uint8")
        data = _read_exactly(file, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def _read_exactly(file: IO[bytes], size: int) -> bytearray:
    """Reads a member to its end, which verifies its checksum. Raises: ValueError if it does not have `size` bytes."""
    data = bytearray()
    while len(data) <= size and (part := file.read(_STEP)):
        data += part
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes instead of {size}")
    return data
