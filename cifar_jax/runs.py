"""A run's folder: its lock, the run's identity, its restarts and its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cifar_jax.configs.base import EXECUTION_FIELDS, Config
from cifar_jax.console import say
from cifar_jax.data_identity import read_identity
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError, one_line
from cifar_jax.io import made_folder, read_json, user_path
from cifar_jax.metrics import EpochMetrics
from cifar_jax.orbax_io import alone

MAX_RESTARTS = 3
RESULTS = ("metrics.csv", "batch_loss.npy", "summary.json", "accuracy.png", "loss.png", "batch_loss.png")


def read_config(workdir: Path) -> Config:
    """Reads a run's config.json. Raises: UserError if it is missing or invalid."""
    path = workdir / "config.json"
    try:
        return Config(**read_json(path))
    except FileNotFoundError as error:
        raise UserError(f"{workdir}: not a run's workdir: it has no config.json") from error
    except (OSError, TypeError, KeyError, ValueError, UserError) as error:
        raise UserError(f"{path}: not a config written by this program ({error})") from error


def resolve_workdir(name: str) -> str:
    """Expands ~ in a workdir's path. Raises: UserError for an address such as gs://bucket/run."""
    if re.match(r"\w+:/", name):  # Path turns two slashes into one
        raise UserError(f"--workdir {name}: remote addresses are not supported: name a local or mounted folder")
    return str(user_path(name, "--workdir"))


def refuse_restarted(workdir: Path) -> None:
    """Raises: UserError, naming the last restart's folder, if the run stalled or diverged and was restarted."""
    restarts = sorted(workdir.glob("restart[0-9]"))
    if restarts:
        raise UserError(f"{workdir}: this run stalled or diverged and was restarted: name {restarts[-1]}")


@contextlib.contextmanager
def claim_workdir(workdir: Path, config: Config) -> Iterator[None]:
    """Creates the folder if needed and locks it for this process. A new folder that stays empty is removed again.

    Raises: UserError if it holds a run with another config, another process has locked it, or it can't be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            made = not (workdir / ".lock").exists()
            stack.enter_context(made_folder(workdir))
            lock = stack.enter_context((workdir / ".lock").open("a"))
        except OSError as error:
            raise UserError(f"--workdir {workdir}: {error.strerror}: name a writable folder") from error
        _lock(workdir, lock.fileno())
        try:
            check_same_config(workdir, config)
            yield
        finally:
            if made and [path.name for path in workdir.iterdir()] == [".lock"]:
                (workdir / ".lock").unlink()


def _lock(workdir: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--workdir {workdir}: another process is training there: name another folder") from error
    except OSError as error:  # some network file systems have no locks
        say(f"warning: {workdir} can't be locked ({error.strerror}): don't start another run there", error=True)


def probe_workdir(workdir: Path) -> None:
    """Saves a small checkpoint and reads it back before training starts. Raises: UserError if that fails."""
    folder = workdir / f"probe-{uuid.uuid4()}"
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone()) as checkpointer:
            checkpointer.save(folder.absolute(), {"probe": np.arange(3)})
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(folder.absolute(), {"probe": np.zeros(3, np.int64)})
        if restored["probe"].tolist() != [0, 1, 2]:
            raise OSError("reading back gives other values")
    except Exception as error:  # Orbax and TensorStore raise many types
        reason = one_line(error)
        raise UserError(
            f"--workdir {workdir}: checkpoints can't be saved there ({reason}): name another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_same_config(workdir: Path, config: Config) -> None:
    """Checks that the folder fits this config.

    Raises: UserError if it holds a run with another config, or result files that belong to no run.
    """
    has_checkpoints = any((workdir / "checkpoints").glob("[0-9]*"))
    results = [workdir / name for name in RESULTS if (workdir / name).exists()]
    path = workdir / "config.json"
    if not path.exists():
        if has_checkpoints:
            raise UserError(f"{workdir}: has checkpoints but no config.json: restore it, or name another --workdir")
        foreign = [*results, *([workdir / "dataset.json"] if read_identity(workdir) == {} else [])]
        if foreign:
            raise UserError(f"{foreign[0]}: belongs to no run, as config.json is missing: name another --workdir")
        return
    if path.stat().st_size == 0 and not has_checkpoints and not results:
        return  # the run crashed while it wrote config.json
    saved = read_config(workdir)
    in_restarts = workdir.name.startswith("restart") or (workdir / "restart1").exists()
    if not has_checkpoints and not results and not in_restarts:
        return  # the run saved nothing, for example if memory ran out: its batch size may change
    old, new = dataclasses.asdict(saved), dataclasses.asdict(config)
    if fields := _differing(old, new):
        changes = ", ".join(f"{name} {old[name]} → {new[name]}" for name in fields)
        raise UserError(f"{workdir}: holds a run with another config ({changes}): name another --workdir")


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the fields that make another run. A teacher may have moved: dataset.json tells it from another one."""
    moved = {"teacher"} if old.get("teacher") and new["teacher"] else set()
    return [name for name in old if name not in {*EXECUTION_FIELDS, *moved} and old[name] != new[name]]


def restarted(config: Config, number: int) -> Config:
    """Returns the config of restart `number`: its own folder, the rates halved `number` times, seed + number."""
    adam_rate = config.adam_learning_rate
    return dataclasses.replace(
        config,
        workdir=str(Path(config.workdir) / f"restart{number}"),
        learning_rate=config.learning_rate / 2**number,
        adam_learning_rate=None if adam_rate is None else adam_rate / 2**number,
        swa_learning_rate=config.swa_learning_rate / 2**number,
        seed=(config.seed + number) % 2**32,
    )


def attempts(config: Config) -> list[Config]:
    """Returns the run and the restarts that remain to be tried, in order; only the run without auto_restart.

    Raises: UserError if the run was restarted before and auto_restart is not set.
    """
    if not config.auto_restart:
        if (Path(config.workdir) / "restart1").exists():
            raise UserError(f"{config.workdir}: this run stalled and was restarted; resume it with --auto-restart")
        return [config]
    tries = [config, *(restarted(config, number) for number in range(1, MAX_RESTARTS + 1))]
    begun = [number for number, attempt in enumerate(tries) if number and Path(attempt.workdir).exists()]
    return tries[max(begun, default=0) :]


def read_summary(workdir: Path, config: Config) -> dict[str, Any] | None:
    """Reads the summary of a complete run of this config; None if it is missing, damaged or incomplete."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        summary = read_json(workdir / "summary.json")
        fields = json.loads(json.dumps(dataclasses.asdict(config)))
        if not _differing(summary["config"], fields) and summary["epochs"] == config.num_epochs:
            return summary
    return None


def summarize(
    config: Config, rows: list[EpochMetrics], num_parameters: int, devices: Sequence[jax.Device], source: str
) -> dict[str, Any]:
    """Returns the content of summary.json: last epoch's results, config, all epochs, data, hardware, versions, date."""
    last = dataclasses.asdict(rows[-1]) if rows else {}
    results = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")
    fields = dataclasses.asdict(config)
    return {
        "num_parameters": num_parameters,
        "epochs": len(rows),
        **{name: last.get(name) for name in results},
        "best_test_accuracy": max((row.test_accuracy for row in rows), default=None),
        "training_seconds": round(sum(row.seconds for row in rows), 3),
        "images_per_second": float(np.median([row.images_per_second for row in rows])) if rows else None,
        "data": source,
        "config": {name: value for name, value in fields.items() if name not in EXECUTION_FIELDS},
        "metrics": [dataclasses.asdict(row) for row in rows],
        **describe_environment(devices),
    }
