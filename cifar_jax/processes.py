"""Training with several processes: how they find each other, and what they agree on.

Each process runs the same program on its own devices. Process 0 alone reads and writes the run's folder. What it finds
there, and any failure of one process, is told to all. With one process each function is a plain call.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cifar_jax.cli import say_failure
from cifar_jax.cluster import Processes, check_port, is_clusters_process, refuse_unknown_launcher
from cifar_jax.console import is_main, say
from cifar_jax.errors import UserError, is_lost_process, one_line
from cifar_jax.host import use_cpu_cores
from cifar_jax.interrupt import Interrupts, Terminated

T = TypeVar("T")

SILENCE_SECONDS = 30  # a process that sends no heartbeat for so long is taken for dead
LEAVING_SECONDS = 10  # how long the end of one process waits for the ends of the others
RESUME = "run the same command in all processes to resume"
CHECK = "check --coordinator; none trains without other processes"


@contextlib.contextmanager
def connected(processes: Processes) -> Iterator[None]:
    """Connects this process to the others, if there are any. Enter it before JAX creates its devices.

    A failure in one process ends all: each says in a line what it knows, and does not wait for the others. If another
    process dies, that is within SILENCE_SECONDS or little more.
    Raises: UserError if JAX finds no cluster or another program uses the port; SystemExit with the status of a failure
    that was said.
    """
    if processes.coordinator is None:
        refuse_unknown_launcher(os.environ)
    if processes.coordinator == "none" or (processes.coordinator is None and not is_clusters_process(os.environ)):
        yield
        return
    use_cpu_cores()  # before a signal's handler can create devices
    with _watched(f"error: could not connect to all processes: start all of them, and {CHECK}") as end_watch:
        _initialize(processes)
        end_watch()
    with _watched(f"error: this process ended suddenly, perhaps because another one did: {RESUME}") as end_watch:
        try:
            yield
        except UserError as error:  # of all processes, or of this one, whose end is the others'
            status = say_failure(error)
            end_watch()
            _leave()
            raise SystemExit(status) from error
        except BaseException as error:
            status = _say_sudden(error)
            end_watch()
            os._exit(status)  # JAX's own end would wait for the others, then abort
        _leave()


def _leave() -> None:
    with contextlib.suppress(RuntimeError):  # the others did not end in LEAVING_SECONDS
        jax.distributed.shutdown()


def _say_sudden(error: BaseException) -> int:
    """Says why this process ends before the others. Returns: its exit status."""
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        return 128 + (signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and is_lost_process(error):
        reason = one_line(error)
        say(f"error: lost another process ({reason}): {RESUME}", error=True, everywhere=True)
        return 2
    try:
        return say_failure(error) if isinstance(error, Exception) else 1
    except Exception:  # a bug
        traceback.print_exc()
        return 1


def _initialize(processes: Processes) -> None:
    """Connects. Signals end the process meanwhile, because Python can't handle them while JAX waits."""
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, at which a run is saved
    given = {} if processes.coordinator in (None, "auto") else dataclasses.asdict(processes)
    if given:
        say(f"process {given['process_id']} of {given['num_processes']}: connecting to {given['coordinator']}")
        given |= {"coordinator_address": given.pop("coordinator"), "cluster_detection_method": "deactivate"}
    else:
        say("connecting to the other processes of this cluster; --coordinator none trains without them")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if visible and "," not in visible and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            given["local_device_ids"] = [0]  # the only GPU that the task sees; JAX would take that of the task's number
    if given.get("process_id") == 0:
        check_port(processes)
    given |= {"heartbeat_timeout_seconds": SILENCE_SECONDS, "shutdown_timeout_seconds": LEAVING_SECONDS}
    try:
        with _default_signals():
            jax.distributed.initialize(**given)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = one_line(error)
        raise UserError(f"can't connect to the other processes ({reason}): {CHECK}") from error


@contextlib.contextmanager
def _default_signals() -> Iterator[None]:
    in_main_thread = threading.current_thread() is threading.main_thread()  # only there Python can set handlers
    handlers = {number: signal.getsignal(number) for number in Interrupts.NUMBERS if in_main_thread}
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _watched(line: str) -> Iterator[Callable[[], None]]:
    """Starts a program that prints a line if this process ends within the context. Yields what ends the program.

    JAX aborts a process, without a Python exception, when another one dies or does not answer.
    """
    program = f"import sys; sys.stdin.buffer.read(1) or print({line!r}, file=sys.stderr)"
    with subprocess.Popen([sys.executable, "-ISc", program], stdin=subprocess.PIPE, start_new_session=True) as watch:

        def end() -> None:
            if watch.returncode is None:
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


def _attempt(function: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """Returns (a function's result, None), or (None, the UserError that it raises)."""
    try:
        return function(), None
    except UserError as error:
        return None, error


def on_main(function: Callable[[], T]) -> T:
    """Calls a function in process 0 alone and returns its result, which is pickled, in all.

    Raises: UserError in all processes if the function raises it.
    """
    if _is_alone():
        return function()
    result, failure = _attempt(function) if is_main() else (None, None)
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
    result, failure = _attempt(function)
    for number, text in enumerate(_gather(failure and str(failure))):
        if text is not None:
            raise failure or UserError(f"process {number}: {text}")
    return result  # type: ignore[return-value]


def check_same_devices() -> None:
    """Raises: UserError in all processes if they have different numbers of devices. No array is sent for it."""
    if _is_alone():
        return
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        each = ", ".join(f"process {number} has {counts[number]}" for number in sorted(counts))
        raise UserError(f"all processes need the same number of devices ({each}): on CPUs set JAX_NUM_CPU_DEVICES")


def check_same(what: str, facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raises: UserError in all processes, naming the first difference, if the facts of one differ from process 0's.

    Args: facts: is called if there are several processes.
    """
    if _is_alone():
        return
    first, *others = _gather(dict(facts()))
    for number, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first.get(name):
                raise UserError(
                    f"process {number} has another {what}: {name} {value}, and process 0 {first.get(name)}: start all "
                    "processes with the same, or separate runs with --coordinator none"
                )


def any_of(flag: bool) -> bool:
    """Tells whether the flag is set in any process."""
    return flag if _is_alone() else bool(multihost_utils.process_allgather(np.array([flag])).any())
