"""Faults of disks and systems: damaged run files, full and read-only disks, missing locks, console or figures."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.faults import victims
from benchmarks.faults.lab import IDENTICAL, REFUSED, End, Lab, Skipped

FELL_BACK = f"falls back with one warning, {IDENTICAL}"
RESUMED = f"{REFUSED}; with room again {IDENTICAL}"
DAMAGES = ("flip", "cut", "empty", "delete")
IDENTITY = ("config.json", "dataset.json")  # they identify a run; without them it may be refused
LOGS = ("metrics.csv", "batch_loss.npy", "summary.json", *IDENTITY)


def damage(path: Path, how: str, rng: np.random.Generator) -> None:
    """Flips a bit of a file, truncates it at a random length, empties it or deletes it."""
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "empty" or not data:
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(data[: int(rng.integers(len(data)))])
    else:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)


def latest_checkpoint(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Damages every file of the checkpoint in every way, in random order."""
    latest = lab.half / "checkpoints" / "2"
    files = sorted(path.relative_to(lab.half) for path in latest.rglob("*") if path.is_file())
    cases = list(itertools.product(files, DAMAGES))
    order = [int(i) for _ in range(-(-count // len(cases))) for i in rng.permutation(len(cases))]
    for index in order[:count]:
        yield one_damaged_file(lab, *cases[index], rng)


def one_damaged_file(lab: Lab, file: Path, how: str, rng: np.random.Generator) -> str:
    """Resumes a run after `file`, relative to its folder, of its latest checkpoint is damaged. Returns: the outcome."""
    workdir = lab.new_folder(lab.half)
    damage(workdir / file, how, rng)
    end = lab.train(workdir)
    outcome = lab.outcome(end, workdir)
    kept = any((workdir / "checkpoints").glob("damaged-2*"))
    shutil.rmtree(workdir)
    if outcome == IDENTICAL and (kept or end.lines):
        one = len(end.lines) == 1 and "damaged" in end.lines[0] and kept
        outcome = FELL_BACK if one else f"kept: {kept}, says {len(end.lines)} lines"
    return outcome if outcome in (IDENTICAL, FELL_BACK) else f"{how} {file.name}: {outcome}"


def logs(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    cases = list(itertools.product(LOGS, DAMAGES))
    order = [int(i) for _ in range(-(-count // len(cases))) for i in rng.permutation(len(cases))]
    for index in order[:count]:
        name, how = cases[index]
        workdir = lab.new_folder(lab.half)
        damage(workdir / name, how, rng)
        outcome = lab.finish(workdir)
        good = outcome == IDENTICAL or (outcome == REFUSED and name in IDENTITY)
        yield outcome if good else f"{how} {name}: {outcome}"


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """Mounts a file system of `size` bytes in memory. Yields: a function that remounts it with other options."""
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)

    try:
        mount(f"size={size}")
    except (OSError, subprocess.CalledProcessError) as error:
        folder.rmdir()
        raise Skipped("mounting a file system needs root") from error
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
        folder.rmdir()


def _then(lab: Lab, end: End, workdir: Path) -> str:
    """Returns the outcome of a run that lacked disk space and is started again with enough."""
    first = lab.outcome(end, workdir)
    if first != REFUSED:  # identical if there was enough space
        return first
    if len(end.lines):
        return f"refused with {len(end.lines)} more lines"
    second = lab.outcome(lab.train(workdir), workdir)
    return RESUMED if second == IDENTICAL else f"with room again: {second}"


def full_disk(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    for size in 2 ** rng.uniform(12, 23.5, count):
        disk = lab.new_folder()
        with tmpfs(disk, int(size)) as remount:
            end = lab.train(disk / "run")
            remount("size=256m")
            yield _then(lab, end, disk / "run")


def small_files(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    for size in 2 ** rng.uniform(12, 21, count):
        workdir = lab.new_folder()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), before[1]))
            end = lab.train(workdir)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        yield _then(lab, end, workdir)
        shutil.rmtree(workdir, ignore_errors=True)


def _content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_only(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Starts a half-finished or a new run on a read-only file system, then on a writable one."""
    for number in range(count):
        disk = lab.new_folder()
        with tmpfs(disk, 2**28) as remount:
            workdir = disk / "run"
            if number % 2 == 0:
                shutil.copytree(lab.half, workdir)
            before = _content(disk)
            remount("ro")
            end = lab.train(workdir)
            unchanged = _content(disk) == before
            remount("rw")
            yield _then(lab, end, workdir) if unchanged else "files changed"


def no_locks(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    for number in itertools.islice(itertools.cycle((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)), count):
        workdir = lab.new_folder()
        with mock.patch("fcntl.flock", side_effect=OSError(number, os.strerror(number))):
            end = lab.train(workdir)
        outcome = lab.outcome(end, workdir)
        yield outcome if len(end.lines) == 1 else f"says {len(end.lines)} lines: {outcome}"
        shutil.rmtree(workdir)


def no_console(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Trains in a process whose stdout and stderr are a full disk, a pipe without a reader, or closed."""
    for how in itertools.islice(itertools.cycle(("full", "pipe", "closed")), count):
        workdir = lab.new_folder()
        status = victims.run(train_without_console, workdir, how)
        yield lab.finish(workdir) if status == 0 else f"{how}: status {status}"


def train_without_console(workdir: Path, how: str) -> None:
    if how == "pipe":
        reader, descriptor = os.pipe()
        os.close(reader)
    else:
        descriptor = os.open("/dev/full", os.O_WRONLY)
    for number in (1, 2):
        os.dup2(descriptor, number)
        if how == "closed":
            os.close(number)
    sys.stdout = None if how == "closed" else os.fdopen(1, "w", buffering=1)
    sys.stderr = None if how == "closed" else os.fdopen(2, "w", buffering=1)
    victims.train_here(workdir, None)


def matplotlib_settings(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    for _ in range(count):
        workdir, log = lab.new_folder(), lab.folder / "figures.log"
        environment = {"MPLBACKEND": "module://nowhere.backend"}
        status = victims.run(victims.train, workdir, log, None, environment)
        figures = len(list(workdir.glob("*.png")))
        yield lab.finish(workdir) if (status, figures) == (0, 3) else f"status {status}, {figures} figures"
