"""Training with several processes: how they find each other, and what they agree on.

Each process runs the same program on its own devices. Process 0 alone reads and writes the run's folder. What it finds
there, and any failure of one process, is told to all. With one process each function is a plain call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cifar_jax.cluster import Processes, is_clusters_process
from cifar_jax.console import is_main, say
from cifar_jax.errors import UserError

T = TypeVar("T")

SILENCE_SECONDS = 30  # a process that sends no heartbeat for so long is taken for dead
LEAVING_SECONDS = 10  # how long the end of one process waits for the ends of the others
RESUME = "run the same command in all processes to resume"


@contextlib.contextmanager
def connected(processes: Processes) -> Iterator[None]:
    """Connects this process to the others, if there are any. Enter it before JAX creates its devices.

    If another process ends suddenly, this one ends too: with a line on stderr, within SILENCE_SECONDS or little more.
    Raises: UserError if JAX finds no cluster, or the others don't answer in JAX's 5 minutes.
    """
    address = processes.coordinator
    if address is None and not is_clusters_process(os.environ):
        yield
        return
    with _watched() as end_watch:
        _initialize(processes)
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if not re.search(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Gloo|NCCL", str(error)):
                raise
            reason = " ".join(str(error).split())[:200]
            say(f"error: lost another process ({reason}): {RESUME}", error=True, everywhere=True)
            end_watch()
            os._exit(2)  # JAX's own end would wait for the lost process, then abort
        finally:
            with contextlib.suppress(RuntimeError):  # the others did not end in LEAVING_SECONDS
                jax.distributed.shutdown()


def _initialize(processes: Processes) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, at which a run is saved
    given = {} if processes.coordinator in (None, "auto") else dataclasses.asdict(processes)
    if given:
        given |= {"coordinator_address": given.pop("coordinator"), "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=SILENCE_SECONDS, shutdown_timeout_seconds=LEAVING_SECONDS
        )
    except (ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"can't connect to the other processes ({reason}): check --coordinator and start all"
        ) from error


@contextlib.contextmanager
def _watched() -> Iterator[Callable[[], None]]:
    """Starts a program that prints a line if this process ends within the context. Yields what ends the program.

    JAX aborts a process, without a Python exception, when another one dies.
    """
    line = f"error: this process ended suddenly, perhaps because another one did: {RESUME}"
    program = f"import sys; sys.stdin.buffer.read(1) or print({line!r}, file=sys.stderr)"
    with subprocess.Popen([sys.executable, "-ISc", program], stdin=subprocess.PIPE, start_new_session=True) as watch:

        def end() -> None:
            watch.communicate(b".")

        try:
            yield end
        finally:
            end()


def _is_alone() -> bool:
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def broadcast(tree: T) -> T:
    """Returns process 0's arrays: a tree of numpy arrays of the same shapes and types in all processes.

    The sum by which JAX broadcasts would turn -0 into 0, so it gets the arrays as bytes.
    """
    if _is_alone():
        return tree
    as_bytes = jax.tree.map(lambda x: np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8), tree)
    sent = multihost_utils.broadcast_one_to_all(as_bytes)
    return jax.tree.map(lambda x, data: np.frombuffer(data.tobytes(), x.dtype).reshape(x.shape), tree, sent)


def _gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in order."""
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(data)])).ravel()
    padded = np.pad(data, (0, int(lengths.max()) - len(data)))
    rows = multihost_utils.process_allgather(padded[None], tiled=True)
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths)]


def on_main(function: Callable[[], T]) -> T:
    """Calls a function in process 0 alone and returns its result, which is pickled, in all.

    Raises: UserError in all processes if the function raises it.
    """
    if _is_alone():
        return function()
    result, failure = None, None
    if is_main():
        try:
            result = function()
        except UserError as error:
            failure = error
    result, text = _gather((result, failure and str(failure)))[0]
    if text is not None:
        raise failure or UserError(text)
    return result


def agree(function: Callable[[], T]) -> T:
    """Calls a function in each process and returns this one's result.

    Raises: UserError in all processes if the function raises it in one.
    """
    if _is_alone():
        return function()
    result, failure = None, None
    try:
        result = function()
    except UserError as error:
        failure = error
    for number, text in enumerate(_gather(failure and str(failure))):
        if text is not None:
            raise failure or UserError(f"process {number}: {text}")
    return result  # type: ignore[return-value]


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Raises: UserError in all processes, naming the first difference, if the facts of one differ from process 0's."""
    if _is_alone():
        return
    first, *others = _gather(dict(facts))
    for number, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first.get(name):
                raise UserError(
                    f"process {number} has another {what}: {name} {value}, and process 0 {first.get(name)}: start all "
                    "processes with the same"
                )


def any_of(flag: bool) -> bool:
    """Tells whether the flag is set in any process."""
    return flag if _is_alone() else bool(multihost_utils.process_allgather(np.array([flag])).any())
