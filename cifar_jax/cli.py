"""The one exception that a user's mistake or machine can cause, and how a command reports it."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from cifar_jax.errors import UserError

T = TypeVar("T")


def command(main: Callable[[], int]) -> Callable[[], int]:
    """Wraps a command's `main`: a UserError, or one of the system, becomes one line on stderr and exit status 2.

    What it prints is seen at once, in a file or a pipe as well, with ? for what the output can't encode.
    Ctrl-C, SIGTERM and a closed pipe end with the status that a shell gives them, 130, 143 and 141; SIGTERM as an
    exception, so that files in the making are cleared away.
    """

    @functools.wraps(main)
    def wrapped() -> int:
        # Orbax comments its work through absl at WARNING and ERROR; what matters reaches the user as a UserError.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True, errors="replace")
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return main()
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except OSError as error:
            if error.filename is None:  # it may be stdout's: Python would write the rest again at exit, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if isinstance(error, BrokenPipeError):  # the reader of our output (`| head`) left
                return 128 + signal.SIGPIPE
            if error.errno is None:  # no system's error: what a library calls one
                raise
            place = f"{error.filename}: " if error.filename else ""
            advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name another place"
            print(f"error: {' '.join(f'{place}{error.strerror}: {advice}'.split())}", file=sys.stderr)
            return 2
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print("error: out of memory: lower --batch-size or --eval-batch-size", file=sys.stderr)
            return 2
        finally:
            signal.signal(signal.SIGTERM, previous)

    return wrapped


def parse_arguments(kind: type[T], **options: Any) -> T:
    """tyro.cli(kind, **options), but the first paragraph of its box about a bad flag is the text of a UserError."""
    import tyro  # here: load_pretrained needs none

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # A box of ─ and │ with its title in the frame; where stdout is not UTF-8, a title, a ruler of -, the text.
        box = captured.getvalue()
        lines = [line.strip("│ ") for line in box.splitlines()]
        is_ruler = lambda line: line.startswith(("╭", "╰")) or not line.strip("─-")
        paragraphs = [" ".join(group) for ruler, group in itertools.groupby(lines, is_ruler) if not ruler]
        raise UserError(f"{paragraphs[0 if '╭' in box else 1].rstrip('.')}: see --help") from stop
