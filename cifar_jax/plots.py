"""The figures of a run, from its files; `python -m cifar_jax.plots RUN` draws them anew.

accuracy.png and loss.png as the Keras program drew them, batch_loss.png as the PyTorch notebook did.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cifar_jax.cli import command
from cifar_jax.errors import UserError
from cifar_jax.metrics import read_batch_loss, read_metrics

RUNNING_MEAN_STEPS = 500


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means of `window` neighbours: [N] → [N - window + 1], float64."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[window:] - sums[:-window]) / window


def plot_run(workdir: Path) -> None:
    """Draws accuracy.png, loss.png and batch_loss.png into a run's folder. Raises UserError without a metrics.csv."""
    rows = read_metrics(workdir)
    if not rows:
        raise UserError(f"{workdir}: no metrics.csv with an epoch in it, so nothing to draw")
    epochs = [row.epoch for row in rows]
    for quantity in ("accuracy", "loss"):
        axes = _axes(f"model {quantity}", "epoch", quantity)
        axes.plot(epochs, [getattr(row, f"train_{quantity}") for row in rows], ".-", label="train")
        axes.plot(epochs, [getattr(row, f"test_{quantity}") for row in rows], ".-", label=_tested_images(workdir))
        axes.legend(loc="upper left")
        _save(axes, workdir / f"{quantity}.png")
    losses = read_batch_loss(workdir)
    if losses.size:
        window = min(RUNNING_MEAN_STEPS, (losses.size + 1) // 2)
        axes = _axes(f"batch loss, mean of {window} steps", "step", "loss")
        means = running_mean(losses, window)
        axes.plot(np.arange(window, window + means.size), means)
        _save(axes, workdir / "batch_loss.png")


def _tested_images(workdir: Path) -> str:
    """What the run was tested on, by its config.json."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a metrics.csv alone can be drawn, too
        if json.loads((workdir / "config.json").read_text())["holdout"]:
            return "held-out"
    return "test"


def _axes(title: str, xlabel: str, ylabel: str):  # type: ignore[no-untyped-def]
    # Figure alone, without pyplot: no global state and no display.
    axes = Figure(figsize=(6.4, 4.8), layout="constrained").subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return axes


def _save(axes, path: Path) -> None:  # type: ignore[no-untyped-def]
    try:
        axes.figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error


@command
def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError("usage: python -m cifar_jax.plots RUN, with RUN the workdir of a training")
    plot_run(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
