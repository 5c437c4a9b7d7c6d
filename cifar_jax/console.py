"""Console output of training. A failing console (a closed window, a full disk) never stops a run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

import jax
from tqdm import tqdm

from cifar_jax.metrics import EpochMetrics

# The terminal or the reader of a pipe is gone; the stream is closed; tqdm meets a bar that is being deleted.
FAILURES = (OSError, ValueError, RuntimeError)


def is_main() -> bool:
    """Tells whether this is process 0 of several, or the only process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(text: str, *, error: bool = False, everywhere: bool = False) -> None:
    """Prints a line on stdout or stderr, above any progress bar, in process 0 alone unless `everywhere`."""
    stream = sys.stderr if error else sys.stdout
    if stream is None or not (everywhere or is_main()):  # None: closed before Python started
        return
    line, written = f"{text}\n", False
    try:
        with tqdm.external_write_mode(file=stream):
            try:
                stream.write(line)
            except UnicodeEncodeError:  # commands prevent it, and programs that call functions may not
                stream.write(line.encode(stream.encoding, "replace").decode(stream.encoding))
            written = True
    except FAILURES:  # either the stream or the progress bar's terminal fails
        try:
            if not written:
                stream.write(line)
        except FAILURES:
            silence(stream)


def silence(stream: TextIO | None) -> None:
    """Redirects a failed stream to the null device. Otherwise Python writes its rest at exit and reports an error."""
    if stream is None:
        return
    with contextlib.suppress(*FAILURES), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def format_epoch(row: EpochMetrics, num_epochs: int, tested: str) -> str:
    """Formats an epoch's line. Args: tested: the set that was tested on, 'test' or 'held-out'."""
    return (
        f"epoch {row.epoch:{len(str(num_epochs))}}/{num_epochs}"
        f"  train loss {row.train_loss:.4f} accuracy {row.train_accuracy:7.2%}"
        f"  {tested} loss {row.test_loss:.4f} accuracy {row.test_accuracy:7.2%}"
        f"  lr {row.learning_rate:.3g}  {row.seconds:.1f} s  {row.images_per_second:,.0f} images/s"
    )


class ProgressBar:
    """Progress bar over an epoch's steps. It shows nothing if stderr is not a terminal."""

    def __init__(self, description: str, total: int, start: int) -> None:
        options = {"total": total, "initial": start, "desc": description, "unit": "step", "leave": False}
        try:
            shown = sys.stderr and is_main()
            self._bar = tqdm(**options, disable=None if shown else True)  # None: disabled without a terminal
        except FAILURES:
            silence(sys.stderr)
            self._bar = tqdm(disable=True)

    def update(self, count: int, loss: jax.Array | None) -> None:
        """Advances by `count` steps and shows the loss, a float32 scalar, if given."""
        if self._bar.disable:
            return
        try:
            if loss is not None:
                self._bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            self._bar.update(count)
        except FAILURES:
            silence(sys.stderr)
            self.close()  # otherwise each printed line redraws it

    def close(self) -> None:
        with contextlib.suppress(*FAILURES):
            self._bar.close()


@contextlib.contextmanager
def progress_bar(description: str, total: int, start: int) -> Iterator[ProgressBar]:
    """Yields a ProgressBar and closes it at the end."""
    bar = ProgressBar(description, total, start)
    try:
        yield bar
    finally:
        bar.close()
