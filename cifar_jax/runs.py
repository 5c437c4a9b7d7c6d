"""A run's folder: who may use it, what identifies the run, its restarts and its summary."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
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
from cifar_jax.datasets import Dataset
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError
from cifar_jax.io import made_folder, read_json, user_path, write_json
from cifar_jax.metrics import EpochMetrics

MAX_RESTARTS = 3
RESULTS = ("metrics.csv", "batch_loss.npy", "summary.json", "accuracy.png", "loss.png", "batch_loss.png")


def read_config(workdir: Path) -> Config:
    """The config that a run was made with. Raises: UserError if there is none."""
    path = workdir / "config.json"
    try:
        fields = read_json(path)
        fields["dropout_rates"] = tuple(fields["dropout_rates"])
        fields["image_sizes"] = tuple(map(tuple, fields.get("image_sizes", ())))
        return Config(**fields)
    except FileNotFoundError as error:
        raise UserError(f"{workdir}: no config.json, so not the workdir of a run") from error
    except (OSError, TypeError, KeyError, ValueError, UserError) as error:
        raise UserError(f"{path}: not a config of this program ({error})") from error


def resolve_workdir(name: str) -> str:
    """A workdir's path with ~ expanded. Raises: UserError for an address such as gs://bucket/run."""
    if re.match(r"\w+:/", name):  # a Path has one slash of two
        raise UserError(f"--workdir {name}: a run is written to a folder of this machine: name one, or a mounted one")
    return str(user_path(name, "--workdir"))


@contextlib.contextmanager
def claim_workdir(workdir: Path, config: Config) -> Iterator[None]:
    """Holds the folder for this process, made if need be; one that stays empty is removed again.

    Raises: UserError if it holds a run with another config, if another process holds it, or if it can't be used.
    """
    with contextlib.ExitStack() as stack:
        try:
            made = not (workdir / ".lock").exists()
            stack.enter_context(made_folder(workdir))
            lock = stack.enter_context((workdir / ".lock").open("a"))
        except OSError as error:
            raise UserError(f"--workdir {workdir}: {error.strerror}: name a folder that can be written") from error
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
        raise UserError(f"--workdir {workdir}: another training is at work there: name another") from error
    except OSError as error:  # a file system without locks, as some network ones
        say(f"warning: {workdir} can't be locked ({error.strerror}): start no other training there", error=True)


def probe_workdir(workdir: Path) -> None:
    """Saves a small checkpoint and reads it back, before hours of training. Raises: UserError if that fails."""
    folder = workdir / f"probe-{uuid.uuid4()}"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), {"probe": np.arange(3)})
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(folder.absolute(), {"probe": np.zeros(3, np.int64)})
        if restored["probe"].tolist() != [0, 1, 2]:
            raise OSError("what was written is not what is read")
    except Exception as error:  # whatever Orbax and TensorStore raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--workdir {workdir}: checkpoints can't be saved there ({reason}): name another") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_same_config(workdir: Path, config: Config) -> None:
    """Raises: UserError if the folder holds a run with another config, or files that are not a run's."""
    has_checkpoints = any((workdir / "checkpoints").glob("[0-9]*"))
    results = [workdir / name for name in RESULTS if (workdir / name).exists()]
    path = workdir / "config.json"
    if not path.exists():
        if has_checkpoints:
            raise UserError(f"{workdir}: has checkpoints but no config.json: put it back, or name another --workdir")
        foreign = [*results, *([workdir / "dataset.json"] if _read_identity(workdir) == {} else [])]
        if foreign:
            raise UserError(f"{foreign[0]}: not a run's, as no config.json is beside it: name another --workdir")
        return
    if path.stat().st_size == 0 and not has_checkpoints and not results:
        return  # a crash in the run's first moment
    saved = read_config(workdir)
    in_restarts = workdir.name.startswith("restart") or (workdir / "restart1").exists()
    if not has_checkpoints and not results and not in_restarts:
        return  # nothing is kept of it: it was out of memory in its first epoch, say, so that its batch must change
    old, new = dataclasses.asdict(saved), dataclasses.asdict(config)
    fields = [name for name in old if name not in EXECUTION_FIELDS and old[name] != new[name]]
    if fields:
        changes = ", ".join(f"{name} {old[name]} → {new[name]}" for name in fields)
        raise UserError(f"{workdir} holds a run with another config ({changes}): name another --workdir")


def _read_identity(workdir: Path) -> dict[str, Any] | None:
    """The content of dataset.json, {} if it is not ours or damaged, None if it is not there."""
    try:
        content = read_json(workdir / "dataset.json")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if {"source", "train_labels_sha256"} <= set(content) else {}


def check_same_data(workdir: Path, dataset: Dataset, resumes: bool) -> None:
    """Writes which data the run is of.

    Epochs, flips and held-out images go by place, and copies of CIFAR-10 differ in their order. Raises: UserError if
    the run began with training images of other labels, or of the same in another order.
    """
    checksum = hashlib.sha256(dataset.train_labels.tobytes()).hexdigest()
    saved = _read_identity(workdir)
    if resumes and saved and saved["train_labels_sha256"] != checksum:
        raise UserError(
            f"{workdir}: began with {saved['source']}, and {dataset.source} has other labels or another order: "
            "name the former with --data-dir, or another --workdir"
        )
    write_json(workdir / "dataset.json", {"source": dataset.source, "train_labels_sha256": checksum})


def restarted(config: Config, number: int) -> Config:
    """The recipe's restart after it stalled or diverged: a folder of its own, half the rate, the next seed."""
    return dataclasses.replace(
        config,
        workdir=str(Path(config.workdir) / f"restart{number}"),
        learning_rate=config.learning_rate / 2**number,
        swa_learning_rate=config.swa_learning_rate / 2**number,
        seed=(config.seed + number) % 2**32,
    )


def attempts(config: Config) -> list[Config]:
    """The run and its restarts that are still to be tried, in order; without auto_restart the run alone.

    Raises: UserError if it was restarted before and auto_restart is not set.
    """
    if not config.auto_restart:
        if (Path(config.workdir) / "restart1").exists():
            raise UserError(f"{config.workdir}: this run stalled and was restarted; resume it with --auto-restart")
        return [config]
    tries = [config, *(restarted(config, number) for number in range(1, MAX_RESTARTS + 1))]
    begun = [number for number, attempt in enumerate(tries) if number and Path(attempt.workdir).exists()]
    return tries[max(begun, default=0) :]


def read_summary(workdir: Path, config: Config) -> dict[str, Any] | None:
    """The summary of a complete run of this config; None if it is missing, damaged or of fewer epochs."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        summary = read_json(workdir / "summary.json")
        fields = json.loads(json.dumps(dataclasses.asdict(config)))
        same = all(fields[name] == value for name, value in summary["config"].items())
        if same and summary["epochs"] == config.num_epochs:
            return summary
    return None


def summarize(
    config: Config, rows: list[EpochMetrics], num_parameters: int, devices: Sequence[jax.Device], source: str
) -> dict[str, Any]:
    """What summary.json holds: the last epoch's results, the config, every epoch, data, hardware, versions, date."""
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
