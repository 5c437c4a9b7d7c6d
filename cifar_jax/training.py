"""Trains one run in its folder: resumes, trains epoch by epoch, tests, logs and saves."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_jax.checkpoint import Checkpoints, Progress
from cifar_jax.configs.base import Config
from cifar_jax.console import format_epoch, is_main, progress_bar, say
from cifar_jax.data_identity import check_same_data, identify
from cifar_jax.datasets import Dataset, hold_out, load_dataset, mix_classes
from cifar_jax.errors import one_line
from cifar_jax.io import write_json
from cifar_jax.loggers import Logger
from cifar_jax.metrics import EpochMetrics, RunLog, is_stalled
from cifar_jax.optimizer import create_schedule
from cifar_jax.outcomes import FailedTraining, Interrupted
from cifar_jax.parallel import local, share
from cifar_jax.processes import agree, any_of, check_same, on_main
from cifar_jax.profiler import Profiler
from cifar_jax.runs import probe_workdir, read_config, read_summary, summarize
from cifar_jax.steps import count_steps_per_epoch
from cifar_jax.teacher import compute_teacher_logits, identify_teacher, load_teacher
from cifar_jax.trainer import Evaluator, Trainer
from cifar_jax.weights.files import Weights


class Run:
    """One run of a recipe in a folder that this process has locked."""

    def __init__(
        self, config: Config, devices: list[jax.Device], dataset: Dataset | None, stop: Callable[[], bool]
    ) -> None:
        self.config, self.devices = config, devices
        self.stop = lambda: any_of(stop())
        self.workdir = Path(config.workdir)
        watched = config if is_main() else dataclasses.replace(config, logger="none", profile=0)
        self.logger = agree(lambda: Logger(watched))
        self.profiler = Profiler(self.workdir, watched.profile, lambda: jax.block_until_ready(self.trainer.state))
        load = lambda: mix_classes(dataset) if dataset else load_dataset(config.dataset, config.data_dir)
        self.dataset = agree(lambda: hold_out(load(), config.holdout))
        check_same("dataset", lambda: identify(self.dataset))
        if self.stop():
            raise Interrupted(Progress(), 0)
        self.num_classes = self.dataset.info.num_classes
        self.tested = "held-out" if config.holdout else "test"
        self.steps_per_epoch = count_steps_per_epoch(config, len(self.dataset.train_labels), len(devices))
        on_main(self._open_checkpoints)
        self.trainer = Trainer(config, self.dataset.train_images, self.dataset.train_labels, devices)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(self.trainer.state.eval_params))
        self.progress, self.log = Progress(), RunLog()

    def train(self) -> dict[str, Any]:
        """Trains from the run's current position to its last epoch. Returns: the content of summary.json."""
        config = self.config
        resumes = self._restore()
        self._introduce()
        if config.auto_restart and is_stalled(self.log.batch_loss, self.num_classes):
            raise self._stalled(self.progress.epoch)  # earlier calls without --auto-restart trained on after it stalled
        if (summary := on_main(lambda: self._complete(resumes))) is not None:
            return summary
        teacher = None if config.teacher is None else load_teacher(config.teacher, self.dataset.info)
        on_main(lambda: self._prepare(resumes, teacher))
        if not self.stop() and self._teach(teacher):
            with self.logger, self.profiler:
                self.logger.log(self.log.rows)
                self._train_epochs()
        summary = on_main(self._finish)
        if self.progress.epoch < config.num_epochs:
            raise Interrupted(self.progress, self.steps_per_epoch)
        say(
            f"{self.tested} accuracy {summary['test_accuracy']:.2%} after {self.progress.epoch} epochs, "
            f"{summary['training_seconds']:.0f} s of training; figures and summary.json in {self.workdir}"
        )
        return summary

    def _open_checkpoints(self) -> None:
        self.checkpoints = Checkpoints(self.workdir)

    def _restore(self) -> bool:
        """Restores the latest checkpoint. Returns: whether there was one."""
        trainer = self.trainer
        arrays = local((trainer.state, trainer.history))

        def read() -> tuple[Progress, RunLog] | None:
            nonlocal arrays
            if (restored := self.checkpoints.restore_run(*arrays)) is None:
                return None
            arrays = restored.state, restored.history
            return restored.progress, restored.log

        found = on_main(read)
        trainer.state, trainer.history = share(arrays, self.devices)
        if found is not None:
            self.progress, self.log = found
        return found is not None

    def _introduce(self) -> None:
        config, devices = self.config, self.devices
        held_out = f"; tests on {config.holdout:,} held-out training images" if config.holdout else ""
        say(
            f"{config.model}, {self.num_parameters:,} parameters, {config.dtype}, on {len(devices)} × "
            f"{devices[0].device_kind}; {len(self.dataset.train_labels):,} images from {self.dataset.source}; "
            f"run in {self.workdir}{held_out}"
        )

    def _complete(self, resumes: bool) -> dict[str, Any] | None:
        """Returns the summary of a complete run, else None. Its checkpoints may have been deleted to save space."""
        epochs, file = self.config.num_epochs, self.workdir / "summary.json"
        if resumes and self.progress.epoch < epochs:
            return None
        summary = read_summary(self.workdir, self.config)
        if summary is None:  # missing, damaged or of an interrupted run: it will be rewritten
            if not resumes and (self.workdir / "metrics.csv").exists():
                say(f"warning: no checkpoint in {self.checkpoints.directory}: training from the start", error=True)
            return None
        say(f"already complete after {epochs} epochs: name another --workdir for another run")
        if not resumes:
            say(f"its checkpoints are missing: remove {file} to train it again")
        else:
            self.log.write(self.workdir)  # its files may be lost or damaged
        return summary

    def _prepare(self, resumes: bool, teacher: Weights | None) -> None:
        """Checks that the run can continue here, and writes config.json and dataset.json."""
        config, identity = self.config, None if teacher is None else identify_teacher(teacher)
        if resumes:
            epoch, step, _ = self.progress
            began = read_config(self.workdir).num_devices
            check_same_data(self.workdir, self.dataset, resumes, identity)
            say(f"resuming after {epoch} epochs and {step}/{self.steps_per_epoch} steps")
            if began != config.num_devices and config.normalization == "batch":
                say(
                    f"warning: --num-devices changed from {began} to {config.num_devices}: each device normalises its "
                    "part of a batch, so the run will differ from an uninterrupted one",
                    error=True,
                )
        else:
            probe_workdir(self.workdir)
            self.logger.start_again()
        write_json(self.workdir / "config.json", dataclasses.asdict(config))
        if resumes:
            self.log.write(self.workdir)
        else:
            check_same_data(self.workdir, self.dataset, resumes, identity)

    def _teach(self, teacher: Weights | None) -> bool:
        """Gives the trainer the teacher's logits, if there is a teacher. Returns: False if it was stopped."""
        if teacher is not None:
            logits = compute_teacher_logits(self.config, teacher, self.dataset, self.devices, self.stop)
            if logits is None:
                return False
            self.trainer.teach(logits)
        return True

    def _train_epochs(self) -> None:
        """Compiles the steps of training and test, then trains to the last epoch or until the run is stopped."""
        config, trainer, epoch = self.config, self.trainer, self.progress.epoch
        for image_size in {config.image_size(later) for later in range(epoch, config.num_epochs)}:
            if self.stop():
                return
            trainer.compile(image_size, trainer.order(epoch))
        evaluator = Evaluator(config, trainer.state, self.dataset.test_images, self.dataset.test_labels, self.devices)
        while self.progress.epoch < config.num_epochs and not self.stop() and self._train_epoch(evaluator):
            pass

    def _train_epoch(self, evaluator: Evaluator) -> bool:
        """Trains, tests, logs and saves one epoch. Returns: False if it was stopped; its steps are then saved."""
        epoch, start, earlier_seconds = self.progress
        started = time.perf_counter()
        description = f"epoch {epoch + 1}/{self.config.num_epochs}"
        with progress_bar(description, self.steps_per_epoch, start) as bar:

            def on_progress(count: int, loss: jax.Array | None) -> None:
                bar.update(count, loss)
                self.profiler.update(count)

            step = self.trainer.run_epoch(epoch, start, self.stop, on_progress)
        seconds = earlier_seconds + time.perf_counter() - started
        self.trainer.fold()
        test = evaluator(self.trainer.state, self.stop) if step == self.steps_per_epoch else None
        trained = self.trainer.epoch_metrics()
        tested_loss = test["loss"] if test else 0.0
        if step and not math.isfinite(trained["loss"] + tested_loss):
            losses_are = f"train loss {trained['loss']}, {self.tested} loss {tested_loss}"
            raise FailedTraining(f"training diverged in epoch {epoch + 1} ({losses_are})", self.config)
        if test is None:  # stopped within the epoch
            if step == start:
                return False  # no new step to save
            self.progress = Progress(epoch, step, seconds)
            self._save(None)
            return False
        row = self._create_row(epoch, seconds, trained, test)
        losses = np.concatenate([self.log.batch_loss, trained["batch_loss"]])
        if is_stalled(losses, self.num_classes):
            if self.config.auto_restart:
                raise self._stalled(row.epoch)
            say(f"warning: {self._stalled(row.epoch)}", error=True)
        self.log.add(row, trained["batch_loss"])
        on_main(lambda: self.log.write(self.workdir))
        self.trainer.clear_history()
        self.progress = Progress(epoch + 1)
        self._save(row.test_accuracy)
        say(format_epoch(row, self.config.num_epochs, self.tested))
        self.logger.log(self.log.rows)
        return True

    def _save(self, test_accuracy: float | None) -> None:
        state, history = local((self.trainer.state, self.trainer.history))
        on_main(lambda: self.checkpoints.save(state, history, self.progress, self.log, test_accuracy))

    def _create_row(self, epoch: int, seconds: float, trained: dict[str, Any], test: dict[str, float]) -> EpochMetrics:
        schedule = create_schedule(self.config, self.steps_per_epoch)
        return EpochMetrics(
            epoch=epoch + 1,
            train_loss=trained["loss"],
            train_accuracy=trained["accuracy"],
            test_loss=test["loss"],
            test_accuracy=test["accuracy"],
            learning_rate=float(schedule((epoch + 1) * self.steps_per_epoch - 1)),
            seconds=round(seconds, 3),
            images_per_second=round(len(self.dataset.train_labels) / seconds, 1),
        )

    def _stalled(self, epoch: int) -> FailedTraining:
        return FailedTraining(f"training stalled in epoch {epoch} (its loss stays at chance)", self.config)

    def _finish(self) -> dict[str, Any]:
        """Writes summary.json and draws figures, if there is an epoch. Returns: its content."""
        rows = self.log.rows
        summary = summarize(self.config, rows, self.num_parameters, self.devices, self.dataset.source)
        if rows:
            write_json(self.workdir / "summary.json", summary)  # first: a batch system may soon end the process
            self._draw()
        return summary

    def _draw(self) -> None:
        try:
            from cifar_jax.plots import plot_run  # imported here because matplotlib takes a second

            plot_run(self.workdir)
        except Exception as error:  # failing to draw must not fail the run
            say(f"warning: can't draw figures ({one_line(error)}): try cifar-jax plots {self.workdir}", error=True)
