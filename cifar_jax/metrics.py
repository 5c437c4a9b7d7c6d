"""What a run writes about itself: metrics.csv, batch_loss.npy, a line per epoch, a progress bar, summary.json."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cifar_jax.errors import UserError
from cifar_jax.io import write_atomically


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """A row of metrics.csv. Losses in nats, accuracies from 0 to 1; the training ones are means over the epoch while
    it trained (dropout and augmentation on). `learning_rate` is the last step's. `seconds` and `images_per_second`
    are of training alone, without compilation and evaluation."""

    epoch: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    learning_rate: float
    seconds: float
    images_per_second: float


def read_metrics(workdir: Path) -> list[EpochMetrics]:
    """The rows of WORKDIR/metrics.csv; none if it is not there. Raises UserError if it is not such a file."""
    path = workdir / "metrics.csv"
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        if not all(math.isfinite(value) for row in rows for value in row.values()):
            raise ValueError("a value is not finite")
        return [EpochMetrics(epoch=int(row.pop("epoch")), **row) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, csv.Error) as error:
        raise UserError(f"{path}: not a metrics.csv of this program ({error})") from error


class MetricsWriter:
    """Writes the epochs of a run. When it resumes, what lies behind the checkpoint (a crash came first) is dropped.

    Raises UserError if the files lack what lies before it.
    """

    def __init__(self, workdir: Path, epoch: int, num_epochs: int, steps_per_epoch: int) -> None:
        self._workdir, self._num_epochs, self._steps_per_epoch = workdir, num_epochs, steps_per_epoch
        self.rows = [row for row in read_metrics(workdir) if row.epoch <= epoch]
        self.batch_loss = read_batch_loss(workdir)[: epoch * steps_per_epoch]
        if [row.epoch for row in self.rows] != list(range(1, epoch + 1)):
            raise UserError(f"{workdir}/metrics.csv: lacks some of the run's epochs: name another --workdir")
        if self.batch_loss.size != epoch * steps_per_epoch:
            raise UserError(f"{workdir}/batch_loss.npy: lacks some of the run's steps: name another --workdir")

    def write(self, row: EpochMetrics, batch_loss: np.ndarray) -> None:
        """Adds an epoch: its row, and its batch losses float32 [steps]."""
        self.rows.append(row)
        self.batch_loss = np.concatenate([self.batch_loss, batch_loss])
        text = io.StringIO()
        table = csv.DictWriter(text, [field.name for field in dataclasses.fields(EpochMetrics)], lineterminator="\n")
        table.writeheader()
        table.writerows(dataclasses.asdict(row) for row in self.rows)
        write_atomically(self._workdir / "metrics.csv", text.getvalue().encode())
        losses = io.BytesIO()
        np.save(losses, self.batch_loss)
        write_atomically(self._workdir / "batch_loss.npy", losses.getvalue())

    def print(self, row: EpochMetrics, tested: str) -> None:
        """The epoch's line on stdout, above the progress bar; `tested` says on what."""
        tqdm.write(
            f"epoch {row.epoch:{len(str(self._num_epochs))}}/{self._num_epochs}"
            f"  train loss {row.train_loss:.4f} accuracy {row.train_accuracy:7.2%}"
            f"  {tested} loss {row.test_loss:.4f} accuracy {row.test_accuracy:7.2%}"
            f"  lr {row.learning_rate:.3g}  {row.seconds:.1f} s  {row.images_per_second:,.0f} images/s"
        )

    def progress_bar(self, epoch: int, step: int) -> tqdm[Any]:
        """A bar over an epoch's steps; nothing where the output is no terminal."""
        description = f"epoch {epoch + 1}/{self._num_epochs}"
        return tqdm(total=self._steps_per_epoch, initial=step, desc=description, unit="step", leave=False, disable=None)


def read_batch_loss(workdir: Path) -> np.ndarray:
    """The loss of every training step, float32 [steps]; empty if there are none."""
    try:
        losses = np.load(workdir / "batch_loss.npy", allow_pickle=False)
        if losses.ndim != 1 or losses.dtype != np.float32:
            raise ValueError(f"{losses.dtype} {losses.shape}, not float32 [steps]")
        return losses
    except FileNotFoundError:
        return np.zeros(0, np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{workdir / 'batch_loss.npy'}: damaged ({error}): move it away") from error
