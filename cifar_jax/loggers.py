"""Sends each epoch's metrics to TensorBoard or Weights & Biases. A failing logger never stops a run.

A service is a function that opens a Writer. Its library is imported only if the run uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from cifar_jax.configs.base import EXECUTION_FIELDS, Config
from cifar_jax.console import say
from cifar_jax.errors import UserError, one_line
from cifar_jax.installed import import_installed
from cifar_jax.io import read_json, write_json
from cifar_jax.metrics import EpochMetrics

FINISH_SECONDS = 60  # at the end, for what was not uploaded yet


class Writer(Protocol):
    """An open connection to a service."""

    def write(self, epoch: int, values: dict[str, float]) -> None:
        """Sends an epoch's values, by their names in metrics.csv. Raises: any exception."""

    def close(self) -> None:
        """Sends what is left. Raises: any exception."""


class TensorBoard:
    """Writes an event file to WORKDIR/tensorboard.

    tensorboardX's SummaryWriter is not used: it writes in a thread, and if the disk is full this thread ends and the
    next calls wait for it.
    """

    def __init__(self, library: Any, folder: Path, config: Config, run_id: str) -> None:
        events, self._event, summary = (
            importlib.import_module(f"{library.__name__}.{name}")
            for name in ("event_file_writer", "proto.event_pb2", "proto.summary_pb2")
        )
        self._summary: Any = summary
        # A file's name has the time in seconds, and the same name would replace it.
        self._file = events.EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:8]}")

    def write(self, epoch: int, values: dict[str, float]) -> None:
        pairs = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = self._summary.Summary(value=pairs)
        self._file.write_event(self._event.Event(wall_time=time.time(), step=epoch, summary=summary))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandB:
    """Sends a run to Weights & Biases, which keeps its files in WORKDIR/wandb. A resumed run has the same run id."""

    def __init__(self, library: Any, folder: Path, config: Config, run_id: str) -> None:
        recipe = {name: value for name, value in dataclasses.asdict(config).items() if name not in EXECUTION_FIELDS}
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", "cifar_jax"),
            name=folder.parent.name,
            dir=str(folder.parent),
            id=run_id,
            resume="allow",
            config=recipe,
            # create_new: the calling program may have a run of its own.
            settings=library.Settings(silent=True, console="off", finish_timeout=FINISH_SECONDS, reinit="create_new"),
        )
        if not self._run.offline:
            say(f"wandb: {self._run.url}")

    def write(self, epoch: int, values: dict[str, float]) -> None:
        self._run.log(values, step=epoch)

    def close(self) -> None:
        self._run.finish()


SERVICES: dict[str, tuple[str, Callable[[Any, Path, Config, str], Writer]]] = {  # library and writer
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
}


class Logger:
    """Sends each row of a run's log once, however often the run is resumed. A context that opens and closes the writer.

    WORKDIR/SERVICE/logged.json keeps the number of epochs that were sent and the run's id. So a resumed run sends the
    epochs that are missing. If anything fails, one line warns and nothing more is sent.
    """

    def __init__(self, config: Config) -> None:
        """Raises: UserError if the library is not installed."""
        self._config = config
        self._writer: Writer | None = None
        if config.logger == "none":
            return
        name, self._create = SERVICES[config.logger]
        self._state = Path(config.workdir) / config.logger / "logged.json"
        try:
            self._library = import_installed(name)
        except ImportError as error:
            advice = f"pip install 'cifar_jax[{config.logger}]'"
            raise UserError(f"--logger {config.logger}: {name} is not installed: {advice}") from error

    def __enter__(self) -> Logger:
        if self._config.logger != "none":
            with self._never_failing():
                self._run_id, self._epochs = self._read_state()
                self._state.parent.mkdir(parents=True, exist_ok=True)
                self._write_state()  # first, so that a run that crashes keeps its id
                self._writer = self._create(self._library, self._state.parent, self._config, self._run_id)
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with self._never_failing():
                self._writer.close()

    def log(self, rows: Sequence[EpochMetrics]) -> None:
        """Sends the rows that were not sent yet. Args: rows: of all epochs so far."""
        for row in rows:
            if self._writer is not None and row.epoch > self._epochs:
                with self._never_failing():
                    values = dataclasses.asdict(row)
                    self._writer.write(values.pop("epoch"), values)
                    self._epochs = row.epoch
                    self._write_state()

    def start_again(self) -> None:
        """Forgets that epochs of an earlier training in this folder were sent, and its id.

        TensorBoard, which goes by folders, shows the later points in place of the earlier ones.
        """
        if self._config.logger != "none":
            with self._never_failing():
                if self._read_state()[1]:
                    self._state.unlink()

    def _read_state(self) -> tuple[str, int]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged
            state = read_json(self._state)
            return str(state["run_id"]), int(state["epochs"])
        return uuid.uuid4().hex[:8], 0

    def _write_state(self) -> None:
        write_json(self._state, {"run_id": self._run_id, "epochs": self._epochs})

    @contextlib.contextmanager
    def _never_failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk, no network, no account: libraries raise anything
            failed, self._writer = self._writer, None
            if failed is not None:
                with contextlib.suppress(Exception):
                    failed.close()
            reason = one_line(error) or type(error).__name__
            say(f"warning: --logger {self._config.logger} failed ({reason}): training goes on without it", error=True)
