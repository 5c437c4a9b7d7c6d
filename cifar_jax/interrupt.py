"""Handles Ctrl-C during a command's imports with one line instead of a traceback.

A command imports this module first, because its other imports take seconds. `cli.command` takes over afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal


def exit_on_interrupt() -> None:
    """Makes Ctrl-C print "interrupted" and end the process with status 130. Nothing needs to be cleaned up yet.

    An exception would not work, because some modules catch it while they are imported.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # an ignored signal stays ignored
        signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, _: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)
