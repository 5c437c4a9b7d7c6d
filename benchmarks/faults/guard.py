"""Reads malicious files in a separate process, with limits, and watches what the reader does."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults import victims
from cifar_jax.errors import UserError

SECONDS = 10  # CPU time for a file below 10 MB
MEMORY = 2**29  # bytes of peak memory above the process' memory before
READERS = ("hdf5_worker.py", "record_reader.py")  # programs of the package, which it may start
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "subprocess.Popen", "socket.connect")
REFUSED = "refused in one line"

Task = Callable[[Path], str]


def read_all(task: Task, paths: list[Path], folder: Path) -> Iterator[str]:
    """Yields an outcome for each path: the task's result, REFUSED for its UserError, else what is wrong.

    Args: task: a function at module level; folder: the only folder that may be written.
    """
    report, left = folder / "report.jsonl", list(paths)
    while left:
        report.write_text("")
        status = victims.run(_read, task, left, report, folder)
        outcomes = [json.loads(line) for line in report.read_text().splitlines()]
        yield from outcomes
        left = left[len(outcomes) :]
        if left:
            killed_by = "takes over 10 s" if status == -signal.SIGPROF else f"ends its process (status {status})"
            yield f"{left.pop(0).name}: {killed_by}"
    report.unlink()


class _Watch:
    """Audit hook that records forbidden events: starting processes, and writing outside a folder."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self._folder = str(folder)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS:
            # Since Python 3.13 Popen itself calls posix_spawn.
            words = arguments[1] if event in ("subprocess.Popen", "os.posix_spawn") else ()
            command = " ".join(map(os.fsdecode, words))
            if not command or not any(reader in command for reader in READERS):
                self.seen.append(f"{event} {command}")
        elif victims.writes(event, arguments) and isinstance(arguments[0], (str, bytes)):
            both = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            for path in (os.path.abspath(os.fsdecode(argument)) for argument in both):
                made_before = event == "os.mkdir" and os.path.isdir(path)
                inside = path in (self._folder, os.devnull) or path.startswith(self._folder + os.sep)
                if not made_before and not inside:
                    self.seen.append(f"{event} outside its folder, {os.path.basename(path)}")


def _read(task: Task, paths: list[Path], report: Path, folder: Path) -> None:
    """Runs in its own process. Appends an outcome for each path to the report."""
    victims.redirect(folder / "output.log")
    sys.dont_write_bytecode = True
    os.chdir(folder)
    os.environ["CIFAR_JAX_CACHE"] = str(folder / "cache")
    tempfile.tempdir = str(folder)
    watch = _Watch(folder)
    sys.addaudithook(watch)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with report.open("a", buffering=1) as file:
        for path in paths:
            file.write(json.dumps(_bounded(task, path, watch)) + "\n")


def _bounded(task: Task, path: Path, watch: _Watch) -> str:
    watch.seen.clear()
    before, started = _memory("VmRSS"), _cpu_seconds()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    watch.seen.clear()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        outcome = task(path)
    except UserError as error:
        outcome = REFUSED if "\n" not in str(error) else f"{path.name}: refused in several lines"
    except BaseException as error:
        outcome = f"{path.name}: {type(error).__name__}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    grown, seconds = _memory("VmHWM") - before, _cpu_seconds() - started
    if watch.seen:
        return f"{path.name}: {watch.seen[0]}"
    if grown > MEMORY:
        return f"{path.name}: takes {grown >> 20} MiB"
    return outcome if seconds <= SECONDS else f"{path.name}: takes {seconds:.0f} s"


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _memory(field: str) -> int:
    """Returns a memory field in bytes on Linux, else 0."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))
    return 0
