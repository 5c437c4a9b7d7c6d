"""Orbax, in process 0 of several and without messages of its own, and the system's errors behind its failures."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

_LOCK = threading.RLock()


def alone() -> ocp.options.MultiprocessingOptions:
    """Returns the options with which Orbax, in process 0 of several, does not wait for the others."""
    return ocp.options.MultiprocessingOptions(active_processes={0} if jax.process_count() > 1 else None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides failures that Orbax' threads print, now or later. The same failure is raised as an exception.

    Only one thread at a time is in this context, because it changes what all threads share.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    with _LOCK:
        levels, hook = [logger.level for logger in loggers], sys.unraisablehook
        sys.unraisablehook = lambda _: None
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def error_number(error: Exception) -> int | None:
    """Returns the number of the system's error behind a failure, which TensorStore only has in its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def systems_error(error: Exception, path: Path) -> Exception | None:
    """Returns the system's error if files that can't be read may be intact, else None.

    Then there is too little memory, also on a device, or there are too many open files, or a permission is missing.
    """
    if (number := error_number(error)) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM):
        return error if isinstance(error, OSError) else OSError(number, os.strerror(number), str(path))
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return error if exhausted or isinstance(error, MemoryError) else None
