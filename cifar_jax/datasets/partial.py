"""Folders for files in the making: cleared away at the end, and also after a process that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.io import made_folder

PREFIX = "partial-"
_FRESH = 600  # seconds in which a folder may not have its lock yet
_FORGOTTEN = 86_400  # seconds that no download or decoding takes, for file systems without locks


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, which is made; what is left of it is removed at the end. Raises: OSError."""
    with made_folder(parent):
        _clear_abandoned(parent)
        folder = parent / f"{PREFIX}{uuid.uuid4()}"  # not mkdtemp: others who share the parent may read what is renamed
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _lock(descriptor)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks a folder until its descriptor is closed. False: another process did; None: there are no locks here."""
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
