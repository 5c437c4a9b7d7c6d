"""How a run ends before its last epoch's end."""

from __future__ import annotations

from typing import Any

from cifar_jax.checkpoint import Progress
from cifar_jax.configs.base import Config
from cifar_jax.errors import UserError


class Interrupted(Exception):
    """The run was stopped. Its state is saved if it has taken a step."""

    def __init__(self, progress: Progress, steps_per_epoch: int) -> None:
        self._arguments = progress, steps_per_epoch
        where = f"saved after {progress.epoch} epochs and {progress.step}/{steps_per_epoch} steps"
        super().__init__(where if progress != Progress() else "stopped before a new step: there is nothing to save")

    def __reduce__(self) -> tuple[Any, ...]:  # by default it is unpickled with the text as its only argument
        return type(self), self._arguments


class FailedTraining(UserError):
    """The run diverged or stalled (its loss stays at chance)."""

    def __init__(self, what: str, config: Config) -> None:
        self.what, self._config = what, config
        restart = "" if config.auto_restart else ", or use --auto-restart"
        super().__init__(f"{what}: use another --workdir with a lower --learning-rate or another --seed{restart}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self._config)
