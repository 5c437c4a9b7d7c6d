"""The command: python -m benchmarks.faults --out FOLDER"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import output_file, write_result
from benchmarks.faults.faults import FAULTS, Fault
from benchmarks.faults.lab import XLA_FLAGS, Lab, Skipped
from cifar_jax.cli import command, parse_arguments
from cifar_jax.environment import describe_command, describe_environment
from cifar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Injects faults and counts the outcomes. The exit status is 1 if any outcome is not an expected one."""

    out: Path
    """Folder for faults.json."""
    quick: bool = False
    """Inject each fault only a few times, in half a minute."""
    rounds: int = 1
    """Factor for the number of injections."""
    seed: int = 0
    """Seed of the random injections."""
    only: tuple[str, ...] = ()
    """Names of the faults to inject; none: all."""


def prepare(folder: Path) -> None:
    """Sets four CPU devices and a compilation cache for this process and its children. Call it before using JAX."""
    os.environ.update({"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()})
    if XLA_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ["CIFAR_JAX_CACHE"] = str(folder / "cache")
    Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).mkdir(exist_ok=True)  # otherwise a guarded read would create it
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    if "device_count" not in os.environ["XLA_FLAGS"]:
        os.environ["JAX_NUM_CPU_DEVICES"] = "4"
        jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_platforms", "cpu")


def inject(fault: Fault, lab: Lab, count: int, seed: int) -> dict[str, Any]:
    """Injects a fault `count` times. Returns: the fault's row of the result."""
    rng = np.random.default_rng([seed, zlib.crc32(fault.name.encode())])
    started = time.perf_counter()
    row: dict[str, Any] = {"name": fault.name, "injected": fault.injected, "skipped": None}
    outcomes: collections.Counter[str] = collections.Counter()
    try:
        outcomes.update(fault.run(lab, count, rng))
    except Skipped as skipped:
        row["skipped"] = str(skipped)
    except Exception as error:  # keeps the results of the other faults
        outcomes[f"the injection ends with {type(error).__name__}: {error}"] += 1
    failed = sum(number for outcome, number in outcomes.items() if outcome not in fault.good)
    times = {"times": sum(outcomes.values()), "failed": failed, "outcomes": dict(sorted(outcomes.items()))}
    return row | times | {"seconds": round(time.perf_counter() - started, 1)}


@command
def main() -> int:
    arguments = parse_arguments(Arguments, prog="python -m benchmarks.faults")
    names = [fault.name for fault in FAULTS]
    if unknown := set(arguments.only) - set(names):
        raise UserError(f"--only {sorted(unknown)[0]}: choose from {', '.join(names)}")
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: must be 1 or more")
    chosen = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    counts = {fault: fault.quick if arguments.quick else fault.count for fault in chosen}
    if not any(counts.values()):
        raise UserError("--quick leaves these faults out: omit it")
    file = output_file(arguments.out, "faults")
    content: dict[str, Any] = {
        "command": describe_command("-m benchmarks.faults", sys.argv[1:]),
        **describe_environment(jax.local_devices()[:1]),
        "seed": arguments.seed,
        "faults": (rows := []),
    }
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        prepare(Path(folder))
        lab = Lab(Path(folder))
        for fault, count in counts.items():
            if count:
                rows.append(inject(fault, lab, count * arguments.rounds, arguments.seed))
                print("{name}: {times} times, {failed} failed; {outcomes} {seconds} s".format(**rows[-1]))
                write_result(file, content, complete=False)
    write_result(file, content)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
