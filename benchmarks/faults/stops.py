"""Faults of stopping: runs that are killed or told to stop repeatedly."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.faults import victims
from benchmarks.faults.lab import IDENTICAL, Lab
from benchmarks.faults.victims import Strike

CHAIN = 4  # strikes before a run may end
WORKERS = 2
STATUS_143 = "exit status 143, at most one line, no traceback"


def _noise(log: Path) -> str:
    """Returns what is wrong with a process' output; empty if nothing is."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return next((f"prints '{mark}'" for mark in ("Traceback", "Exception ignored", "Error") if mark in text), "")


def _chain(strikes: list[Strike], workdir: Path) -> tuple[Path, int, str]:
    """Starts the run once for each strike. Returns: (folder, number of strikes that hit, what is wrong)."""
    log, hits = workdir.with_suffix(".log"), 0
    for strike in strikes:
        status = victims.run(victims.train, workdir, log, strike)
        struck = status in (-strike.signal, 128 + strike.signal)
        hits += struck
        if not struck and status != 0:
            return workdir, max(hits, 1), f"status {status}: {log.read_text(errors='replace').splitlines()[-1:]}"
        if status == 0:
            break
    noise = _noise(log)
    log.unlink(missing_ok=True)
    return workdir, hits, noise


def _finish_all(lab: Lab, chains: list[list[Strike]]) -> Iterator[str]:
    with ThreadPoolExecutor(WORKERS) as pool:
        started = [pool.submit(_chain, strikes, lab.new_folder()) for strikes in chains]
        for future in started:
            workdir, hits, wrong = future.result()
            outcome = wrong or lab.finish(workdir)
            yield from [outcome] * (hits if outcome == IDENTICAL else max(hits, 1))
            shutil.rmtree(workdir, ignore_errors=True)


def _chains(lab: Lab, count: int, rng: np.random.Generator, number: signal.Signals) -> Iterator[str]:
    most = victims.count_ticks(lab.folder)[0] // 2
    lengths = [CHAIN] * (count // CHAIN) + [count % CHAIN] * (count % CHAIN > 0)
    strike = lambda: Strike(number, int(rng.integers(1, most + 1)), float(rng.choice([0.0, rng.uniform(0, 0.2)])))
    return _finish_all(lab, [[strike() for _ in range(length)] for length in lengths])


def sigkill(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    return _chains(lab, count, rng, signal.SIGKILL)


def sigterm(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    return _chains(lab, count, rng, signal.SIGTERM)


def file_events(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Strikes at a different file event each time, at all of them if `count` is large enough."""
    ticks = victims.count_ticks(lab.folder)[1]
    order = [int(tick) for _ in range(-(-count // ticks)) for tick in rng.permutation(ticks) + 1]
    return _finish_all(lab, [[Strike(signal.SIGKILL, tick, steps=False)] for tick in order[:count]])


def start_up(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Sends SIGTERM to the command while it imports, reads flags and data, and compiles."""
    words = [sys.executable, "-m", "cifar_jax.train", "quickstart", "--num-epochs", "1000", "--workdir"]
    for delay in rng.uniform(0.3, 4.0, count):
        workdir = lab.new_folder()
        process = subprocess.Popen([*words, workdir], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.terminate()
        try:
            errors = process.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            yield "trains on"
            continue
        finally:
            shutil.rmtree(workdir, ignore_errors=True)
        before_python = process.returncode == -signal.SIGTERM and not errors  # no handler is installed yet
        ended = process.returncode == 128 + signal.SIGTERM or before_python
        traced = "Traceback" in errors or "Exception ignored" in errors
        yield STATUS_143 if ended and not traced else f"status {process.returncode}: {errors.splitlines()[-1:]}"


def garbage_collection(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """To a short command, at a random one of its first collections."""
    for number, collection in enumerate(rng.integers(1, 40, count)):
        folder = lab.new_folder()
        folder.mkdir()
        status = victims.run(victims.collect, ("convert", "predict")[number % 2], folder, int(collection))
        noise = _noise(folder / "output.log")
        left = [path.name for path in folder.iterdir() if path.name not in ("output.log", "image.png")]
        shutil.rmtree(folder)
        ended = status in (128 + signal.SIGTERM, -signal.SIGTERM)  # the latter before the command began
        yield STATUS_143 if ended and not noise and not left else f"status {status}, {noise}, left {left}"


def other_thread(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    for _ in range(count):
        workdir, outcomes = lab.new_folder(), list[str]()
        thread = threading.Thread(target=lambda: outcomes.append(lab.finish(workdir)))  # noqa: B023
        thread.start()
        thread.join()
        yield outcomes[0] if outcomes else "the thread ends by an error"
