"""Random mutations of a file's bytes."""

from __future__ import annotations

import numpy as np

KINDS = ("flip", "bytes", "cut", "insert", "remove", "copy", "number")
EDGE = 2048  # bytes at each end of a file, where formats have their headers


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Applies one to four random changes, half of them near an end of the file."""
    for _ in range(int(rng.integers(1, 5))):
        kind = KINDS[int(rng.integers(len(KINDS)))]
        at, length = _place(len(data), rng), int(2 ** rng.uniform(0, 8))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        elif kind == "bytes":
            data = data[:at] + rng.bytes(length) + data[at + length :]
        elif kind == "cut":
            data = data[:at] if rng.random() < 0.2 else data
        elif kind == "insert":
            data = data[:at] + rng.bytes(length) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + length :]
        elif kind == "copy":
            other = _place(len(data), rng)
            data = data[:at] + data[other : other + length] + data[at + length :]
        else:
            width = int(rng.choice([1, 2, 4, 8]))
            limits = (0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
            value = limits[int(rng.integers(len(limits)))]
            data = data[:at] + value.to_bytes(width, "little") + data[at + width :]
    return data


def _place(length: int, rng: np.random.Generator) -> int:
    if length < 2:
        return 0
    edge = min(EDGE, length)
    if rng.random() < 0.5:
        return int(rng.integers(length))
    return int(rng.integers(edge)) if rng.random() < 0.5 else length - 1 - int(rng.integers(edge))
