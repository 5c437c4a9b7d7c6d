"""Benchmarks and reports; run from the repository's root as `python -m benchmarks.NAME`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError
from cifar_jax.io import made_folder, write_json


def output_file(folder: Path, name: str) -> Path:
    """FOLDER/NAME.json: asked for before a measurement, so that its result can be written. See `write_result`.

    Raises: UserError if it can't be, or `name` is none; OSError.
    """
    path = folder / f"{name}.json"
    with made_folder(folder):
        if Path(name).name != name or path.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"can't write {path}: name another --out, and as --name a file's, without a folder")
    return path


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Writes a measurement's JSON, and makes its folder: not before, so that a refused command leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
