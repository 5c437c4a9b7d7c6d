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

from cifar_jax.io import made_folder

_PREFIX = "partial-"
_FRESH = 600  # seconds during which a new folder may not be locked yet
_FORGOTTEN = 86_400  # seconds after which a folder is abandoned on file systems without locks


def is_partial(name: str) -> bool:
    """Tells whether this module gives a folder such a name. Others, also the user's partial-…, are left alone."""
    with contextlib.suppress(ValueError):
        return name == f"{_PREFIX}{uuid.UUID(name.removeprefix(_PREFIX))}"
    return False


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Yields a new folder in `parent`, which is created if needed, and removes it at the end. Raises: OSError."""
    with made_folder(parent):
        _clear_abandoned(parent)
        folder = parent / f"{_PREFIX}{uuid.uuid4()}"  # mkdtemp would make it private
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
    for folder in (path for path in parent.glob(f"{_PREFIX}*") if is_partial(path.name)):
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
