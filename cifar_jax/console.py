"""What a training says while it runs. A console that fails (a closed window, a full disk) never stops it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from cifar_jax.metrics import EpochMetrics

if TYPE_CHECKING:
    import jax

# The terminal or the reader of a pipe is gone; the stream is closed; tqdm met a bar that is being cleared away.
FAILURES = (OSError, ValueError, RuntimeError)


def say(text: str, *, error: bool = False) -> None:
    """A line on stdout or stderr, above a progress bar."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # it was closed before Python began
        return
    written = False
    try:
        with tqdm.external_write_mode(file=stream):
            stream.write(f"{text}\n")
            written = True
    except FAILURES:  # of the stream, or of the terminal that a progress bar is on
        try:
            if not written:
                stream.write(f"{text}\n")
        except FAILURES:
            silence(stream)


def silence(stream: TextIO | None) -> None:
    """Sends the rest of a stream's output nowhere: else Python tries to write it when it ends, and complains."""
    if stream is None:
        return
    with contextlib.suppress(*FAILURES), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def format_epoch(row: EpochMetrics, num_epochs: int, tested: str) -> str:
    """An epoch's line. Args: tested says on what: 'test' or 'held-out'."""
    return (
        f"epoch {row.epoch:{len(str(num_epochs))}}/{num_epochs}"
        f"  train loss {row.train_loss:.4f} accuracy {row.train_accuracy:7.2%}"
        f"  {tested} loss {row.test_loss:.4f} accuracy {row.test_accuracy:7.2%}"
        f"  lr {row.learning_rate:.3g}  {row.seconds:.1f} s  {row.images_per_second:,.0f} images/s"
    )


class ProgressBar:
    """A bar over the steps of an epoch; nothing where stderr is no terminal."""

    def __init__(self, description: str, total: int, start: int) -> None:
        options = {"total": total, "initial": start, "desc": description, "unit": "step", "leave": False}
        try:
            self._bar = tqdm(**options, disable=None if sys.stderr else True)  # None: where it is no terminal
        except FAILURES:
            silence(sys.stderr)
            self._bar = tqdm(disable=True)

    def update(self, count: int, loss: jax.Array | None) -> None:
        """Advances by `count` steps, and shows a loss that is at hand."""
        if self._bar.disable:
            return
        try:
            if loss is not None:
                self._bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            self._bar.update(count)
        except FAILURES:
            silence(sys.stderr)
            self.close()  # else it is drawn again with each line

    def close(self) -> None:
        with contextlib.suppress(*FAILURES):
            self._bar.close()


@contextlib.contextmanager
def progress_bar(description: str, total: int, start: int) -> Iterator[ProgressBar]:
    """A ProgressBar that is closed at the end."""
    bar = ProgressBar(description, total, start)
    try:
        yield bar
    finally:
        bar.close()
