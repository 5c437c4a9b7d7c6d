"""Which of a run's checkpoints are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class LatestTwoAndBest:
    """An Orbax preservation policy. Orbax' own for the best can't open a run with one damaged metric."""

    best: int | None = None
    accuracy: float = -1.0

    def add(self, number: int, accuracy: float | None) -> None:
        """Of equals the later one is the best."""
        if accuracy is not None and accuracy >= self.accuracy:
            self.best, self.accuracy = number, accuracy

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        numbers = [checkpoint.step for checkpoint in checkpoints]
        return [number in numbers[-2:] or number == self.best for number in numbers]
