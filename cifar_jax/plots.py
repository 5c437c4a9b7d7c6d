"""Draws a run's figures from its files: python -m cifar_jax.plots RUN

accuracy.png and loss.png follow the Keras program's figures, batch_loss.png the PyTorch notebook's.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.cli import command
from cifar_jax.errors import UserError
from cifar_jax.io import read_json, user_path
from cifar_jax.metrics import read_batch_loss, read_metrics

RUNNING_MEAN_STEPS = 500
_LOCK = threading.RLock()
USAGE = "usage: python -m cifar_jax.plots RUN, where RUN is a run's workdir"


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the means of `window` consecutive values: [N] → float64 [N - window + 1]."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[window:] - sums[:-window]) / window


def plot_run(workdir: Path) -> None:
    """Draws accuracy.png, loss.png and batch_loss.png in a run's folder. Raises: UserError without a metrics.csv."""
    rows = read_metrics(workdir)
    if not rows:
        raise UserError(f"{workdir}: nothing to draw: metrics.csv is missing or has no epoch yet")
    epochs = [row.epoch for row in rows]
    for quantity in ("accuracy", "loss"):
        with saved_figure(workdir / f"{quantity}.png", f"model {quantity}", "epoch", quantity) as axes:
            axes.plot(epochs, [getattr(row, f"train_{quantity}") for row in rows], ".-", label="train")
            axes.plot(epochs, [getattr(row, f"test_{quantity}") for row in rows], ".-", label=_tested_images(workdir))
            axes.legend(loc="upper left")
    losses = read_batch_loss(workdir)
    if losses.size:
        window = min(RUNNING_MEAN_STEPS, (losses.size + 1) // 2)
        with saved_figure(workdir / "batch_loss.png", f"batch loss, mean of {window} steps", "step", "loss") as axes:
            means = running_mean(losses, window)
            axes.plot(np.arange(window, window + means.size), means)


def _tested_images(workdir: Path) -> str:
    """Returns the set that the run was tested on, according to its config.json."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # metrics.csv alone is enough to draw
        if read_json(workdir / "config.json")["holdout"]:
            return "held-out"
    return "test"


@contextlib.contextmanager
def drawn(size: tuple[float, float], rows: int = 1, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """Yields (figure, its axes) of `size` inches. It depends on neither a display nor the user's style."""
    first = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook sets a backend that may be missing here
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if first and backend is not None:  # matplotlib reads the variable only once
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    with _LOCK, matplotlib.style.context("default"):  # the settings belong to all threads
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        yield figure, figure.subplots(rows, columns)


def png(figure: Any) -> bytes:
    """Returns a figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


@contextlib.contextmanager
def saved_figure(path: Path, title: str, xlabel: str, ylabel: str) -> Iterator[Any]:
    """Yields axes to draw on and saves them as PNG. Raises: UserError if the file can't be written."""
    with drawn((6.4, 4.8)) as (figure, axes):
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        yield axes
        content = png(figure)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error


@command
def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(f"{USAGE}\nRedraws accuracy.png, loss.png and batch_loss.png in the run's folder.")
        return 0
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise UserError(USAGE)
    plot_run(user_path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
