"""Benchmarks and reports; run from the repository's root as `python -m benchmarks.NAME`."""

from __future__ import annotations

import os
from pathlib import Path

from cifar_jax.errors import UserError


def output_file(folder: Path, name: str) -> Path:
    """FOLDER/NAME.json, the folder made: asked for before a measurement, so that its result can be written.

    Raises: UserError if it can't be, or `name` is none; OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if Path(name).name != name or path.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"can't write {path}: name another --out, and as --name a file's, without a folder")
    return path
