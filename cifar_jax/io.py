"""Files that are written whole."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file whole, so that a crash leaves the old one. Raises UserError if that is not possible."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()  # it may be what fills the disk
        if not isinstance(error, OSError):
            raise
        raise UserError(f"can't write {path}: {error.strerror}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
