"""Orbax, in process 0 of several and without messages of its own."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

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
