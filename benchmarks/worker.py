"""Runs each backend of benchmarks.throughput in its own process."""

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
    """A backend can't be measured. The text is the reason, in one line."""


class Worker:
    """A backend in its own process."""

    def __init__(self, backend: str, workload: Workload, platform: str | None, timeout: float) -> None:
        """Args: platform: the one that JAX found; None for JAX itself; timeout: seconds to wait for an answer."""
        context = multiprocessing.get_context("spawn")
        self._timeout = timeout
        self._connection, theirs = context.Pipe()
        arguments = (theirs, backend, workload, platform)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the backend. Raises: Absent if it fails, hangs or its process ends."""
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
    """Main function of the process: creates the backend and answers (method, *arguments) with (error line, result)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # Set before a framework starts: all share the GPU, or none uses it. OMP_WAIT_POLICY is not set: OpenMP threads of
    # an idle worker use no CPU, and PASSIVE could slow PyTorch down when it wakes them.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if platform == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    keep_memory()  # PyTorch benefits from it too
    in_one_line = lambda error: f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    # Any failure of a framework becomes the reason why it is left out.
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
