"""A run's Orbax checkpoints: the latest two, from which it resumes bit for bit, and the best by test accuracy."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from cifar_jax.checksums import find_damage, write_checksums
from cifar_jax.console import say
from cifar_jax.errors import UserError
from cifar_jax.metrics import EpochMetrics, RunLog
from cifar_jax.preservation import LatestTwoAndBest
from cifar_jax.train_step import Metrics, TrainState


class Progress(NamedTuple):
    """How far a run is: `epoch` epochs are complete, evaluated and logged, and `step` steps of the next are taken.

    `seconds` is the training time spent on those steps, without compilation and evaluation.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0


class Restored(NamedTuple):
    """What a run resumes from."""

    state: TrainState
    history: Metrics
    progress: Progress
    log: RunLog


class DamagedCheckpoint(UserError):
    """A checkpoint that can't be used."""


_MARGIN = 1.2  # room on the disk for a checkpoint, in sizes of its arrays
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ITEMS = ("state", "history", "batch_loss", "progress")


def _padded(losses: np.ndarray) -> np.ndarray:
    """With one number more, as Orbax saves no empty array."""
    return np.append(losses, np.float32(0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what Orbax' threads print about a failure, then and later, from the terminal: it is raised as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook
    sys.unraisablehook = lambda _: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    yield
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


class Checkpoints:
    """The checkpoints in WORKDIR/checkpoints, numbered by save. Raises UserError if they can't be read or written."""

    def __init__(self, workdir: Path) -> None:
        self.directory = (workdir / "checkpoints").absolute()
        if re.search(r"[][*?\\\ud800-\udfff]", str(self.directory)):  # Orbax takes it for a pattern, and loses arrays
            raise UserError(
                f"{workdir}: checkpoints can't lie below a folder whose name has [, ], *, ?, \\ or is not UTF-8: "
                "name another --workdir"
            )
        self._kept = LatestTwoAndBest()
        try:
            self._open()
        except Exception as error:  # whatever Orbax raises
            raise UserError(f"{self.directory}: can't open them ({error}): use another --workdir") from error

    def _open(self) -> None:
        """Finds the checkpoints on the disk, and which is the best of those whose accuracy can be read."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            enable_async_checkpointing=False,
            create=False,
            lightweight_initialize=True,  # else damaged metadata of one keep it from listing the others
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=_ITEMS)
        self._numbers = sorted(self._manager.all_steps())
        self._kept.accuracies.clear()
        self._unreadable: list[UserError] = []
        for number in self._numbers:
            try:
                with self._reading(number):
                    saved = self._restore(number, progress=ocp.args.JsonRestore()).progress
                    _progress(saved)  # raises if it is not whole
                    self._kept.add(number, saved.get("test_accuracy"))
            except UserError as error:
                self._unreadable.append(error)

    def save(
        self, state: TrainState, history: Metrics, progress: Progress, log: RunLog, test_accuracy: float | None
    ) -> None:
        """Saves; then older checkpoints go, except the one before and the best. Without an accuracy it can't be best.

        Raises: UserError if there is no room, or it can't be written; what was saved before stays.
        """
        number = max(self._numbers, default=0) + 1
        rows = [dataclasses.asdict(row) for row in log.rows]
        described = {"test_accuracy": test_accuracy, "rows": rows, "num_losses": len(log.batch_loss)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            history=ocp.args.StandardSave(history),
            batch_loss=ocp.args.StandardSave({"batch_loss": _padded(log.batch_loss)}),
            progress=ocp.args.JsonSave({**progress._asdict(), **described}),
        )
        folder = self.directory / str(number)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            needed = _MARGIN * sum(leaf.nbytes for leaf in jax.tree.leaves((state, history, log.batch_loss)))
            if shutil.disk_usage(self.directory).free < needed:
                raise OSError(errno.ENOSPC, f"it needs {needed / 2**20:.0f} MiB, which the disk lacks")
            with _quiet():
                self._kept.add(number, test_accuracy)
                self._manager.save(number, args=items)
                write_checksums(folder)
        except Exception as error:
            full = getattr(error, "errno", None) in _FULL or "ENOSPC" in str(error)  # the latter is TensorStore's
            advice = "make room" if full else "see that it can be written"
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.directory}: can't save ({reason}): {advice}, then start again to resume") from error
        self._numbers.append(number)

    def restore_run(self, state: TrainState, history: Metrics) -> Restored | None:
        """The latest checkpoint that is whole, None if there are none. The arguments give shapes and placement.

        Damaged ones are set aside, and said on stderr. Raises: UserError if all are damaged.
        """
        failures: list[DamagedCheckpoint] = []
        for number in reversed(self._numbers):
            try:
                with self._reading(number):
                    restored = self._restore_run(number, state, history)
            except DamagedCheckpoint as error:
                failures.append(error)
                continue
            for failure, damaged in zip(failures, reversed(self._numbers)):
                aside = self._set_aside(damaged)
                where = f"{restored.progress.epoch} epochs and {restored.progress.step} steps"
                _warn(f"{failure}: kept as {aside}; resuming from the checkpoint before it, after {where}")
            if failures:
                self._open()
            return restored
        if failures:
            raise UserError(f"{failures[0]}, and no other checkpoint is whole: name another --workdir")
        return None

    def _set_aside(self, number: int) -> str:
        """Renames a checkpoint, so that it is kept and no longer counted as one. Returns: its folder's name."""
        folder, names = self.directory / str(number), (f"damaged-{number}{'+' * again}" for again in itertools.count())
        free = next(name for name in names if not (self.directory / name).exists())
        with contextlib.suppress(OSError):
            folder.rename(self.directory / free)
            return free
        return folder.name

    def _restore_run(self, number: int, state: TrainState, history: Metrics) -> Restored:
        log = self._restore(number, progress=ocp.args.JsonRestore()).progress
        batch_loss = {"batch_loss": _padded(np.zeros(log["num_losses"], np.float32))}
        items = self._restore(
            number,
            state=ocp.args.StandardRestore(state),
            history=ocp.args.StandardRestore(history),
            batch_loss=ocp.args.StandardRestore(batch_loss),
        )
        rows = [EpochMetrics(**row) for row in log["rows"]]
        sum(map(sum, map(dataclasses.astuple, rows)))  # raises TypeError if one is no number
        losses = np.asarray(items.batch_loss["batch_loss"])[:-1]
        return Restored(items.state, items.history, _progress(log), RunLog(rows, losses))

    def restore_state(self, which: Literal["best", "latest"], state: TrainState) -> tuple[TrainState, Progress]:
        """The best or the latest checkpoint's state, and how far the run was. Nothing is changed on the disk.

        Damaged ones are passed over, and said on stderr. Raises: UserError if none is there, or whole.
        """
        numbers, failures = self._numbers[::-1], []
        if which == "best":
            numbers, failures = self._kept.by_accuracy(), list(self._unreadable)
        for number in numbers:
            try:
                with self._reading(number):
                    log = self._restore(number, progress=ocp.args.JsonRestore()).progress
                    items = self._restore(number, state=ocp.args.StandardRestore(state))
                    restored = items.state, _progress(log)
            except DamagedCheckpoint as error:
                failures.append(error)
                continue
            if failures:
                others = "the best of the others" if which == "best" else "the checkpoint before it"
                _warn(f"{failures[0]}: taking {others}")
            return restored
        if failures:
            untried = len(failures) < len(self._numbers)  # those without an accuracy
            advice = "try --checkpoint latest" if untried else "no other checkpoint is whole"
            raise UserError(f"{failures[0]}: {advice}")
        raise UserError(f"{self.directory}: no {which} checkpoint yet: train for an epoch first")

    def _restore(self, number: int, **items: Any) -> Any:
        return self._manager.restore(number, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Raises: DamagedCheckpoint for a wrong checksum or any error within; UserError if the checkpoint is gone."""
        folder = self.directory / str(number)
        try:
            if (damaged := find_damage(folder)) is not None:  # Orbax lets some changed bytes through
                raise DamagedCheckpoint(f"{damaged}: damaged or missing")
            with _quiet():
                yield
        except Exception as error:  # whatever Orbax and TensorStore raise
            if not folder.exists():
                raise UserError(f"{folder}: replaced by a training that is under way: try again") from error
            if isinstance(error, UserError):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DamagedCheckpoint(f"{folder}: damaged, or of another model ({reason})") from error


def _progress(saved: dict[str, Any]) -> Progress:
    return Progress(int(saved["epoch"]), int(saved["step"]), float(saved["seconds"]))


def _warn(text: str) -> None:
    say(f"warning: {text}", error=True)
