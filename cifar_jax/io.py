"""Atomic file writes, so that a crash or a reader never sees half a file, and JSON files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError


def user_path(path: str | os.PathLike[str], name: str = "") -> Path:
    """With ~ and ~user replaced. Raises: UserError, with the `name` of the setting, if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        if os.path.lexists(path):
            return Path(path)  # a file whose own name begins with ~
        setting = f"{name} " if name else ""
        raise UserError(f"{setting}{path}: there is no such home folder: write the path without ~") from error


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents. At the end those that it made and that are empty are removed.

    Raises: OSError, also if nothing can be written to the folder.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_new_file(path: Path) -> None:
    """Checks that a file can be created. Raises: UserError if it exists, or its folder is missing or read-only."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists: name another file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} does not exist: create it")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: nothing can be written to the folder {path.parent}: name another folder")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file atomically: after a crash either the old or the new content is there.

    Raises: UserError if the file can't be written.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()  # it may be the file that fills the disk
        if not isinstance(error, OSError):
            raise
        raise UserError(f"can't write {path}: {error.strerror}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an indented JSON object atomically. Raises: UserError; ValueError if a number is not finite."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises: OSError if the file can't be read; ValueError if it holds no JSON object or one nested too deeply.
    """
    try:
        content = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content
