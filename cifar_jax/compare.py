"""Compares runs: a table of their results and of the settings that differ, and their curves in one figure.

python -m cifar_jax.compare RUN RUN … [--out compare.png] [--json]

It reads only the runs' files, so it also compares runs that are still training.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs.base import EXECUTION_FIELDS, Config
from cifar_jax.errors import UserError
from cifar_jax.metrics import EpochMetrics, read_metrics
from cifar_jax.plots import saved_figure
from cifar_jax.runs import read_config, refuse_restarted


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares the results, settings and curves of runs. Runs that differ only in their seed are averaged."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN …")]
    """Run folders, as given to cifar_jax.train."""
    out: Path | None = None
    """PNG file for the figure; None: no figure."""
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's name, recipe and complete epochs, at least one."""

    name: str
    config: Config
    rows: list[EpochMetrics]

    @property
    def recipe(self) -> tuple[Any, ...]:
        """The settings that decide the training, except the seed."""
        left_out = {*EXECUTION_FIELDS, "seed"}
        if self.config.normalization == "batch":
            left_out.remove("num_devices")  # each device normalises its own part of the batch
        return tuple(value for name, value in vars(self.config).items() if name not in left_out)


def read_run(workdir: Path) -> Run:
    """Reads a run. Raises: UserError if there is none, it was restarted, or it has no complete epoch."""
    config = read_config(workdir)
    refuse_restarted(workdir)
    rows = read_metrics(workdir)
    if not rows:
        raise UserError(f"{workdir}: no epoch is complete yet: compare it later")
    return Run(str(workdir), config, rows)


def differing_fields(configs: Sequence[Config]) -> list[str]:
    """Returns the fields, in the recipe's order, that do not have one value in all configs, except workdir."""
    names = [field.name for field in dataclasses.fields(Config) if field.name != "workdir"]
    return [name for name in names if any(getattr(c, name) != getattr(configs[0], name) for c in configs)]


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns JSON values: 'runs', one row a run, and 'seeds', one row for each recipe with two or more complete runs.

    Accuracies are from 0 to 1, on the images that the run tests on ('test' or 'held-out'). 'std' is the sample's.
    """
    fields, rows, seeds = differing_fields([run.config for run in runs]), [], []
    for run in runs:
        last = run.rows[-1]
        row = {
            "run": run.name,
            "epoch": last.epoch,
            "num_epochs": run.config.num_epochs,
            "tested": "held-out" if run.config.holdout else "test",
            "accuracy": last.test_accuracy,
            "best_accuracy": max(row.test_accuracy for row in run.rows),
            "loss": last.test_loss,
            "train_accuracy": last.train_accuracy,
            "seconds": sum(row.seconds for row in run.rows),
        }
        rows.append(row | {"settings": {name: getattr(run.config, name) for name in fields}})
    complete = [run for run in runs if run.rows[-1].epoch == run.config.num_epochs]
    for recipe in dict.fromkeys(run.recipe for run in complete):
        by_seed: dict[int, Run] = {}  # a seed that is there twice counts once
        for run in complete:
            if run.recipe == recipe:
                by_seed.setdefault(run.config.seed, run)
        same = list(by_seed.values())
        if len(same) > 1:
            accuracies = [run.rows[-1].test_accuracy for run in same]
            mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
            seeds.append({"runs": [run.name for run in same], "mean_accuracy": mean, "std_accuracy": std})
    return {"runs": rows, "seeds": seeds}


def format_table(result: dict[str, Any]) -> str:
    """Returns the result of `compare` as text."""
    cells = [["run", "epoch", "images", "accuracy", "best", "loss", "train acc.", "minutes", "settings"]]
    for row in result["runs"]:
        percent = lambda name, row=row: f"{100 * row[name]:.2f}"
        settings = " ".join(f"{name}={value}" for name, value in row["settings"].items())
        numbers = percent("accuracy"), percent("best_accuracy"), f"{row['loss']:.4f}", percent("train_accuracy")
        epoch, minutes = f"{row['epoch']}/{row['num_epochs']}", f"{row['seconds'] / 60:.1f}"
        cells.append([row["run"], epoch, row["tested"], *numbers, minutes, settings])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    for row in result["seeds"]:
        mean, std = 100 * row["mean_accuracy"], 100 * row["std_accuracy"]
        lines.append(f"{mean:.2f} ± {std:.2f} over {len(row['runs'])} seeds: {', '.join(row['runs'])}")
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draws the accuracy of each run by epoch. Runs of one recipe share a colour. Raises: UserError."""
    recipes = list(dict.fromkeys(run.recipe for run in runs))
    with saved_figure(path, "accuracy on the images of the tests", "epoch", "accuracy") as axes:
        for run in runs:
            epochs, accuracies = zip(*((row.epoch, row.test_accuracy) for row in run.rows))
            axes.plot(epochs, accuracies, ".-", color=f"C{recipes.index(run.recipe)}", label=run.name, alpha=0.8)
        axes.legend(loc="lower right")


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.compare", config=flags)
    if len(arguments.runs) < 2:
        raise UserError("name two or more run folders")
    runs = [read_run(workdir) for workdir in arguments.runs]
    if arguments.out is not None:
        plot(runs, arguments.out)
    result = compare(runs)
    print(json.dumps(result, indent=2) if arguments.json else format_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
