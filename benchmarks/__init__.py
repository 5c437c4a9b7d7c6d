"""Benchmarks and reports. Run them from the repository root: python -m benchmarks.NAME"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError
from cifar_jax.io import made_folder, write_json


def output_file(folder: Path, name: str) -> Path:
    """Returns FOLDER/NAME.json. Called before a measurement, so that `write_result` can save its result.

    Raises: UserError if the file can't be written or `name` is not a file name; OSError.
    """
    path = folder / f"{name}.json"
    refusal = UserError(f"can't write {path}: name another --out, or a --name without a folder")
    try:
        with made_folder(folder):
            if Path(name).name != name or path.is_dir():
                raise refusal
    except PermissionError as error:
        raise refusal from error
    return path


def write_result(path: Path, content: dict[str, Any], complete: bool = True) -> None:
    """Writes a measurement's JSON, and makes its folder: not before, so that a refused command leaves none.

    A measurement that is not complete goes to FILE.json.partial, so that an interrupted one replaces no earlier result.
    """
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path if complete else partial, content)
    if complete:
        partial.unlink(missing_ok=True)
