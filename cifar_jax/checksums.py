"""Detects damaged files in a folder by SHA-256 checksums that are stored beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cifar_jax.io import read_json, write_json

NAME = "sha256.json"


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != NAME)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_checksums(folder: Path) -> None:
    """Writes FOLDER/sha256.json: {file name: SHA-256}. Raises: UserError, OSError."""
    write_json(folder / NAME, _checksums(folder))


def find_damage(folder: Path) -> Path | None:
    """Returns the first file that is missing or changed; None if all are intact or sha256.json can't be read."""
    try:
        saved = read_json(folder / NAME)
    except (OSError, ValueError):
        return None
    actual = _checksums(folder)
    return next((folder / name for name in saved if saved[name] != actual.get(name)), None)
