"""All commands: cifar-jax COMMAND …, or python -m cifar_jax COMMAND …, the same as python -m cifar_jax.COMMAND …"""

from __future__ import annotations

import importlib
import sys

from cifar_jax.cli import command
from cifar_jax.errors import UserError

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


@command
def main() -> int:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(describe())
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    sys.argv = [f"{sys.argv[0]} {name}", *arguments]
    status: int = importlib.import_module(f"cifar_jax.{name}").main()
    return status


if __name__ == "__main__":
    sys.exit(main())
