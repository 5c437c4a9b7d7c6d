"""What a layout on disk is: how it is found in a folder, and how its files become arrays."""

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
    """find(info, folder, named) → what to read there, or None; read(info, path) → arrays.

    `named` says that the user named the folder. files(info, path) are those that are read, in a fixed order;
    wanted(info) says in a few words what is looked for: nothing where the dataset has no such layout.
    """

    find: Callable[[Cifar, Path, bool], Path | None]
    read: Callable[[Cifar, Path], Arrays]
    files: Callable[[Cifar, Path], list[Path]]
    wanted: Callable[[Cifar], str]


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match, in the order of their names; none if it can't be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a file is of a format, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def read_regular(path: Path, limit: int, info: Cifar) -> bytes:
    """The bytes of a file of at most `limit`. Raises: UserError for any other, and what is no file, as a pipe."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a file: {info.advice}")
        if status.st_size > limit:
            raise UserError(f"{path}: has {status.st_size} bytes, too many for {info.title}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: {info.advice}") from error
