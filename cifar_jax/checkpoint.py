"""Saves and restores a run's Orbax checkpoints: the latest two, and the best by test accuracy."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from cifar_jax.checksums import find_damage, write_checksums
from cifar_jax.console import say
from cifar_jax.errors import UserError, one_line
from cifar_jax.keys import plain, with_keys
from cifar_jax.metrics import EpochMetrics, RunLog
from cifar_jax.orbax_io import alone, error_number, quiet, systems_error
from cifar_jax.preservation import LatestTwoAndBest
from cifar_jax.train_step import Metrics, TrainState


class Progress(NamedTuple):
    """A run's position: `epoch` epochs are trained, evaluated and logged; `step` steps of the next one are done.

    `seconds` is the training time of those steps, without compilation and evaluation.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0


class Restored(NamedTuple):
    """Everything from which a run resumes."""

    state: TrainState
    history: Metrics
    progress: Progress
    log: RunLog


class DamagedCheckpoint(UserError):
    """A checkpoint that can't be read."""


_MARGIN = 1.2  # free disk space needed to save, relative to the size of the arrays
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ITEMS = ("state", "history", "batch_loss", "progress")


def _padded(losses: np.ndarray) -> np.ndarray:
    """Appends one number, because Orbax can't save an empty array."""
    return np.append(losses, np.float32(0))


class Checkpoints:
    """The checkpoints in WORKDIR/checkpoints, numbered in order of saving. Raises: UserError if listing them fails."""

    def __init__(self, workdir: Path) -> None:
        self.directory = (workdir / "checkpoints").absolute()
        if re.search(r"[][*?\\\ud800-\udfff]", str(self.directory)):  # Orbax reads it as a pattern and loses arrays
            raise UserError(
                f"{workdir}: checkpoints can't be saved in a path that contains [, ], *, ?, \\ or is not UTF-8: "
                "name another --workdir"
            )
        self._kept = LatestTwoAndBest()
        try:
            self._open()
        except Exception as error:  # Orbax raises many types
            if (systems := systems_error(error, self.directory)) is not None:
                raise systems from None
            raise UserError(f"{self.directory}: can't open them ({error}): use another --workdir") from error

    def _open(self) -> None:
        """Lists the checkpoints on disk and finds the best of those whose accuracy can be read."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept,
            enable_async_checkpointing=False,
            create=False,
            lightweight_initialize=True,  # otherwise damaged metadata of one checkpoint hide the others
            multiprocessing_options=alone(),
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
        """Saves a checkpoint, then removes all except the latest two and the best.

        Args: test_accuracy: from 0 to 1; None: this checkpoint never becomes the best.
        Raises: UserError if the disk is full or can't be written. Earlier checkpoints stay.
        """
        number = max(self._numbers, default=0) + 1
        rows = [dataclasses.asdict(row) for row in log.rows]
        described = {"test_accuracy": test_accuracy, "rows": rows, "num_losses": len(log.batch_loss)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(plain(state)),
            history=ocp.args.StandardSave(plain(history)),
            batch_loss=ocp.args.StandardSave({"batch_loss": _padded(log.batch_loss)}),
            progress=ocp.args.JsonSave({**progress._asdict(), **described}),
        )
        folder = self.directory / str(number)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            needed = _MARGIN * sum(leaf.nbytes for leaf in jax.tree.leaves((state, history, log.batch_loss)))
            if shutil.disk_usage(self.directory).free < needed:
                raise OSError(errno.ENOSPC, f"it needs {needed / 2**20:.0f} MiB of free space")
            with quiet():
                self._kept.add(number, test_accuracy)
                self._manager.save(number, args=items)
                write_checksums(folder)
        except Exception as error:
            advice = "free disk space" if error_number(error) in _FULL else "make it writable"
            reason = one_line(error)
            raise UserError(f"{self.directory}: can't save ({reason}): {advice}, then run again to resume") from error
        self._numbers.append(number)

    def restore_run(self, state: TrainState, history: Metrics) -> Restored | None:
        """Restores the latest intact checkpoint; None if there is none. The arguments give shapes and placement.

        Damaged checkpoints are renamed, with a warning on stderr. Raises: UserError if all are damaged.
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
                _warn(f"{failure}: renamed to {aside}; resuming from the previous checkpoint, after {where}")
            if failures:
                self._open()
            return restored
        if failures:
            raise UserError(f"{failures[0]}, and no other checkpoint is intact: name another --workdir")
        return None

    def _set_aside(self, number: int) -> str:
        """Renames a damaged checkpoint so that it no longer counts as one. Returns: its folder's new name."""
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
            state=ocp.args.StandardRestore(plain(state)),
            history=ocp.args.StandardRestore(plain(history)),
            batch_loss=ocp.args.StandardRestore(batch_loss),
        )
        rows = [EpochMetrics(**row) for row in log["rows"]]
        sum(map(sum, map(dataclasses.astuple, rows)))  # raises TypeError if one is no number
        losses = np.asarray(items.batch_loss["batch_loss"])[:-1]
        return Restored(with_keys(items.state, state), items.history, _progress(log), RunLog(rows, losses))

    def restore_state(self, which: Literal["best", "latest"], state: TrainState) -> tuple[TrainState, Progress]:
        """Returns the best or latest checkpoint's (state, progress). The disk is not changed.

        Damaged checkpoints are skipped, with a warning on stderr. Raises: UserError if there is no intact one.
        """
        candidates, passed_over = self._numbers[::-1], []
        if which == "best":  # without those whose accuracy could not be read
            candidates, passed_over = self._kept.by_accuracy(), list(self._unreadable)
        for number in candidates:
            try:
                with self._reading(number):
                    log = self._restore(number, progress=ocp.args.JsonRestore()).progress
                    items = self._restore(number, state=ocp.args.StandardRestore(plain(state)))
                    restored = with_keys(items.state, state), _progress(log)
            except DamagedCheckpoint as error:
                passed_over.append(error)
                continue
            if passed_over:
                used = "the best intact checkpoint" if which == "best" else "the previous checkpoint"
                _warn(f"{passed_over[0]}: using {used}")
            return restored
        if passed_over:
            may_be_intact = len(passed_over) < len(self._numbers)  # checkpoints without an accuracy were not tried
            advice = "try --checkpoint latest" if may_be_intact else "no other checkpoint is intact"
            raise UserError(f"{passed_over[0]}: {advice}")
        raise UserError(f"{self.directory}: no {which} checkpoint yet: train for at least one epoch")

    def _restore(self, number: int, **items: Any) -> Any:
        return self._manager.restore(number, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, number: int) -> Iterator[None]:
        """Raises: DamagedCheckpoint for a wrong checksum or any error within; UserError if the checkpoint is gone."""
        folder = self.directory / str(number)
        try:
            if (damaged := find_damage(folder)) is not None:  # Orbax misses some changed bytes
                raise DamagedCheckpoint(f"{damaged}: damaged or missing")
            with quiet():
                yield
        except Exception as error:  # Orbax and TensorStore raise many types
            if not folder.exists():
                raise UserError(f"{folder}: removed by a training run in progress: try again") from error
            if isinstance(error, UserError):
                raise
            if (systems := systems_error(error, folder)) is not None:
                raise systems from None
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise DamagedCheckpoint(f"{folder}: damaged, or saved from another model ({reason})") from error


def _progress(saved: dict[str, Any]) -> Progress:
    return Progress(int(saved["epoch"]), int(saved["step"]), float(saved["seconds"]))


def _warn(text: str) -> None:
    say(f"warning: {text}", error=True)
