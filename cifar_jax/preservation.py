"""Which of a run's checkpoints are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class LatestTwoAndBest:
    """An Orbax preservation policy. Orbax' own for the best can't open a run with one damaged metric."""

    accuracies: dict[int, float] = dataclasses.field(default_factory=dict)

    def add(self, number: int, accuracy: float | None) -> None:
        """Raises: TypeError if it is no number."""
        if accuracy is not None and not math.isnan(accuracy):
            self.accuracies[number] = accuracy

    def by_accuracy(self) -> list[int]:
        """The checkpoints that have one, the best first; of equals the later one."""
        return sorted(self.accuracies, key=lambda number: (self.accuracies[number], number), reverse=True)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        numbers = [checkpoint.step for checkpoint in checkpoints]
        return [number in [*numbers[-2:], *self.by_accuracy()[:1]] for number in numbers]
