"""Base class of the backends for benchmarks.throughput, and the JAX backend (the package's Trainer and Evaluator)."""

from __future__ import annotations

import abc
import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.workloads import ORDER_STEPS, Workload
from cifar_jax.environment import PACKAGES, describe_environment
from cifar_jax.host import check_devices, cpu_cores, use_cpu_cores
from cifar_jax.parallel import choose_steps_per_call, has_constant_bounds, replicate, select_devices
from cifar_jax.train_step import create_train_state
from cifar_jax.trainer import Evaluator, Trainer

Family = Literal["jax", "pytorch", "pytorch-compile", "pytorch-cudagraphs", "keras"]
FAMILIES: dict[Family, tuple[str, ...]] = {
    "jax": ("jax",),
    "pytorch": ("pytorch", "pytorch channels_last"),
    "pytorch-compile": ("pytorch-compile", "pytorch-compile channels_last"),
    "pytorch-cudagraphs": ("pytorch-cudagraphs", "pytorch-cudagraphs channels_last"),
    "keras": ("keras",),
}


# On an accelerator, at most; it divides ORDER_STEPS. Enough to hide the call, few enough for rounds of 0.1 s.
STEPS_OF_A_CALL = 50

# JAX queues 32 calls and then waits in a thread that the cores' devices need: they wait for each other for ever.
QUEUED_CALLS = 8


def best_rate(multiply: Callable[[], Any], wait: Callable[[Any], Any], size: int) -> float:
    """Times products of two [size, size] matrices. Returns: the best rate in FLOP/s."""
    wait(multiply())
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        results = [multiply() for _ in range(2)]
        wait(results[-1])
        seconds.append(time.perf_counter() - begin)
    return 2 * 2 * size**3 / min(seconds)


def max_rss() -> int:
    """Returns the peak memory of this process in bytes, including all imports."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Backend(abc.ABC):
    """A framework that runs a workload. It compiles a phase at the phase's first run."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._steps: dict[str, int] = {}

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns {'threads'} and, for JAX, {'platform', 'environment'}, as JSON values."""

    @abc.abstractmethod
    def run(self, phase: str, steps: int) -> float:
        """Runs this many steps. Returns: seconds."""

    @abc.abstractmethod
    def multiply(self, size: int) -> float:
        """Returns the best rate in FLOP/s of a product of two [size, size] matrices."""

    @abc.abstractmethod
    def peak_memory(self) -> int:
        """Returns bytes: the framework's count on a GPU, those of the whole process on a CPU."""

    def unit(self, phase: str) -> int:
        """Returns the number of steps of which a run has a multiple."""
        return 1

    def warm_up(self, phase: str, seconds: float) -> dict[str, Any]:
        """Compiles a phase and chooses the number of steps for a round of about `seconds`."""
        unit = self.unit(phase)
        begin = time.perf_counter()
        self.run(phase, unit)
        first_call = time.perf_counter() - begin
        for _ in range(2):
            self.run(phase, unit)  # PyTorch's compiled functions record CUDA graphs in their second call
        steps, taken = unit, self.run(phase, unit)
        while taken < seconds / 10:
            steps *= 4
            taken = self.run(phase, steps)
        self._steps[phase] = unit * max(1, round(seconds * steps / taken / unit))
        return {"first_call_seconds": round(first_call, 3), "steps_of_a_round": self._steps[phase]}

    def run_round(self, phase: str) -> float:
        """Runs a round. Returns: images per second."""
        steps = self._steps[phase]
        return round(steps * self._workload.plain.batch_size / self.run(phase, steps), 1)


class JaxBackend(Backend):
    """The package's training and evaluation steps, called as in train.py and evaluate.py.

    On an accelerator a call has at most STEPS_OF_A_CALL steps, and inference leaves out what fills no whole call.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        use_cpu_cores()
        check_devices()
        one = None if jax.default_backend() == "cpu" else 1  # PyTorch uses all cores, or one GPU
        self._devices = select_devices(dataclasses.replace(workload.plain, num_devices=one))
        images, labels, order = workload.data()
        # Copied to the devices once: Trainer and Evaluator do not copy replicated arrays again.
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
            self._phases[phase] = self._create_evaluation() if phase == "inference" else self._create_training(phase)
        in_a_pass, in_a_call = self._steps_of_a_pass(phase), self._steps_of_a_call(phase)
        begin, done, queued = time.perf_counter(), 0, 0
        while done < steps:
            first = done % in_a_pass
            count = min(in_a_call, steps - done, in_a_pass - first)
            result = self._phases[phase](first, count)
            done, queued = done + count, queued + 1
            if done == steps or queued == QUEUED_CALLS:
                jax.block_until_ready(result)
                queued = 0
        return time.perf_counter() - begin

    def _steps_of_a_pass(self, phase: str) -> int:
        if phase != "inference":
            return ORDER_STEPS
        batches = len(self._labels) // self._workload.plain.batch_size
        if has_constant_bounds(self._devices):  # whole calls alone: others would be compiled too
            return batches // STEPS_OF_A_CALL * STEPS_OF_A_CALL or batches
        return batches

    def _steps_of_a_call(self, phase: str) -> int:
        in_a_pass = self._steps_of_a_pass(phase)
        if has_constant_bounds(self._devices):
            return min(STEPS_OF_A_CALL, in_a_pass)
        return choose_steps_per_call(self._workload.plain, self._devices, in_a_pass)

    def unit(self, phase: str) -> int:
        return self._steps_of_a_call(phase) if has_constant_bounds(self._devices) else 1  # else calls compile once more

    def _create_training(self, phase: str) -> Callable[[int, int], Any]:
        """Returns call(first step, number of steps) → arrays of the state after these steps."""
        config = self._workload.config(phase)
        trainer = Trainer(config, self._images, self._labels, self._devices, steps_per_epoch=ORDER_STEPS)

        def call(first: int, count: int) -> Any:
            loss = trainer.run_steps(self._order, first, count)
            return trainer.state, loss

        return call

    def _create_evaluation(self) -> Callable[[int, int], Any]:
        """Returns call(first step, number of steps) → metrics after these steps."""
        config, devices = self._workload.plain, self._devices
        state = replicate(create_train_state(config, ORDER_STEPS), devices)
        evaluator = Evaluator(config, state, self._images, self._labels, devices)
        history = evaluator.create_history()

        def call(first: int, count: int) -> Any:
            nonlocal history
            history = evaluator.run_steps(history, state, first, count)
            return history

        return call

    def multiply(self, size: int) -> float:
        matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(self._workload.plain.dtype))
        product = jax.jit(jnp.matmul)
        return best_rate(lambda: product(matrix, matrix), jax.block_until_ready, size)

    def peak_memory(self) -> int:
        statistics = self._devices[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else max_rss()


def create_backend(name: str, workload: Workload, platform: str | None) -> Backend:
    """Creates a backend of FAMILIES. Args: platform: the one that JAX found; None for JAX itself."""
    if name == "jax":
        return JaxBackend(workload)
    if "cudagraphs" in name and platform == "cpu":
        raise RuntimeError("CUDA graphs need a GPU")
    from benchmarks import pytorch_backends  # imported here because it imports torch

    kind = pytorch_backends.KerasBackend if name == "keras" else pytorch_backends.PyTorchBackend
    return kind(name, workload, platform)
