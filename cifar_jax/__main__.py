"""Runs any command: cifar-jax COMMAND … equals python -m cifar_jax COMMAND … and python -m cifar_jax.COMMAND …"""

from __future__ import annotations

import importlib
import sys

from cifar_jax.cluster import silence_xla
from cifar_jax.errors import UserError
from cifar_jax.interrupt import exit_on_interrupt

COMMANDS = {
    "train": "train a recipe, or resume its run",
    "evaluate": "measure loss and accuracy of a run, a weight file or a released network",
    "predict": "classify image files",
    "convert": "write weights in another framework's file format",
    "export": "write a network for another runtime, and compare it there",
    "plots": "redraw a run's figures",
    "report": "write a page about a network: accuracy, mistakes, calibration, robustness",
    "compare": "compare the results, settings and curves of runs",
}


def describe() -> str:
    """Returns the text of --help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(["usage: cifar-jax COMMAND …; COMMAND --help lists its flags", "", *lines])


def main() -> int:
    exit_on_interrupt()
    silence_xla(sys.argv)
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"{sys.argv[0]} {name}", *arguments]
        return int(importlib.import_module(f"cifar_jax.{name}").main())
    from cifar_jax.cli import command  # imported here because it takes seconds

    return command(lambda: answer(name))()


def answer(name: str) -> int:
    """Prints the help text. Raises: UserError if `name` is not a help flag."""
    if name not in ("-h", "--help"):
        raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
