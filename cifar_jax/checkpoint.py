"""A run's Orbax checkpoints: the latest two, from which it resumes bit for bit, and the best by test accuracy."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cifar_jax.console import say
from cifar_jax.errors import UserError
from cifar_jax.io import read_json, write_json
from cifar_jax.metrics import EpochMetrics, RunLog
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


_CHECKSUMS = "sha256.json"
_MARGIN = 1.2  # room on the disk for a checkpoint, in sizes of its arrays
_ITEMS = ("state", "history", "batch_loss", "progress")


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _CHECKSUMS)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _verify(folder: Path) -> None:
    """Raises DamagedCheckpoint if a checkpoint's files are not those that were saved.

    Orbax lets some changed bytes through, and for others prints the tracebacks of its threads.
    """
    try:
        saved = read_json(folder / _CHECKSUMS)
    except (OSError, ValueError):  # the save was cut between Orbax' commit and ours; Orbax vouches for it
        return
    actual = _checksums(folder)
    wrong = next((name for name in saved if saved[name] != actual.get(name)), None)
    if wrong is not None:
        raise DamagedCheckpoint(f"{folder / wrong}: damaged or missing")


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["test_accuracy"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what Orbax' threads print about a failure from the terminal: it is raised as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
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
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(2),
                checkpoint_managers.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=_accuracy, enable_async_checkpointing=False, create=False
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=_ITEMS)
            self._numbers, self._best = sorted(self._manager.all_steps()), self._manager.best_step()
        except Exception as error:  # Orbax reads every checkpoint's metadata here, and passes on what that raises
            raise UserError(f"{self.directory}: can't open the checkpoints ({error}): use another --workdir") from error

    def save(
        self, state: TrainState, history: Metrics, progress: Progress, log: RunLog, test_accuracy: float | None
    ) -> None:
        """Saves; then older checkpoints go, except the one before and the best. Without an accuracy it can't be best.

        Raises: UserError if there is no room, or it can't be written; what was saved before stays.
        """
        number = max(self._numbers, default=0) + 1
        rows = [dataclasses.asdict(row) for row in log.rows]
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            history=ocp.args.StandardSave(history),
            batch_loss=ocp.args.StandardSave({"batch_loss": log.batch_loss}),
            progress=ocp.args.JsonSave({**progress._asdict(), "rows": rows, "num_losses": len(log.batch_loss)}),
        )
        metrics = None if test_accuracy is None else {"test_accuracy": test_accuracy}
        folder = self.directory / str(number)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            needed = _MARGIN * sum(leaf.nbytes for leaf in jax.tree.leaves((state, history, log.batch_loss)))
            if shutil.disk_usage(self.directory).free < needed:
                raise OSError(f"it needs {needed / 2**20:.0f} MiB and the disk is full")
            with _quiet():
                self._manager.save(number, args=items, metrics=metrics)
                write_json(folder / _CHECKSUMS, _checksums(folder))
        except Exception as error:  # a full disk is an OSError or TensorStore's ValueError
            raise UserError(f"{self.directory}: can't save ({error}): make room, then start again to resume") from error
        self._numbers.append(number)

    def restore_run(self, state: TrainState, history: Metrics) -> Restored | None:
        """The latest checkpoint that is whole, None if there are none. The arguments give shapes and placement.

        Damaged ones are set aside, and said on stderr. Raises: UserError if all are damaged.
        """
        failures: list[DamagedCheckpoint] = []
        for number in reversed(self._numbers):
            try:
                restored = self._restore_run(number, state, history)
            except DamagedCheckpoint as error:
                failures.append(error)
                continue
            for failure, damaged in zip(failures, reversed(self._numbers)):
                with contextlib.suppress(OSError):  # kept, but no longer counted as a checkpoint
                    (self.directory / str(damaged)).rename(self.directory / f"damaged-{damaged}")
                progress = restored.progress
                where = f"{progress.epoch} epochs and {progress.step} steps"
                _warn(f"{failure}: kept as damaged-{damaged}; resuming from the checkpoint before it, after {where}")
            if failures:
                self._manager.reload()
                self._numbers, self._best = sorted(self._manager.all_steps()), self._manager.best_step()
            return restored
        if failures:
            raise UserError(f"{failures[0]}, and no other checkpoint is whole: name another --workdir")
        return None

    def _restore_run(self, number: int, state: TrainState, history: Metrics) -> Restored:
        log = self._restore(number, progress=ocp.args.JsonRestore()).progress
        batch_loss = {"batch_loss": np.zeros(log["num_losses"], np.float32)}
        items = self._restore(
            number,
            state=ocp.args.StandardRestore(state),
            history=ocp.args.StandardRestore(history),
            batch_loss=ocp.args.StandardRestore(batch_loss),
        )
        rows = [EpochMetrics(**row) for row in log["rows"]]
        losses = np.asarray(items.batch_loss["batch_loss"])
        return Restored(items.state, items.history, _progress(log), RunLog(rows, losses))

    def restore_state(self, which: Literal["best", "latest"], state: TrainState) -> tuple[TrainState, Progress]:
        """The best or the latest checkpoint's state, and how far the run was. Nothing is changed on the disk.

        A damaged latest one is passed over, and said on stderr. Raises: UserError if none is there, or whole.
        """
        numbers = [self._best] if which == "best" else list(reversed(self._numbers))
        if not numbers or numbers[0] is None:
            raise UserError(f"{self.directory}: no {which} checkpoint yet: train for an epoch first")
        failure = None
        for number in numbers:
            try:
                items = self._restore(number, state=ocp.args.StandardRestore(state), progress=ocp.args.JsonRestore())
            except DamagedCheckpoint as error:
                failure = failure or error
                continue
            if failure is not None:
                _warn(f"{failure}: taking the checkpoint before it")
            return items.state, _progress(items.progress)
        advice = "use --checkpoint latest" if which == "best" else "no other checkpoint is whole"
        raise UserError(f"{failure}: {advice}") from failure

    def _restore(self, number: int, **items: Any) -> Any:
        folder = self.directory / str(number)
        try:
            _verify(folder)
            with _quiet():
                return self._manager.restore(number, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever Orbax and TensorStore raise
            if not folder.exists():
                raise UserError(f"{folder}: replaced by a training that is under way: try again") from error
            if isinstance(error, UserError):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DamagedCheckpoint(f"{folder}: damaged, or of another model ({reason})") from error


def _progress(saved: dict[str, Any]) -> Progress:
    return Progress(saved["epoch"], saved["step"], saved["seconds"])


def _warn(text: str) -> None:
    say(f"warning: {text}", error=True)
