"""Benchmarks and reports. Run them from the repository root: python -m benchmarks.NAME"""

from __future__ import annotations

import os
from pathlib import Path

from cifar_jax.errors import UserError


def output_file(folder: Path, name: str) -> Path:
    """Returns FOLDER/NAME.json and creates the folder. Called before a measurement, so that its result can be saved.

    Raises: UserError if the file can't be written or `name` is not a file name; OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if Path(name).name != name or path.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"can't write {path}: name another --out, or a --name without a folder")
    return path
