"""Signals that end a command: one line instead of a traceback, and none is lost.

A command imports this module first, because its other imports take seconds. `cli.command` installs `Interrupts` later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any


def exit_on_interrupt() -> None:
    """Makes Ctrl-C print "interrupted" and end the process with status 130. Nothing needs to be cleaned up yet.

    An exception would not work, because some modules catch it while they are imported. An ignored signal stays ignored,
    and IPython's %run keeps its handler.
    """
    if "IPython" not in sys.modules and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def _exit(number: int, _: object) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


class Terminated(BaseException):
    """SIGTERM or SIGHUP reached a command. It is an exception so that files in the making are cleared away."""


class Interrupts:
    """Makes Ctrl-C, SIGTERM and SIGHUP exceptions in the main thread: KeyboardInterrupt and Terminated.

    Python drops an exception that is raised within a callback of the garbage collector, and a library may take one for
    its own. So it is raised again every RETRY seconds until `over` is set, except where one already passes through
    `finally` clauses. Ignored signals stay ignored (nohup).
    """

    RETRY = 0.1
    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None
        self.over = False
        self._previous: dict[int, Any] = {}
        self._hook: Any = None

    def install(self) -> None:
        """Does nothing outside the main thread, where Python delivers no signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._hook, sys.unraisablehook = sys.unraisablehook, self._say_unraisable
        for number in (signal.SIGALRM, *self.NUMBERS):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Takes back what `install` did."""
        if self._hook is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None is a handler in C
        sys.unraisablehook = self._hook

    def _handle(self, number: int, _: object) -> None:
        if number in self.NUMBERS:
            self.received = self.received or number
        if self.over or self.received is None:
            return
        signal.setitimer(signal.ITIMER_REAL, self.RETRY)
        error = sys.exception()
        while error is not None and not isinstance(error, (KeyboardInterrupt, Terminated)):
            error = error.__context__
        if error is None:
            raise KeyboardInterrupt if self.received == signal.SIGINT else Terminated

    def _say_unraisable(self, unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, (KeyboardInterrupt, Terminated)):
            self._hook(unraisable)
