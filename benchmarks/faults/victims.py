"""Runs the small training in separate processes, which get a signal at a chosen moment.

A server that has imported everything and started no thread forks the processes, so each starts at once.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image

from benchmarks.faults.lab import quickly_compiled, tiny_config, tiny_dataset
from cifar_jax import convert, predict
from cifar_jax.cli import StopSignals, command
from cifar_jax.console import say
from cifar_jax.outcomes import Interrupted
from cifar_jax.pretrained import pretrained_path
from cifar_jax.train import train_and_evaluate

PRELOADED = ["benchmarks.faults.victims", "benchmarks.faults.guard", "sklearn.datasets", "sklearn.model_selection"]
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")


@dataclasses.dataclass(frozen=True)
class Strike:
    """A signal that a process sends to itself at its `tick`-th tick, or `delay` seconds later.

    A tick is a file event: a file is opened for writing, renamed, created or removed. With `steps` it is also each time
    that training polls whether to stop.
    """

    signal: signal.Signals
    tick: int
    delay: float = 0.0
    steps: bool = True


def writes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Returns whether an audit event changes a file or a folder."""
    if event != "open":
        return event in FILE_EVENTS
    flags = arguments[2] if isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


class Ticks:
    """Counts ticks and sends the signal."""

    def __init__(self, strike: Strike | None, folder: Path) -> None:
        self.count = self.files = 0
        self.strike, self.folder = strike, str(folder)

    def watch_files(self) -> None:
        """Counts file events of the whole process from now on."""
        sys.addaudithook(self._heed)

    def _heed(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and writes(event, arguments):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
            if path.startswith(self.folder) or not path.startswith("/"):  # shutil.rmtree uses relative paths
                self.files += 1
                self.tick()

    def step(self) -> None:
        if self.strike is None or self.strike.steps:
            self.tick()

    def tick(self) -> None:
        self.count += 1
        if self.strike is not None and self.count == self.strike.tick:
            blow = lambda: os.kill(os.getpid(), self.strike.signal)
            if self.strike.delay:
                threading.Timer(self.strike.delay, blow).start()
            else:
                blow()


_bookkeeping = threading.Lock()


def run(target: Callable[..., None], *arguments: Any) -> int:
    """Runs a function at module level in a new process. Returns: the exit status, negative for a signal.

    The lock is needed because starting a process polls all others, and an exit status can be read only once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    with _bookkeeping:
        process.start()
    multiprocessing.connection.wait([process.sentinel])
    with _bookkeeping:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def redirect(log: Path) -> None:
    """Appends this process' output to a file."""
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def train(workdir: Path, log: Path, strike: Strike | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Trains in this process. Writes the numbers of ticks and of file events to a file beside the log."""
    os.environ.update(environment or {})
    redirect(log)
    train_here(workdir, strike, log.with_suffix(".ticks"))


def train_here(workdir: Path, strike: Strike | None, counted: Path | None = None) -> None:
    """Runs the training command without parsing flags, and ends this process. Writes the counts to a file."""
    ticks = Ticks(strike, workdir)
    ticks.watch_files()

    class Stop(StopSignals):
        def __call__(self) -> bool:
            ticks.step()
            return super().__call__()

    @command
    def main() -> int:
        with Stop() as stop:
            try:
                train_and_evaluate(tiny_config(workdir), tiny_dataset(), stop)
            except Interrupted as interrupted:
                say(str(interrupted), error=True)
                return 128 + (stop.received or 0)
        return 0

    with quickly_compiled():
        status = main()
    if counted is not None:
        counted.write_text(f"{ticks.count} {ticks.files}")
    sys.exit(status)


def collect(name: str, folder: Path, collection: int) -> None:
    """A command that gets SIGTERM within a callback of its n-th garbage collection."""
    redirect(folder / "output.log")
    image, source, output = folder / "image.png", str(pretrained_path("lenet5")), str(folder / "lenet5.safetensors")
    PIL.Image.new("RGB", (32, 32)).save(image)
    sys.argv = [name, *([source, output] if name == "convert" else [str(image)])]
    ticks = Ticks(Strike(signal.SIGTERM, collection), folder)
    gc.callbacks.append(lambda phase, _: ticks.tick() if phase == "start" else None)
    gc.set_threshold(20)
    sys.exit({"convert": convert, "predict": predict}[name].main())


@functools.cache
def count_ticks(folder: Path) -> tuple[int, int]:
    """Returns (ticks, file events) of an undisturbed run."""
    workdir, log = folder / "counted", folder / "counted.log"
    if (status := run(train, workdir, log)) != 0:
        raise RuntimeError(f"the undisturbed run ends with status {status}: {log.read_text()[-2000:]}")
    ticks, files = map(int, log.with_suffix(".ticks").read_text().split())
    return ticks, files
