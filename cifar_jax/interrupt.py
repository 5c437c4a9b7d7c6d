"""Ctrl-C while a command's modules are imported: one line in place of a traceback.

A command imports this first, as its other imports take seconds. `cli.command` takes over when it begins.
"""

from __future__ import annotations

import contextlib
import os
import signal


def exit_on_interrupt() -> None:
    """From now on Ctrl-C says so and ends the process with status 130: there is nothing to clear away yet.

    An exception would not do, as some modules take it for their own while they are imported.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """From now on it is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, _: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)
