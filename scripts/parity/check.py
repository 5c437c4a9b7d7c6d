"""Rows of the parity table, and differences of tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

WHY_FLOAT64 = "the same formula: float64 rounding alone"


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of the table. `error` is the maximum absolute difference unless `name` states another measure."""

    name: str
    error: float
    tolerance: float
    why: str

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # a NaN fails

    def as_json(self) -> dict[str, Any]:
        """Returns the fields and 'passed'. An error that is not finite becomes None, which JSON can represent."""
        error = float(self.error) if np.isfinite(self.error) else None
        return dataclasses.asdict(self) | {"error": error, "tolerance": float(self.tolerance), "passed": self.passed}


def difference(ours: Any, theirs: Any) -> float:
    """Returns the maximum absolute difference of two arrays, or of two trees with the same structure."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    errors = [np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() for a, b in pairs]
    return float(np.max(errors))  # max() would ignore a NaN


def relative_difference(ours: Any, theirs: Any) -> float:
    """Returns the largest relative error of all tensors: maximum absolute difference / largest value of theirs."""
    tensors = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return float(np.max([difference(a, b) / np.abs(b).max() for a, b in tensors]))
