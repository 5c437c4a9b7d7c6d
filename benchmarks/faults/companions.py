"""Faults of company: several processes in one folder, changing numbers of devices, impossible folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.faults import victims
from benchmarks.faults.lab import REFUSED, Lab
from cifar_jax.metrics import read_batch_loss

PROCESSES = 3
ONE_TRAINS = "one trains, the others are refused in one line"
TOLERANCE = 5e-6  # relative error of a loss
CLOSE = f"within {TOLERANCE:.0e} of the losses on 1 device"


def one_workdir(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    for _ in range(count):
        workdir = lab.new_folder()
        logs = [workdir.with_suffix(f".{number}.log") for number in range(PROCESSES)]
        with ThreadPoolExecutor(PROCESSES) as pool:
            statuses = list(pool.map(lambda log: victims.run(victims.train, workdir, log), logs))  # noqa: B023
        texts = [log.read_text() for log in logs]
        refused = [text for text, status in zip(texts, statuses) if status == 2 and len(text.splitlines()) == 1]
        late = [text for text, status in zip(texts, statuses) if status == 0 and "already complete" in text]
        outcome = lab.finish(workdir)
        alone = len(refused) + len(late) == PROCESSES - 1 and 0 in statuses
        yield f"{ONE_TRAINS}; {outcome}" if alone else f"statuses {sorted(statuses)}"


def devices(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Trains an epoch each on 1, 2, 4 and again 1 device, without dropout."""
    for seed in rng.integers(2**16, size=count):
        changes: dict[str, Any] = {"dropout_rates": (0.0, 0.0), "num_epochs": 4, "seed": int(seed)}
        alone, workdir = lab.new_folder(), lab.new_folder()
        ends = [lab.train(alone, **changes)]
        for epoch, number in enumerate((1, 2, 4), 1):
            saved = workdir / "checkpoints" / str(epoch) / "sha256.json"
            ends.append(lab.train(workdir, saved.exists, **changes, num_devices=number))
        ends.append(lab.train(workdir, **changes))
        if [end.how for end in ends] != ["ended", "stopped", "stopped", "stopped", "ended"]:
            yield f"{[end.how for end in ends]}"
            continue
        expected, losses = read_batch_loss(alone), read_batch_loss(workdir)
        error = float(np.abs(losses / expected - 1).max())
        yield CLOSE if len(losses) == 12 and error <= TOLERANCE else f"{error:.1e} from the losses on 1 device"
        shutil.rmtree(alone)
        shutil.rmtree(workdir)


def second_process(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    for _ in range(count):
        workdir = lab.new_folder()
        with mock.patch.object(jax, "process_count", return_value=2):
            end = lab.train(workdir)
        yield REFUSED if lab.outcome(end, workdir) == REFUSED and not workdir.exists() else end.how


def addresses(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Uses the address of a bucket, or a path below a file, as --workdir."""
    file = lab.new_folder()
    file.write_text("")
    for number in range(count):
        workdir = ("gs://bucket/run", "s3://bucket/run", str(file / "run"))[number % 3]
        end = lab.train(workdir)
        made = [name for name in os.listdir() if name.endswith(":")]
        yield REFUSED if end.how == "refused" and not made and not end.errors else f"{end.how}, made {made}"
    file.unlink()
