"""The process that each backend of benchmarks.throughput has to itself."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.backends import create_backend
from benchmarks.workloads import Workload
from cifar_jax.host import keep_memory


class Absent(Exception):
    """Why a backend takes no part, in one line."""


class Worker:
    """A backend in its own process."""

    def __init__(self, backend: str, workload: Workload, platform: str | None, timeout: float) -> None:
        """Args: platform: the one JAX found; None for JAX itself. timeout: seconds to wait for an answer."""
        context = multiprocessing.get_context("spawn")
        self._timeout = timeout
        self._connection, theirs = context.Pipe()
        arguments = (theirs, backend, workload, platform)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the backend's method returns. Raises Absent if it fails, hangs or its process ends."""
        try:
            self._connection.send((method, *arguments))
            if not self._connection.poll(self._timeout):
                raise Absent(f"no answer in {self._timeout:g} s")
            failure, result = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise Absent(f"its process ended with status {self._process.exitcode}") from error
        if failure is not None:
            raise Absent(failure)
        return result

    def close(self) -> None:
        """Ends the process, even if it hangs."""
        self._connection.close()
        self._process.join(2)
        self._process.kill()
        self._process.join()
        self._process.close()


def serve(connection: Connection, backend: str, workload: Workload, platform: str | None) -> None:
    """The process: creates the backend, then answers (method, *arguments) with (error in one line, result)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    # Set before a framework wakes up: they share the GPU, or none may use it. OMP_WAIT_POLICY stays as it is: an idle
    # worker's OpenMP threads were seen to use no CPU, and PASSIVE could cost PyTorch the time of waking them.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if platform == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    keep_memory()  # PyTorch gains from it, too
    in_one_line = lambda error: f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    # Whatever a framework fails with is the reason for its absence.
    failure, worker = None, None
    try:
        worker = create_backend(backend, workload, platform)
    except Exception as error:
        failure = in_one_line(error)
    while True:
        try:
            method, *arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (failure, None if failure else getattr(worker, method)(*arguments))
        except Exception as error:
            answer = (in_one_line(error), None)
        connection.send(answer)
