"""A run's Orbax checkpoints: the latest, from which it resumes bit for bit, and the best by test accuracy."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cifar_jax.errors import UserError
from cifar_jax.io import write_json
from cifar_jax.train_step import Metrics, TrainState


class Progress(NamedTuple):
    """How far a run is: `epoch` epochs are complete, evaluated and logged, and `step` steps of the next are taken.

    `seconds` is the training time spent on those steps, without compilation and evaluation.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0


_CHECKSUMS = "sha256.json"


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _CHECKSUMS)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _verify(folder: Path) -> None:
    """Raises UserError if a checkpoint's files are not those that were saved.

    Orbax lets some changed bytes through, and for others prints the tracebacks of its threads.
    """
    try:
        saved = dict(json.loads((folder / _CHECKSUMS).read_text()))
    except (OSError, ValueError, TypeError):  # the save was cut between Orbax' commit and ours; Orbax vouches for it
        return
    actual = _checksums(folder)
    wrong = next((name for name in saved if saved[name] != actual.get(name)), None)
    if wrong is not None:
        raise UserError(
            f"{folder / wrong}: damaged or missing: move {folder} away to go on from another checkpoint if there is "
            "one, else from the start; or use another --workdir"
        )


def _accuracy(metrics: dict[str, float]) -> float:
    return metrics["test_accuracy"]


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
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=_accuracy, enable_async_checkpointing=False, create=False
        )
        names = ("state", "history", "progress")
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=names)
            self._latest, self._best = self._manager.latest_step(), self._manager.best_step()
        except Exception as error:  # Orbax reads every checkpoint's metadata here, and passes on what that raises
            for folder in self.directory.glob("[0-9]*"):
                _verify(folder)  # names the culprit
            raise UserError(f"{self.directory}: can't open the checkpoints ({error}): use another --workdir") from error

    def save(self, state: TrainState, history: Metrics, progress: Progress, test_accuracy: float | None) -> None:
        """Saves; then older checkpoints go, but for the best. Without an accuracy it can't be the best."""
        self._latest = (self._latest or 0) + 1
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            history=ocp.args.StandardSave(history),
            progress=ocp.args.JsonSave(progress._asdict()),
        )
        metrics = None if test_accuracy is None else {"test_accuracy": test_accuracy}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager.save(self._latest, args=items, metrics=metrics)
            folder = self.directory / str(self._latest)
            write_json(folder / _CHECKSUMS, _checksums(folder))
        except Exception as error:  # a full disk is an OSError or TensorStore's ValueError
            raise UserError(f"{self.directory}: can't save ({error}): make room, then start again to resume") from error

    def restore_run(self, state: TrainState, history: Metrics) -> tuple[TrainState, Metrics, Progress] | None:
        """The latest checkpoint, to resume from; None if there is none. The arguments give shapes and placement."""
        if self._latest is None:
            return None
        items, progress = self._restore(
            self._latest, state=ocp.args.StandardRestore(state), history=ocp.args.StandardRestore(history)
        )
        return items.state, items.history, progress

    def restore_state(self, which: Literal["best", "latest"], state: TrainState) -> tuple[TrainState, Progress]:
        """The best or the latest checkpoint's state, and how far the run was."""
        number = self._best if which == "best" else self._latest
        if number is None:
            raise UserError(f"{self.directory}: no {which} checkpoint yet: train for an epoch first")
        items, progress = self._restore(number, state=ocp.args.StandardRestore(state))
        return items.state, progress

    def _restore(self, number: int, **items: Any) -> Any:
        folder = self.directory / str(number)
        items["progress"] = ocp.args.JsonRestore()
        try:
            _verify(folder)
            restored = self._manager.restore(number, args=ocp.args.Composite(**items))
            return restored, Progress(**restored.progress)
        except Exception as error:  # whatever Orbax and TensorStore raise
            if not folder.exists():
                raise UserError(f"{folder}: replaced by a training that is under way: try again") from error
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{folder}: damaged, or of another model ({type(error).__name__}: {str(error)[:200]}): "
                "move it away to go on from another checkpoint, or use another --workdir"
            ) from error
