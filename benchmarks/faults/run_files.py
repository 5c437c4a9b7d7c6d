"""Faults of a run's JSON files: invalid or unexpected content."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.disks import IDENTITY
from benchmarks.faults.lab import IDENTICAL, REFUSED, Lab
from benchmarks.faults.mutations import mutate

CHECKPOINT = "checkpoints/2"
METADATA = f"{CHECKPOINT}/_CHECKPOINT_METADATA"  # with other JSON there, Orbax can't open any checkpoint
FILES = (
    *("config.json", "dataset.json", "summary.json", METADATA),
    *(f"{CHECKPOINT}/{name}" for name in ("sha256.json", "progress/metadata")),
)
VALUES: tuple[Any, ...] = (None, [], {}, "", -1, 1e300, 10**30, True, [[[]]], {"a": {"b": 1}})
DEEP = ("[" * 100_000, '{"a":' * 100_000)
TEXTS = (*DEEP, "null", "[]", '"text"', "{}", "", "\0" * 100, "9" * 10_000, "NaN", "{", "\ufeff{}")


def _hostile(content: str, case: str, rng: np.random.Generator) -> bytes:
    """Returns another text, or the content with a changed, missing or additional field or changed bytes."""
    if case == "text":
        return TEXTS[int(rng.integers(len(TEXTS)))].encode()
    if case == "bytes":
        return mutate(content.encode(), rng)
    fields = json.loads(content)
    if not isinstance(fields, dict) or not fields:
        return b"[]"
    name = list(fields)[int(rng.integers(len(fields)))]
    if case == "value":
        fields[name] = VALUES[int(rng.integers(len(VALUES)))]
    elif case == "less":
        del fields[name]
    else:
        fields[f"more {name}"] = fields[name]
    return json.dumps(fields).encode()


def hostile(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    cases = itertools.cycle(itertools.product(("text", "value", "less", "more", "bytes"), FILES))
    for case, name in itertools.islice(cases, count):
        workdir = lab.new_folder(lab.half)
        path: Path = workdir / name
        path.write_bytes(_hostile(path.read_text(), case, rng))
        outcome = lab.finish(workdir)
        good = outcome == IDENTICAL or (outcome == REFUSED and name in (*IDENTITY, METADATA))
        yield outcome if good else f"{case} in {name}: {outcome}"
        shutil.rmtree(workdir, ignore_errors=True)
