"""The help texts of all commands, for docs/commands.md."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import sys
from unittest import mock

from benchmarks.report.results import Results
from cifar_jax.__main__ import COMMANDS

WIDTH = 100
# train's own help lists the recipes, and a recipe's help lists the flags with its values
ARGUMENTS = {name: [name, "quickstart"] if name == "train" else [name] for name in COMMANDS}


class Utf8(io.StringIO):
    """Text in memory that takes every character: tyro asks for the encoding to choose its frames."""

    encoding = "utf-8"


@functools.cache
def help_text(name: str) -> str:
    """Returns a command's help, WIDTH wide, whatever the terminal is. Text in memory gets no colours."""
    output = Utf8()
    arguments = [f"cifar-jax {name}", *ARGUMENTS[name][1:], "--help"]
    with (
        mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH)}),
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
    ):
        importlib.import_module(f"cifar_jax.{name}").main()
    return "\n".join(line.rstrip() for line in output.getvalue().strip().splitlines())


def commands(results: Results) -> str:
    """Returns a section for each command. The results are not used."""
    parts = []
    for name, purpose in COMMANDS.items():
        title = f"## cifar-jax {' '.join(ARGUMENTS[name])}"
        parts.append(f"{title}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n```text\n{help_text(name)}\n```")
    return "\n\n".join(parts)
