"""Shared by all commands: one-line errors, exit statuses, signals, parsing of flags."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cifar_jax.console import say, silence
from cifar_jax.errors import UserError
from cifar_jax.interrupt import Interrupts, Terminated
from cifar_jax.io import user_path

T = TypeVar("T")


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

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            if callable(self._previous[number]):
                self._previous[number](number, frame)
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.received = number
        with contextlib.suppress(RuntimeError):  # the signal interrupted another print
            say("\nstopping after this step to save the run; signal again to stop at once without saving", error=True)

    def __call__(self) -> bool:
        return self.received is not None


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
        interrupts, status = Interrupts(), 0
        try:
            interrupts.install()
            try:
                status = main()
            except Exception as error:
                if interrupts.received is not None:  # a library made it of the interrupt
                    raise
                status = say_failure(error)
            interrupts.over = True
        except BaseException as error:
            interrupts.over = True
            if interrupts.received is None and isinstance(error, (KeyboardInterrupt, Terminated)):
                interrupts.received = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            if interrupts.received is None:
                raise
        finally:
            interrupts.restore()
        if interrupts.received is None:
            return status
        if interrupts.received == signal.SIGINT:
            say("interrupted", error=True, everywhere=True)
        return 128 + interrupts.received

    return wrapped


def say_failure(error: Exception) -> int:
    """Says an error in a line. Returns: the exit status. Raises: the error if it is a bug."""
    line, status = describe_failure(error)
    if line is None and status is None:
        raise error
    if line:
        say(f"error: {' '.join(line.split())}", error=True, everywhere=True)
    return status or 2


_ADVICE = {
    "free disk space": (errno.ENOSPC, errno.EDQUOT),
    "close files, or raise their limit (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "free memory, or end other processes": (errno.ENOMEM, errno.EAGAIN),
}


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
        advice = next((text for text, numbers in _ADVICE.items() if error.errno in numbers), "name another place")
        return f"{place}{error.strerror}: {advice}", 2
    exhausted = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if exhausted or isinstance(error, MemoryError):
        return "out of memory: free memory, or train with a lower --batch-size or --eval-batch-size", 2
    return None, None


def parse_arguments(kind: type[T], **options: Any) -> T:
    """Parses flags with tyro.cli(kind, **options) and expands ~ in paths.

    Raises: UserError with tyro's first paragraph about a bad flag.
    """
    import tyro  # imported here because load_pretrained does without it

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(sys.stdout or io.StringIO()):  # or closed
            arguments = tyro.cli(kind, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro prints a box of ─ and │ with its title in the frame. If stdout is not UTF-8: title, ruler of -, text.
        box = re.sub(r"\x1b\[[\d;]*m", "", captured.getvalue())  # colours, if stdout is a terminal
        lines = [line.strip("│ ") for line in box.splitlines()]
        is_ruler = lambda line: line.startswith(("╭", "╰")) or not line.strip("─-")
        paragraphs = [" ".join(group) for ruler, group in itertools.groupby(lines, is_ruler) if not ruler]
        raise UserError(f"{paragraphs[0 if '╭' in box else 1].rstrip('.')}: see --help") from stop
    return _expand_paths(arguments)


def _expand_paths(value: Any) -> Any:
    """With ~ replaced in every path of a dataclass of arguments. The shell leaves it in --flag=~/x."""
    if isinstance(value, Path):
        return user_path(value)
    if isinstance(value, tuple):
        return tuple(map(_expand_paths, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _expand_paths(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value
