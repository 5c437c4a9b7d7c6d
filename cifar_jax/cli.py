"""Shared by all commands: one-line errors, exit statuses, signals, parsing of flags."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from cifar_jax.console import say, silence
from cifar_jax.errors import UserError
from cifar_jax.interrupt import raise_on_interrupt

T = TypeVar("T")


class Terminated(BaseException):
    """Raised when a command gets SIGTERM, so that unfinished files are removed on the way out."""


class StopSignals:
    """Context in which Ctrl-C, SIGTERM and SIGHUP only set `received`. Training polls it by calling the object.

    A second signal interrupts at once. The context has no effect outside the main thread, where Python delivers no
    signals. A signal that is already ignored (SIGHUP under nohup) stays ignored.
    """

    received: int | None = None

    def __enter__(self) -> StopSignals:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.received = number
        with contextlib.suppress(RuntimeError):  # the signal interrupted another print
            say("\nstopping after this step to save the run; signal again to stop at once without saving", error=True)

    def __call__(self) -> bool:
        return self.received is not None


def _terminate(*_: object) -> None:
    raise Terminated


def command(main: Callable[[], int]) -> Callable[[], int]:
    """Wraps a command's `main`: a UserError or a system error becomes one line on stderr and exit status 2.

    Output is line-buffered, also into a file or pipe. Characters that it can't encode become "?". Ctrl-C, SIGTERM and a
    closed pipe end with the status that a shell would report: 130, 143 and 141.
    """

    @functools.wraps(main)
    def wrapped() -> int:
        # Orbax logs its work through absl at WARNING and ERROR. Real problems reach the user as a UserError.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.closed:
            sys.stdout.reconfigure(line_buffering=True, errors="replace")
        previous = signal.signal(signal.SIGTERM, _terminate)
        raise_on_interrupt()
        try:
            return main()
        except KeyboardInterrupt:
            say("interrupted", error=True)
            return 128 + signal.SIGINT
        except Terminated:
            return 128 + signal.SIGTERM
        except Exception as error:
            line, status = describe_failure(error)
            if line is None and status is None:
                raise
            if line:
                say(f"error: {' '.join(line.split())}", error=True)
            return status or 2
        finally:
            signal.signal(signal.SIGTERM, previous)

    return wrapped


def describe_failure(error: Exception) -> tuple[str | None, int | None]:
    """Returns (line, exit status) of an expected error, and (None, None) of a bug, which deserves a traceback."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError):
        if error.filename is None:  # stdout may have failed: at exit Python would write its rest and fail again
            silence(sys.__stdout__)
        if isinstance(error, BrokenPipeError):  # the reader of the output (`| head`) has ended
            return None, 128 + signal.SIGPIPE
        if error.errno is None:  # a library's OSError, not the system's
            return None, None
        place = f"{error.filename}: " if error.filename else ""
        advice = "free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name another place"
        return f"{place}{error.strerror}: {advice}", 2
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory: lower --batch-size or --eval-batch-size", 2
    return None, None


def parse_arguments(kind: type[T], **options: Any) -> T:
    """Parses flags with tyro.cli(kind, **options). Raises: UserError with tyro's first paragraph about a bad flag."""
    import tyro  # imported here because load_pretrained does without it

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro prints a box of ─ and │ with its title in the frame. If stdout is not UTF-8: title, ruler of -, text.
        box = captured.getvalue()
        lines = [line.strip("│ ") for line in box.splitlines()]
        is_ruler = lambda line: line.startswith(("╭", "╰")) or not line.strip("─-")
        paragraphs = [" ".join(group) for ruler, group in itertools.groupby(lines, is_ruler) if not ruler]
        raise UserError(f"{paragraphs[0 if '╭' in box else 1].rstrip('.')}: see --help") from stop
