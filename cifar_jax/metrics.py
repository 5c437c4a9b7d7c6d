"""A run's log: metrics of every epoch (metrics.csv) and the loss of every step (batch_loss.npy)."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.io import write_atomically

STALLED_STEPS = 500


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """A row of metrics.csv.

    Losses are in nats, accuracies from 0 to 1. Training loss and accuracy are means over the epoch's steps, measured
    during training with dropout and augmentation. `learning_rate` is the last step's. `seconds` and `images_per_second`
    measure training without compilation and evaluation.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    learning_rate: float
    seconds: float
    images_per_second: float


_COLUMNS = [field.name for field in dataclasses.fields(EpochMetrics)]


@dataclasses.dataclass
class RunLog:
    """The rows of all complete epochs and the loss of each of their steps, float32 [steps].

    Every checkpoint contains the log. metrics.csv and batch_loss.npy can be rewritten from it if they are lost.
    """

    rows: list[EpochMetrics] = dataclasses.field(default_factory=list)
    batch_loss: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))

    def add(self, row: EpochMetrics, batch_loss: np.ndarray) -> None:
        """Adds an epoch. Args: batch_loss float32 [steps of the epoch]."""
        self.rows.append(row)
        self.batch_loss = np.concatenate([self.batch_loss, batch_loss])

    def write(self, workdir: Path) -> None:
        """Writes metrics.csv and batch_loss.npy. Raises: UserError if they can't be written."""
        text = io.StringIO()
        table = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in self.rows)
        write_atomically(workdir / "metrics.csv", text.getvalue().encode())
        losses = io.BytesIO()
        np.save(losses, self.batch_loss)
        write_atomically(workdir / "batch_loss.npy", losses.getvalue())


def is_stalled(batch_loss: np.ndarray, num_classes: int) -> bool:
    """Tells whether the loss stayed at chance, ln(num_classes), for the last STALLED_STEPS steps.

    Args: batch_loss: float32 [steps], nats, all steps of a run.
    """
    if len(batch_loss) < STALLED_STEPS:
        return False
    excess = batch_loss[-STALLED_STEPS:].reshape(5, -1).mean(axis=1) - math.log(num_classes)
    return bool(np.all((excess > -0.005) & (excess < 0.1)))  # in each of 5 parts: a loss that falls past chance is fine


def read_metrics(workdir: Path) -> list[EpochMetrics]:
    """Reads WORKDIR/metrics.csv; [] if it does not exist. Raises: UserError if it is malformed."""
    path = workdir / "metrics.csv"
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            if table.fieldnames != _COLUMNS:
                raise ValueError("unexpected columns")
            rows = [{name: float(value) for name, value in row.items()} for row in table]
        if not all(math.isfinite(value) for row in rows for value in row.values()):
            raise ValueError("a value is not finite")
        return [EpochMetrics(epoch=int(row.pop("epoch")), **row) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, csv.Error) as error:
        raise UserError(f"{path}: not a metrics.csv written by this program ({error})") from error


def read_batch_loss(workdir: Path) -> np.ndarray:
    """Reads the loss of every training step, float32 [steps]; empty if the file does not exist. Raises: UserError."""
    path = workdir / "batch_loss.npy"
    try:
        with path.open("rb") as file:  # numpy does not close a file that it can't read
            losses = np.load(file, allow_pickle=False)
        if not isinstance(losses, np.ndarray) or losses.ndim != 1 or losses.dtype != np.float32:
            raise ValueError("not float32 [steps]")
        return losses
    except FileNotFoundError:
        return np.zeros(0, np.float32)
    except Exception as error:  # numpy's parser can raise anything for a damaged header
        raise UserError(f"{path}: damaged ({type(error).__name__}): resume the run to rewrite it") from error
