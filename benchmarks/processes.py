"""Compares runs in several processes with one process, and kills a process again and again.

python -m benchmarks.processes --out DIR [--kills 10] [--num-epochs 5]

The recipe quickstart trains in one process with 4 devices, in 2 processes with 2 each and in 4 with one each, on this
machine's CPU. Then 2 processes train, one of them is killed in one epoch after another, in turn, and the same command
resumes. The curves, the differences and each kill's outcome go to DIR/processes.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import output_file, write_result
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.cli import command, parse_arguments
from cifar_jax.environment import describe_command, describe_environment
from cifar_jax.errors import UserError
from cifar_jax.metrics import EpochMetrics, read_metrics
from cifar_jax.runs import read_config
from cifar_jax.train_step import create_train_state

LAYOUTS = ((1, 4), (2, 2), (4, 1))  # processes, devices of each
NUM_DEVICES = "4"  # in all
RUN = ["-m", "cifar_jax.train", "quickstart"]
DEADLINE = 600  # seconds


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares runs in several processes with one process, and kills a process again and again."""

    out: Path
    """Folder of the result."""
    kills: int = 10
    """Number of kills."""
    num_epochs: int = 5
    """Epochs of each run; at least 2."""


def _free_port() -> int:
    """Returns a port that is free, and that the system gives to no program that does not ask for this one."""
    for port in random.sample(range(10_000, 32_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise UserError("no port of 127.0.0.1 between 10,000 and 32,000 seems to be free")


@contextlib.contextmanager
def started(commands: list[list[str]], environments: list[dict[str, str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts processes that train together, if there are several, and kills those that are left at the end.

    Args: commands: the words of each process, without the flags of several; environments: changed variables of each.
    """
    address = f"127.0.0.1:{_free_port()}"
    inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}  # JAX sets it
    if len(commands) > 1:
        together = ["--coordinator", address, "--num-processes", str(len(commands)), "--process-id"]
        commands = [[*words, *together, str(number)] for number, words in enumerate(commands)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(subprocess.Popen([sys.executable, *words], env={**inherited, **changes}, **pipes))
            for words, changes in zip(commands, environments)
        ]
        try:
            yield running
        finally:
            for process in running:
                process.kill()


def train_together(
    count: int, devices: int, flags: list[str]
) -> contextlib.AbstractContextManager[list[subprocess.Popen[str]]]:
    """Starts the processes of a run. Args: devices: of each process; flags: of all processes."""
    environment = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    return started([[*RUN, *flags]] * count, [environment] * count)


def end_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Waits for a process and returns its stdout and stderr. Raises: UserError if it does not end in time."""
    try:
        return process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired as expired:
        raise UserError(f"a process did not end in {DEADLINE} s: {(expired.stderr or b'')[-300:]!r}") from expired


def finish(running: list[subprocess.Popen[str]]) -> str:
    """Waits for processes and returns the first one's stdout. Raises: UserError if one fails."""
    outputs = [end_of(process) for process in running]
    for process, (_, err) in zip(running, outputs):
        if process.returncode:
            raise UserError(f"a process ended with status {process.returncode}: {err[-300:]}")
    return outputs[0][0]


def read_run(workdir: Path) -> tuple[list[EpochMetrics], list[np.ndarray]]:
    """Returns the rows of metrics.csv, and the arrays of the latest checkpoint."""
    state, _ = Checkpoints(workdir).restore_state("latest", create_train_state(read_config(workdir), 1))
    leaves = jax.tree.leaves((state.params, state.opt_state, state.ema_params))
    return read_metrics(workdir), [np.asarray(leaf) for leaf in leaves]


def largest_difference(arrays: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Returns the largest difference of all arrays, each relative to its array's largest value."""
    relative = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
    return float(max(relative(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(arrays, expected)))


def compare(folder: Path, num_epochs: int) -> list[dict[str, Any]]:
    """Trains in each layout. Returns: the curves, and the differences from one process."""
    results: list[dict[str, Any]] = []
    expected: list[np.ndarray] = []
    for count, devices in LAYOUTS:
        workdir = folder / f"{count}x{devices}"
        flags = ["--workdir", str(workdir), "--num-devices", NUM_DEVICES, "--num-epochs", str(num_epochs)]
        with train_together(count, devices, flags) as running:
            finish(running)
        rows, arrays = read_run(workdir)
        expected = expected or arrays
        curves = {name: [getattr(row, name) for row in rows] for name in ("train_loss", "test_loss", "test_accuracy")}
        difference = largest_difference(arrays, expected)
        results.append({"processes": count, "devices_each": devices, **curves, "largest_difference": difference})
        print(f"{count} × {devices}: test accuracy {rows[-1].test_accuracy:.2%}, parameters {difference:.1e} away")
    return results


def kill_one(folder: Path, number: int, num_epochs: int) -> dict[str, Any]:
    """Kills a process of two after an epoch, waits for the other one's end, and resumes to the run's end."""
    workdir, victim, epoch = folder / f"kill{number}", number % 2, 1 + number // 2 % (num_epochs - 1)
    flags = ["--workdir", str(workdir), "--num-epochs", str(num_epochs)]
    with train_together(2, 1, flags) as running:
        assert running[0].stdout is not None
        if not any(re.match(rf"epoch +{epoch}/", line) for line in running[0].stdout):
            raise UserError(f"the run ended before epoch {epoch}: {running[0].communicate()[1][-300:]}")
        running[victim].kill()
        killed = time.perf_counter()
        _, err = end_of(running[1 - victim])
        seconds = time.perf_counter() - killed
        status = running[1 - victim].returncode
    with train_together(2, 1, flags) as running:
        resumed = [line for line in finish(running).splitlines() if line.startswith("resuming after")]
    rows, _ = read_run(workdir)
    outcome = {
        "killed": victim,
        "after_epoch": epoch,
        "seconds_to_the_others_end": round(seconds, 2),
        "status": status,
        "lines": err.strip().splitlines(),
        "resumed": resumed,
        "test_accuracy": rows[-1].test_accuracy,
    }
    print(f"kill {number + 1}: process {victim}, the other ended after {seconds:.1f} s, {len(outcome['lines'])} line")
    return outcome


@command
def main() -> int:
    arguments = parse_arguments(Arguments, prog="python -m benchmarks.processes")
    for flag, value, least in (("--num-epochs", arguments.num_epochs, 2), ("--kills", arguments.kills, 0)):
        if value < least:
            raise UserError(f"{flag} {value}: must be {least} or more")
    file = output_file(arguments.out, "processes")
    with tempfile.TemporaryDirectory() as folder:
        runs = compare(Path(folder), arguments.num_epochs)
        kills = [kill_one(Path(folder), number, arguments.num_epochs) for number in range(arguments.kills)]
    content = {
        "command": describe_command("-m benchmarks.processes", sys.argv[1:]),
        **describe_environment(jax.local_devices()[:1]),
        "dataset": "digits",
        "seed": 0,
        "runs": runs,
        "kills": kills,
    }
    write_result(file, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
