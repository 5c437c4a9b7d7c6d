"""A model of training on 1 to 256 TPU chips: XLA's estimates of compiled programs, and published figures of the chips.

It is not a measurement. step = compute + communication + share of what a call does once. Nothing overlaps.

compute        XLA's estimate of a step's cycles at this number of images a chip, divided by the chip's clock
communication  the step's all-reduces: 2·V / B for V bytes, and 2 · hops · HOP_SECONDS for each of them, where B is
               the rate at which a chip sends over all links that the topology gives it. An axis of 16 chips wraps
               around; it has two links a chip, and the longest way is 8 hops. A shorter axis of n chips has one, and
               n - 1 hops.

Sources: https://cloud.google.com/tpu/docs/v5e and v6e (chips); https://jax-ml.github.io/scaling-book, "How to Think
About TPUs" (wrap-around) and "Sharded Matrices" (cost of an all-reduce; about 1 µs a hop).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

HOP_SECONDS = 1e-6
RING = 16  # chips of an axis that wraps around


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes: flops_per_second: bfloat16; hbm_bytes; hbm_bytes_per_second; link_bytes_per_second: of one of the four
    links, one way; clock: Hz, or None where neither the documentation nor the peak rate tells it.
    """

    flops_per_second: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    clock: float | None


CHIPS = {
    # The clock is the peak rate divided by 4 units of 128×128 multiplications and additions: 1.503 GHz.
    "v5e": Chip(197e12, 16e9, 819e9, 1600e9 / 8 / 4, 197e12 / (4 * 128 * 128 * 2)),
    "v6e": Chip(918e12, 32e9, 1640e9, 3200e9 / 8 / 4, None),
}
TOPOLOGIES = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


@dataclasses.dataclass(frozen=True)
class Step:
    """A modelled training step. Times are in seconds. per_call: the step's share of what a call does once."""

    chips: int
    images_per_chip: float
    compute: float
    communication: float
    per_call: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.per_call


def interpolate(points: Mapping[float, float], x: float) -> float:
    """Returns the piecewise linear function through the points (x → y) at x. Raises: ValueError outside of them."""
    xs = sorted(points)
    if not xs[0] <= x <= xs[-1]:
        raise ValueError(f"{x} is outside of the compiled {xs[0]} to {xs[-1]} images a chip")
    return float(np.interp(x, xs, [points[at] for at in xs]))


def all_reduce_seconds(chip: Chip, shape: Sequence[int], sizes: Sequence[int]) -> float:
    """Returns the time of a step's all-reduces. Args: shape: chips per axis; sizes: bytes of each all-reduce."""
    axes = [length for length in shape if length > 1]
    if not axes:
        return 0.0
    hops = sum(length // 2 if length >= RING else length - 1 for length in axes)
    links = sum(2 if length >= RING else 1 for length in axes)
    return sum(2 * size / (links * chip.link_bytes_per_second) + 2 * hops * HOP_SECONDS for size in sizes)


def predict(
    chip: Chip,
    shape: Sequence[int],
    images_per_chip: float,
    cycles: Mapping[float, float],
    sizes: Sequence[int],
    cycles_per_call: float,
    steps_per_call: int,
) -> Step:
    """Returns the modelled step on a topology.

    Args: shape: chips per axis; cycles: a step's, by images a chip; sizes: bytes of each all-reduce of a step.
    Raises: ValueError for a chip whose clock is unknown, or images_per_chip outside of the compiled ones.
    """
    if chip.clock is None:
        raise ValueError("the chip's clock is unknown, so cycles are no time")
    return Step(
        chips=math.prod(shape),
        images_per_chip=images_per_chip,
        compute=interpolate(cycles, images_per_chip) / chip.clock,
        communication=all_reduce_seconds(chip, shape, sizes),
        per_call=cycles_per_call / chip.clock / steps_per_call,
    )
