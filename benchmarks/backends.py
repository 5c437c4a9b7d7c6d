"""The contenders of benchmarks.throughput: a workload, the process that each contender has to itself, and JAX's."""

from __future__ import annotations

import abc
import dataclasses
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.configs.base import Config
from cifar_jax.environment import PACKAGES, describe_environment
from cifar_jax.host import check_devices, cpu_cores, keep_memory, use_cpu_cores
from cifar_jax.parallel import default_steps_per_call, replicate, select_devices
from cifar_jax.train_step import create_eval_steps, create_history, create_train_state, create_train_steps

Phase = Literal["training", "training_augmented", "inference"]
Family = Literal["jax", "pytorch", "pytorch-compile", "pytorch-cudagraphs", "keras"]
PHASES: tuple[Phase, ...] = get_args(Phase)
FAMILIES: dict[Family, tuple[str, ...]] = {
    "jax": ("jax",),
    "pytorch": ("pytorch", "pytorch channels_last"),
    "pytorch-compile": ("pytorch-compile", "pytorch-compile channels_last"),
    "pytorch-cudagraphs": ("pytorch-cudagraphs", "pytorch-cudagraphs channels_last"),
    "keras": ("keras",),
}
ORDER_STEPS = 1000  # steps until the order of the images repeats: the most that JAX runs in one call


@dataclasses.dataclass(frozen=True)
class Workload:
    """A recipe without and with augmentation, at one batch size and dtype, on random images that stay on the device."""

    plain: Config
    augmented: Config

    def config(self, phase: str) -> Config:
        return self.augmented if phase == "training_augmented" else self.plain

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images uint8 [N, 32, 32, 3], labels int32 [N], and order int32 [ORDER_STEPS, batch], shuffled passes."""
        batch = self.plain.batch_size
        size = batch * max(4, 4096 // batch)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        passes = [rng.permutation(size) for _ in range(-(-ORDER_STEPS * batch // size))]
        order = np.concatenate(passes)[: ORDER_STEPS * batch].reshape(ORDER_STEPS, batch)
        return images, rng.integers(0, 10, size, dtype=np.int32), order.astype(np.int32)


def best_rate(multiply: Callable[[], Any], wait: Callable[[Any], Any], size: int) -> float:
    """The best FLOP/s of a few timings of a product of two [size, size] matrices."""
    wait(multiply())
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        results = [multiply() for _ in range(2)]
        wait(results[-1])
        seconds.append(time.perf_counter() - begin)
    return 2 * 2 * size**3 / min(seconds)


def max_rss() -> int:
    """The most memory that this process ever held, in bytes, the package and its imports included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Contender(abc.ABC):
    """A framework at work on a workload. What it compiles, it compiles at the first run of a phase."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._steps: dict[str, int] = {}

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    def run(self, phase: str, steps: int) -> float:
        """Seconds that so many steps take."""

    @abc.abstractmethod
    def multiply(self, size: int) -> float:
        """The best FLOP/s of a product of two [size, size] matrices."""

    @abc.abstractmethod
    def peak_memory(self) -> int:
        """Bytes: of the GPU as the framework counts them, on the CPU of the whole process."""

    def warm_up(self, phase: str, seconds: float) -> dict[str, Any]:
        """Compiles, and chooses the steps of a round so that it takes about `seconds`."""
        begin = time.perf_counter()
        self.run(phase, 1)
        first_call = time.perf_counter() - begin
        for _ in range(2):
            self.run(phase, 1)  # PyTorch's compiled functions record their CUDA graphs in the second call
        steps, taken = 1, self.run(phase, 1)
        while taken < seconds / 10:
            steps *= 4
            taken = self.run(phase, steps)
        self._steps[phase] = max(1, round(seconds * steps / taken))
        return {"first_call_seconds": round(first_call, 3), "steps_of_a_round": self._steps[phase]}

    def run_round(self, phase: str) -> float:
        """Images a second."""
        steps = self._steps[phase]
        return round(steps * self._workload.plain.batch_size / self.run(phase, steps), 1)


class JaxContender(Contender):
    """The package's own training and evaluation steps, as train.py and evaluate.py call them."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        use_cpu_cores()
        check_devices()
        one = None if jax.default_backend() == "cpu" else 1  # PyTorch has all cores and one GPU
        self._devices = select_devices(dataclasses.replace(workload.plain, num_devices=one))
        self._per_call = default_steps_per_call(workload.plain.model, self._devices)
        images, labels, order = workload.data()
        self._images, self._labels, self._order = replicate((images, labels, order.ravel()), self._devices)
        self._phases: dict[str, Callable[[int, int], Any]] = {}

    def describe(self) -> dict[str, Any]:
        packages = (*PACKAGES, "torch", "keras")
        platform = self._devices[0].platform
        return {
            "threads": cpu_cores(),
            "platform": platform,
            "environment": describe_environment(self._devices, packages),
        }

    def run(self, phase: str, steps: int) -> float:
        if phase not in self._phases:
            self._phases[phase] = self._compile(phase)
        in_a_pass = self._steps_of_a_pass(phase)
        begin, done = time.perf_counter(), 0
        while done < steps:
            first = done % in_a_pass
            count = min(self._per_call, steps - done, in_a_pass - first)
            result = self._phases[phase](first, count)
            done += count
        jax.block_until_ready(result)
        return time.perf_counter() - begin

    def _steps_of_a_pass(self, phase: str) -> int:
        return len(self._labels) // self._workload.plain.batch_size if phase == "inference" else ORDER_STEPS

    def _compile(self, phase: str) -> Callable[[int, int], Any]:
        """(first step, number of steps) → arrays of the state after them."""
        config, devices = self._workload.config(phase), self._devices
        steps = self._steps_of_a_pass(phase)
        state, history = replicate((create_train_state(config, ORDER_STEPS), create_history(steps)), devices)
        data, zero = (self._images, self._labels), np.int32(0)
        if phase == "inference":
            eval_steps = create_eval_steps(config, devices, self._per_call)(history, state, *data, zero, zero)

            def call(first: int, count: int) -> Any:
                nonlocal history
                history = eval_steps(history, state, *data, np.int32(first), np.int32(count))
                return history
        else:
            compile_for = create_train_steps(config, devices, self._per_call)
            train_steps = compile_for(state, history, *data, self._order, zero, zero)

            def call(first: int, count: int) -> Any:
                nonlocal state, history
                state, history, loss = train_steps(state, history, *data, self._order, np.int32(first), np.int32(count))
                return state, loss

        return call

    def multiply(self, size: int) -> float:
        matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(self._workload.plain.dtype))
        product = jax.jit(jnp.matmul)
        return best_rate(lambda: product(matrix, matrix), jax.block_until_ready, size)

    def peak_memory(self) -> int:
        statistics = self._devices[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else max_rss()


def serve(connection: Connection, contender: str, workload: Workload, platform: str | None) -> None:
    """A worker process: builds the contender, then answers (method, *arguments) with (error in one line, result).

    `platform`: the one JAX found; None for JAX itself.
    """
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
        worker = create_contender(contender, workload, platform)
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


def create_contender(contender: str, workload: Workload, platform: str | None) -> Contender:
    if contender == "jax":
        return JaxContender(workload)
    if "cudagraphs" in contender and platform == "cpu":
        raise RuntimeError("CUDA graphs need a GPU")
    from benchmarks import pytorch_contenders  # here: it imports torch

    kind = pytorch_contenders.KerasContender if contender == "keras" else pytorch_contenders.PyTorchContender
    return kind(contender, workload, platform)
