"""A dataset's layout on disk: how to find it in a folder and how to read it."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable
from pathlib import Path

from cifar_jax.datasets.cifar import Cifar
from cifar_jax.datasets.info import Arrays
from cifar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Functions of a layout.

    find(info, folder, named) returns the path to read, or None; `named` tells whether the user named the folder.
    read(info, path) returns arrays. files(info, path) returns the files that are read, in a fixed order. wanted(info)
    describes the files in a few words, for messages; where it is empty, the layout is not named there.
    """

    find: Callable[[Cifar, Path, bool], Path | None]
    read: Callable[[Cifar, Path], Arrays]
    files: Callable[[Cifar, Path], list[Path]]
    wanted: Callable[[Cifar], str]


def matching(folder: Path, pattern: str) -> list[Path]:
    """Returns the matching files of a folder, sorted by name; [] if it can't be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def starts_with(path: Path, magic: bytes) -> bool:
    """Tells whether a file begins with a format's magic bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def read_regular(path: Path, limit: int, info: Cifar) -> bytes:
    """Reads a regular file of at most `limit` bytes. Raises: UserError if it is larger or not a regular file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file: {info.advice}")
        if status.st_size > limit:
            raise UserError(f"{path}: {status.st_size} bytes are too many for {info.title}: {info.advice}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: {info.advice}") from error
