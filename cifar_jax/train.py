"""Trains a recipe: python -m cifar_jax.train [RECIPE] [--workdir …] [--num-epochs …] …"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from cifar_jax.cluster import silence_xla
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()
    silence_xla(sys.argv)

import contextlib
import dataclasses
import difflib
import importlib.metadata
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

import cifar_jax
from cifar_jax.checkpoint import Progress
from cifar_jax.cli import StopSignals, command, parse_arguments
from cifar_jax.cluster import Processes
from cifar_jax.configs import DESCRIPTIONS, FAULTY, RECIPES
from cifar_jax.configs.base import Config
from cifar_jax.console import say
from cifar_jax.datasets import Dataset, check_dataset
from cifar_jax.environment import code_checksum
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_host
from cifar_jax.outcomes import FailedTraining, Interrupted
from cifar_jax.parallel import select_devices
from cifar_jax.processes import any_of, check_same, check_same_devices, connected, on_main
from cifar_jax.runs import attempts, claim_workdir, resolve_workdir
from cifar_jax.training import Run

DEFAULT_RECIPE = "lenet5"


def train_and_evaluate(
    config: Config, dataset: Dataset | None = None, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Trains a recipe to its last epoch and returns the content of summary.json. Resumes a run in the same workdir.

    With config.auto_restart a run that stalls or diverges is kept and started again in WORKDIR/restart1, then restart2
    and restart3. Args: dataset: None: the recipe's; stop: the run ends when it returns True; it is called at each stage
    of the start and before each call of steps.
    Raises: UserError for errors that the user can fix; Interrupted if `stop` ended the run before its last epoch's end.
    """
    config = dataclasses.replace(config, workdir=resolve_workdir(config.workdir))
    if dataset is not None:
        check_dataset(dataset, config.dataset, config.holdout)
    check_same_devices()
    check_same("recipe or version", lambda: _facts(config))
    if any_of(stop()):
        raise Interrupted(Progress(), 0)
    devices = select_devices(config)
    config = dataclasses.replace(config, num_devices=len(devices))
    *earlier, last = on_main(lambda: attempts(config))
    following = [*earlier[1:], last] if earlier else []
    for attempt, restart in zip(earlier, following):
        try:
            with _claimed(attempt):
                return Run(attempt, devices, dataset, stop).train()
        except FailedTraining as error:
            settings = f"rate {restart.learning_rate:g}, seed {restart.seed}"
            say(f"{error.what}\nstarting again in {restart.workdir}: {settings}", error=True)
    with _claimed(last):
        return Run(last, devices, dataset, stop).train()


def _facts(config: Config) -> dict[str, Any]:
    """Returns what all processes of a run must have in common."""
    fields = dataclasses.asdict(config)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    versions |= {"cifar_jax": cifar_jax.__version__, "SHA-256 of cifar_jax": code_checksum()}
    return versions | {name: value for name, value in fields.items() if name != "data_dir"}


@contextlib.contextmanager
def _claimed(config: Config) -> Iterator[None]:
    """Claims the run's folder in process 0."""
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(claim_workdir(Path(config.workdir), config)))
        yield


def parse_command(arguments: list[str]) -> tuple[Config, Processes]:
    """Parses a recipe's name and flags. Raises: UserError for an unknown or faulty recipe or a bad flag."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = [DEFAULT_RECIPE, *arguments]
    if arguments[0] in FAULTY:
        raise UserError(FAULTY[arguments[0]])
    if not arguments[0].startswith("-") and arguments[0] not in RECIPES:
        close = difflib.get_close_matches(arguments[0], RECIPES, 1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown recipe {arguments[0]!r}: {guess}choose one of {', '.join(RECIPES)}")
    recipe = tyro.extras.subcommand_type_from_defaults(RECIPES, DESCRIPTIONS, prefix_names=False)
    unprefixed = tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[recipe]]  # type: ignore[valid-type]
    return parse_arguments(
        tuple[unprefixed, Annotated[tyro.conf.OmitArgPrefixes[Processes], tyro.conf.arg(name="several processes")]],
        prog="python -m cifar_jax.train",
        description=f"Trains a recipe. Without a name: {DEFAULT_RECIPE}. RECIPE --help lists its flags.",
        args=arguments,
        config=(tyro.conf.CascadeSubcommandArgs,),
    )


@command
def main() -> int:
    with StopSignals() as stop:
        arguments = sys.argv[1:]
        config, processes = parse_command(arguments)
        with connected(processes):
            prepare_host()
            try:
                train_and_evaluate(config, stop=stop)
            except Interrupted as interrupted:
                again = shlex.join(["python", "-m", "cifar_jax.train", *arguments])
                say(f"{interrupted}. To resume: {again}", error=True)
                return 128 + (stop.received or signal.SIGTERM)  # perhaps only another process received a signal
    return 0


if __name__ == "__main__":
    sys.exit(main())
