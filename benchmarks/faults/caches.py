"""Faults of the cache of decoded data: damaged entries, processes killed while filling it, processes that share it."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.faults import victims
from benchmarks.faults.data_files import RIGHT, load, write_binary
from benchmarks.faults.disks import DAMAGES, damage
from benchmarks.faults.lab import Lab, captured
from benchmarks.faults.mutations import mutate
from benchmarks.faults.victims import Strike
from cifar_jax.errors import UserError

DECODED_AGAIN = "decoded again, with one line"
PROCESSES = 3
EVENTS = 8  # file events while the cache is filled


def _damage_entry(entry: Path, how: str, rng: np.random.Generator) -> None:
    """Damages a file of an entry, or only its content: half of the pixels, a label, the type, the header."""
    files = sorted(entry.iterdir())
    path = files[int(rng.integers(len(files)))]
    if how in DAMAGES:
        damage(path, how, rng)
    elif how == "header":
        data = path.read_bytes()
        path.write_bytes(mutate(data[:128], rng) + data[128:])
    else:
        path = entry / ("train_images.npy" if how == "zeros" else "train_labels.npy")
        array = np.load(path)
        if how == "label":
            array[3] = 255
        elif how == "zeros":
            array[50:] = 0
        np.save(path, array.astype(np.int64) if how == "type" else array)


def damaged(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    folder = lab.new_folder()
    write_binary(folder)
    with captured():
        load(folder, folder / "cache")
    (entry,) = (folder / "cache").iterdir()
    for how in itertools.islice(itertools.cycle((*DAMAGES, "header", "zeros", "label", "type")), count):
        _damage_entry(entry, how, rng)
        with captured() as errors:
            outcome = load(folder, folder / "cache")
            lines = [line for line in errors().splitlines() if not line.startswith("decoding ")]
        if outcome == RIGHT and lines:
            outcome = DECODED_AGAIN if len(lines) == 1 and "decoding again" in lines[0] else f"says {lines[0]}"
        yield outcome if outcome in (RIGHT, DECODED_AGAIN) else f"{how}: {outcome}"
    shutil.rmtree(folder)


def killed_decoding(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Kills a process at each file event of filling the cache, then loads the data."""
    for number in range(count):
        folder = lab.new_folder()
        write_binary(folder)
        end = victims.run(_load, folder, Strike(signal.SIGKILL, number % EVENTS + 1))
        try:
            with captured():
                outcome = load(folder, folder / "cache")
                yield outcome if end == -signal.SIGKILL else f"not killed: it ended with {end}"
        except UserError:
            yield "refused"
        shutil.rmtree(folder)


def shared(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Kills one of several processes that decode into one cache, at a random file event."""
    for _ in range(count):
        folder = lab.new_folder()
        write_binary(folder)
        strikes: list[Strike | None] = [None] * PROCESSES
        strikes[0] = Strike(signal.SIGKILL, int(rng.integers(1, EVENTS + 1)))
        with ThreadPoolExecutor(PROCESSES) as pool:
            start = lambda strike: victims.run(_load, folder, strike)  # noqa: B023
            statuses = list(pool.map(start, strikes))
        outcome = load(folder, folder / "cache")
        killed = statuses[0] in (-signal.SIGKILL, 0)
        others = all(status == 0 for status in statuses[1:])
        yield outcome if killed and others else f"statuses {statuses}"
        shutil.rmtree(folder)


def _load(folder: Path, strike: Strike | None) -> None:
    """Runs in its own process. The exit status is 0 if the data are right."""
    victims.redirect(folder / "output.log")
    victims.Ticks(strike, folder / "cache").watch_files()
    os._exit(load(folder, folder / "cache") != RIGHT)
