"""The small run that faults disturb, and the result of the undisturbed run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from cifar_jax import plots, trainer, training
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.configs.base import Config
from cifar_jax.datasets import Dataset, load_dataset
from cifar_jax.errors import UserError
from cifar_jax.metrics import read_batch_loss, read_metrics
from cifar_jax.ops import winograd
from cifar_jax.outcomes import Interrupted
from cifar_jax.parallel import replicate
from cifar_jax.train import train_and_evaluate
from cifar_jax.train_step import create_train_state

IDENTICAL = "ends bit-identical"
REFUSED = "refused in one line"
STEPS_PER_EPOCH = 3
XLA_FLAGS = "--xla_backend_optimization_level=0"  # compiled quickly rather than well

Stop = Callable[[], bool]


class Skipped(Exception):
    """The fault can't be injected on this machine. The text is the reason."""


def never() -> bool:
    return False


def tiny_config(workdir: Path | str) -> Config:
    """Returns a config of LeNet-5: 3 epochs of 3 steps with random dropout, order and augmentation."""
    return Config(
        workdir=str(workdir),
        dataset="digits",
        model="lenet5",
        dropout_rates=(0.2, 0.2),
        input_scaling="symmetric",
        batch_size=16,
        num_epochs=3,
        learning_rate=0.02,
        nesterov=True,
        crop_padding=2,
        random_flip=True,
        eval_batch_size=16,
        num_devices=1,
        steps_per_call=1,
    )


def tiny_dataset() -> Dataset:
    """Returns 48 training and 16 test digits."""
    digits = load_dataset("digits")
    return Dataset(
        digits.train_images[:48],
        digits.train_labels[:48],
        digits.test_images[:16],
        digits.test_labels[:16],
        digits.info,
        "48 digits",
    )


@contextlib.contextmanager
def quickly_compiled() -> Iterator[None]:
    """Context without Winograd's form of convolutions, which halves the compile time of a step."""
    with mock.patch.object(winograd, "pays", return_value=False):
        yield


class _WarmTrainer(trainer.Trainer):
    """Trainer that shares its compiled programs among all runs."""

    programs: dict[Any, dict[Any, Any]] = {}  # noqa: RUF012

    def __init__(self, config: Config, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        key = dataclasses.replace(config, workdir="-")
        self._compiled = self.programs.setdefault(key, {})


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """Captures output, including that of C libraries. Yields: a function that returns the text of stderr so far."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors, open(os.devnull, "w") as output:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        stream = os.fdopen(os.dup(2), "w", buffering=1)

        def text() -> str:
            size = os.fstat(errors.fileno()).st_size
            return os.pread(errors.fileno(), size, 0).decode(errors="replace")

        try:
            with stream, contextlib.redirect_stdout(output), contextlib.redirect_stderr(stream):
                yield text
        finally:
            for number, descriptor in enumerate(saved, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class End:
    """The end of a run: 'ended', 'stopped', 'refused' or the type of a bug; the texts of stderr and of the error."""

    how: str
    errors: str
    message: str = ""

    @property
    def lines(self) -> list[str]:
        return self.errors.splitlines()


class Lab:
    """Trains in this process, with programs compiled once, and compares with an undisturbed run.

    Attributes:
      expected: the `fingerprint` of the undisturbed run.
      half: the folder of a run that was stopped after the second of its three epochs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.dataset = folder, tiny_dataset()
        self._count = 0
        self._evaluators: dict[Any, Any] = {}
        self._states: dict[Any, Any] = {}
        whole, self.half = folder / "whole", folder / "half"
        self._must_be("ended", self.train(whole))
        self.expected = self.fingerprint(whole)
        second = self.half / "checkpoints" / "2" / "sha256.json"
        self._must_be("stopped", self.train(self.half, second.exists))

    @staticmethod
    def _must_be(how: str, end: End) -> None:
        if end.how != how:
            raise UserError(f"the undisturbed run fails: {end.how} {end.message}")

    def new_folder(self, copy_of: Path | None = None) -> Path:
        """Returns the path of a folder that does not exist yet, or a copy of a folder."""
        self._count += 1
        folder = self.folder / f"run{self._count}"
        if copy_of is not None:
            shutil.copytree(copy_of, folder)
        return folder

    def train(self, workdir: Path | str, stop: Stop = never, **changes: Any) -> End:
        """Trains or resumes the run in a folder, with changed settings."""
        config = dataclasses.replace(tiny_config(workdir), **changes)
        message = ""
        with captured() as errors, quickly_compiled(), self._warm():
            try:
                train_and_evaluate(config, self.dataset, stop)
                how = "ended"
            except Interrupted:
                how = "stopped"
            except UserError as error:
                how, message = "refused", str(error)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                how = f"{type(error).__name__} in {where.name}"
            return End(how, errors(), message)

    def finish(self, workdir: Path, **changes: Any) -> str:
        """Resumes a run to its end and removes its folder. Returns: the outcome."""
        end = self.train(workdir, **changes)
        outcome = self.outcome(end, workdir)
        shutil.rmtree(workdir, ignore_errors=True)
        return outcome

    def outcome(self, end: End, workdir: Path) -> str:
        """Returns IDENTICAL or REFUSED, else what is wrong."""
        if "Traceback" in end.errors:
            return f"prints a traceback, {end.lines[-1][:100]}"
        if end.how == "refused":
            return REFUSED if "\n" not in end.message else "refused in several lines"
        if end.how != "ended":
            return end.how
        found = self.fingerprint(workdir)
        other = [name for name, value in self.expected.items() if found[name] != value]
        return f"other {', '.join(other)}" if other else IDENTICAL

    def fingerprint(self, workdir: Path) -> dict[str, str]:
        """Returns checksums of the latest checkpoint's state, metrics.csv without times, and batch_loss.npy."""
        config = tiny_config(workdir)
        state = self._create_state(config, STEPS_PER_EPOCH, self.dataset.train_images)
        state = replicate(state, jax.local_devices()[:1])
        state, progress = Checkpoints(workdir).restore_state("latest", state)
        rows = [dataclasses.replace(row, seconds=0, images_per_second=0) for row in read_metrics(workdir)]
        arrays = {
            "parameters": jax.tree.leaves(state.params),
            "optimizer": [*jax.tree.leaves(state.opt_state), state.step, jax.random.key_data(state.rng)],
            "batch_loss.npy": [read_batch_loss(workdir)],
        }
        sums = {name: hashlib.sha256() for name in arrays}
        for name, leaves in arrays.items():
            for leaf in leaves:
                sums[name].update(np.asarray(leaf).tobytes())
        texts = {"metrics.csv": repr(rows), "progress": repr(progress[:2])}
        return {name: value.hexdigest() for name, value in sums.items()} | texts

    @contextlib.contextmanager
    def _warm(self) -> Iterator[None]:
        """Context that reuses programs, evaluators and initial states, and draws no figures."""
        with (
            mock.patch.object(training, "Trainer", _WarmTrainer),
            mock.patch.object(training, "Evaluator", self._evaluator),
            mock.patch.object(trainer, "create_train_state", self._create_state),
            mock.patch.object(plots, "plot_run"),
        ):
            yield

    def _evaluator(self, config: Config, state: Any, images: np.ndarray, labels: np.ndarray, devices: Any) -> Any:
        key = dataclasses.replace(config, workdir="-")
        if key not in self._evaluators:
            self._evaluators[key] = trainer.Evaluator(config, state, images, labels, devices)
        return self._evaluators[key]

    def _create_state(self, config: Config, steps_per_epoch: int, images: Any) -> Any:
        """Returns a copy, because training donates its state's buffers."""
        key = dataclasses.replace(config, workdir="-", num_devices=1)
        if key not in self._states:
            self._states[key] = create_train_state(config, steps_per_epoch, images)
        return jax.tree.map(lambda leaf: leaf.copy(), self._states[key])
