"""All commands: cifar-jax COMMAND …, or python -m cifar_jax COMMAND …, the same as python -m cifar_jax.COMMAND …"""

from __future__ import annotations

import importlib
import sys

from cifar_jax.errors import UserError
from cifar_jax.interrupt import exit_on_interrupt

COMMANDS = {
    "train": "train a recipe, or resume it",
    "evaluate": "loss and accuracy of a run, a weight file or a released network",
    "predict": "classify image files",
    "convert": "write weights as another framework's file",
    "plots": "draw a run's figures anew",
}


def describe() -> str:
    """The text of --help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(["usage: cifar-jax COMMAND …; COMMAND --help lists its flags", "", *lines])


def main() -> int:
    exit_on_interrupt()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv = [f"{sys.argv[0]} {name}", *arguments]
        return int(importlib.import_module(f"cifar_jax.{name}").main())
    from cifar_jax.cli import command  # here, as in the commands: imports take seconds

    return command(lambda: answer(name))()


def answer(name: str) -> int:
    """Tells the commands. Raises: UserError for a name that is none."""
    if name not in ("-h", "--help"):
        raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
