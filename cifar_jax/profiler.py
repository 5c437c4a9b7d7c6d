"""Records a few training steps in a trace for Perfetto or xprof. A failing profiler never stops a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from cifar_jax.console import say
from cifar_jax.errors import one_line


class Profiler:
    """Traces `steps` steps into WORKDIR/profile, rounded up to whole compiled calls. 0: none.

    The first call is not traced: it allocates memory. A context, which ends the trace if the run ends.
    """

    def __init__(self, workdir: Path, steps: int, wait: Callable[[], object]) -> None:
        """Args: wait: returns when all steps so far are done."""
        self._folder, self._steps, self._wait = workdir / "profile", steps, wait
        self._traced: int | None = None  # None: not begun
        self._over = steps == 0

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._traced is not None and not self._over:
            self._stop()

    def update(self, count: int) -> None:
        """Counts the steps of a call that was started."""
        if self._over:
            return
        self._wait()
        if self._traced is None:
            self._traced = 0
            self._attempt(lambda: jax.profiler.start_trace(self._folder))
            return
        self._traced += count
        if self._traced >= self._steps:
            self._stop()

    def _stop(self) -> None:
        if not self._attempt(jax.profiler.stop_trace):
            return
        self._over = True
        if self._traced:
            say(f"trace of {self._traced} steps in {self._folder}: open its .trace.json.gz in ui.perfetto.dev")
        else:
            say("warning: --profile: the run ended after its first call of steps: the trace has none", error=True)

    def _attempt(self, action: Callable[[], object]) -> bool:
        """Returns: whether it succeeded. After a failure nothing more is traced."""
        try:
            action()
        except Exception as error:
            self._over = True
            say(f"warning: --profile failed ({one_line(error)})", error=True)
            return False
        return True
