"""Temporary folders for unfinished files. They are removed at the end, or later if their process was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

PREFIX = "partial-"
_FRESH = 600  # seconds during which a new folder may not be locked yet
_FORGOTTEN = 86_400  # seconds after which a folder is abandoned on file systems without locks


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Yields a new folder in `parent`, which is created if needed, and removes it at the end. Raises: OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(parent)
    folder = parent / f"{PREFIX}{uuid.uuid4()}"  # mkdtemp would make it private, and it is renamed to a shared one
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks a folder until its descriptor is closed. Returns: False if another process has it; None without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _clear_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            age = time.time() - folder.stat().st_mtime
            if age < _FRESH:
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                locked = _lock(descriptor)
                if locked or (locked is None and age > _FORGOTTEN):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
