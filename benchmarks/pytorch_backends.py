"""Backends of benchmarks.throughput for PyTorch and Keras (on PyTorch), in their fastest forms.

Data, augmentation and loss stay on the device. Augmentation works on whole batches.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.backends import Backend, best_rate, max_rss
from benchmarks.workloads import ORDER_STEPS, Workload
from cifar_jax.batches import pixel_statistics
from cifar_jax.configs.base import Config
from cifar_jax.datasets import get_dataset
from cifar_jax.host import cpu_cores
from cifar_jax.weights import keras as keras_weights
from cifar_jax.weights import pytorch as pytorch_weights


def scaling(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns (scale, shift), float32 [3, 1, 1] or [1, 1, 1]: image · scale + shift equals batches.scale_images."""
    statistics = pixel_statistics(config.input_scaling, config.dataset)
    mean, std = (np.reshape(values, (-1, 1, 1)) for values in statistics)
    return np.float32(1 / (255 * std)), np.float32(-mean / std)


def affine(images: Tensor, angle: Tensor, shift_y: Tensor, shift_x: Tensor) -> Tensor:
    """Applies cifar_jax.augment.affine to a batch.

    Args: images: float [N, C, S, S]; angle: [N], radians; shift_y, shift_x: [N], pixels. Returns: [N, C, S, S].
    """
    half, offset = (images.shape[-1] - 1) / 2, images.shape[-1] / 2 + 0.5  # grid_sample has pixel i at i / half - 1
    c, s = torch.cos(angle), torch.sin(angle)
    u, v = half - offset + shift_y, half - offset + shift_x
    rows = torch.stack([c, s, (s * u + c * v + offset) / half - 1, -s, c, (c * u - s * v + offset) / half - 1], dim=1)
    grid = functional.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=True)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)


def crop(images: Tensor, padding: int, y: Tensor, x: Tensor) -> Tensor:
    """Pads float images [N, C, S, S] by reflection and crops them at offsets y, x, int64 [N], from 0 to 2 · padding."""
    size = images.shape[-1]
    windows = functional.pad(images, (padding,) * 4, mode="reflect").unfold(2, size, 1).unfold(3, size, 1)
    return windows[torch.arange(len(images), device=images.device), :, y, x]


def augment(images: Tensor, config: Config) -> Tensor:
    """Applies the recipe's random affine warp, crop and flip to float images [N, C, S, S]."""
    count, size, device = len(images), images.shape[-1], images.device
    if config.rotation_degrees or config.shift_fraction:
        uniform = lambda bound: torch.empty(count, device=device).uniform_(-bound, bound)
        shift = config.shift_fraction * size
        images = affine(images, uniform(math.radians(config.rotation_degrees)), uniform(shift), uniform(shift))
    if config.crop_padding:
        y, x = torch.randint(2 * config.crop_padding + 1, (2, count), device=device)
        images = crop(images, config.crop_padding, y, x)
    if config.random_flip:
        flipped = torch.rand(count, device=device) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    return images


class PyTorchBackend(Backend):
    """PyTorch eager, compiled or captured as a CUDA graph, contiguous or channels_last. The name tells which."""

    def __init__(self, name: str, workload: Workload, platform: str | None) -> None:
        super().__init__(workload)
        if platform != "cpu" and not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch finds no GPU, but JAX has a {platform}")
        self._captured = "cudagraphs" in name
        # max-autotune tries kernels and captures its own CUDA graphs.
        self._autotuned = "compile" in name and platform != "cpu"
        torch.manual_seed(0)
        torch.set_num_threads(cpu_cores())
        if platform != "cpu":
            torch.set_float32_matmul_precision("high")  # TF32, the default of JAX and cuDNN
            torch.backends.cudnn.benchmark = True
        self._device = torch.device("cpu" if platform == "cpu" else "cuda")
        self._format = torch.channels_last if "channels_last" in name else torch.contiguous_format
        on_device = lambda array: torch.from_numpy(array).to(self._device)
        images, labels, order = workload.data()
        self._images = on_device(images.transpose(0, 3, 1, 2)).contiguous(memory_format=self._format)
        self._labels, self._order = on_device(labels).long(), on_device(order).long()
        self._rows = self._order.unbind()
        self._position = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._scale, self._shift = map(on_device, scaling(workload.plain))
        self._total = torch.zeros((), device=self._device)
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._graphs: dict[str, Any] = {}
        self._create_network("compile" in name)

    def _create_network(self, compiled: bool) -> None:
        config = self._workload.plain
        num_classes = get_dataset(config.dataset).num_classes
        network = pytorch_weights.create_model(config.model, config.dropout_rates, num_classes=num_classes)
        self._network = network.to(self._device, memory_format=self._format)
        self._optimizer = torch.optim.SGD(
            network.parameters(),
            config.learning_rate,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=True,
        )
        if compiled:
            mode = "max-autotune" if self._autotuned else None
            self._loss = torch.compile(self._loss, mode=mode)  # type: ignore[method-assign]
            self._evaluate = torch.compile(self._evaluate, mode=mode)  # type: ignore[method-assign]

    def describe(self) -> dict[str, Any]:
        return {"threads": torch.get_num_threads()}

    def run(self, phase: str, steps: int) -> float:
        self._network.train(phase != "inference")
        if self._captured and phase not in self._graphs:
            self._graphs[phase] = self._capture(phase)
        self._total.item()  # waits for the device
        begin = time.perf_counter()
        for i in range(steps):
            if self._captured:
                self._graphs[phase].replay()
            else:
                self._step(phase, self._rows[i % ORDER_STEPS])
        self._total.item()
        return time.perf_counter() - begin

    def _step(self, phase: str, index: Tensor) -> None:
        """Runs a step on the images `index`, int64 [batch], and adds its loss to a total on the device."""
        if self._autotuned:
            torch.compiler.cudagraph_mark_step_begin()
        images, labels = self._images[index], self._labels[index]
        if phase == "inference":
            with torch.inference_mode():
                loss, correct = self._evaluate(images, labels)
                self._total.add_(loss)
                self._correct.add_(correct)
        else:
            loss = self._loss(images, labels, phase == "training_augmented")
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._total.add_(loss.detach())

    def _prepare(self, images: Tensor, augmented: bool) -> Tensor:
        """Scales and augments images: uint8 [N, 3, 32, 32] → float32."""
        scaled = images * self._scale + self._shift
        if augmented:
            scaled = augment(scaled, self._workload.augmented)
        return scaled.contiguous(memory_format=self._format)

    def _logits(self, images: Tensor) -> Tensor:
        half = self._workload.plain.dtype == "bfloat16"
        # No cache of bfloat16 weights: each is used once, and a captured graph would keep stale ones.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            return self._network(images).float()

    def _loss(self, images: Tensor, labels: Tensor, augmented: bool) -> Tensor:
        return functional.cross_entropy(self._logits(self._prepare(images, augmented)), labels)

    def _evaluate(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(self._prepare(images, False))
        return functional.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()

    def _capture(self, phase: str) -> Any:
        """Captures a CUDA graph of a whole step, which advances to the next row of the order."""

        def step() -> None:
            self._step(phase, self._order.index_select(0, self._position)[0])
            self._position.add_(1).remainder_(ORDER_STEPS)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # cuDNN must choose kernels and the momentum must exist before the capture
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph

    def multiply(self, size: int) -> float:
        matrix = torch.randn(size, size, device=self._device, dtype=getattr(torch, self._workload.plain.dtype))
        return best_rate(lambda: matrix @ matrix, lambda product: product[0, 0].item(), size)

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else max_rss()


class KerasBackend(PyTorchBackend):
    """Keras' train_on_batch and test_on_batch in a loop, on the same data and augmentation."""

    def _create_network(self, compiled: bool) -> None:
        config, keras = self._workload.plain, keras_weights.import_keras()
        if config.dtype == "bfloat16":
            keras.mixed_precision.set_global_policy("mixed_bfloat16")
        num_classes = get_dataset(config.dataset).num_classes
        model = keras_weights.create_model(config.model, config.dropout_rates, num_classes=num_classes)
        model.compile(
            # Keras' weight decay differs from the recipe's L2 but costs the same.
            keras.optimizers.SGD(
                config.learning_rate, config.momentum, config.nesterov, weight_decay=config.weight_decay or None
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=False,
        )
        self._network = model

    def _step(self, phase: str, index: Tensor) -> None:
        with torch.no_grad():
            images = self._prepare(self._images[index], phase == "training_augmented").permute(0, 2, 3, 1)
        on_batch = self._network.test_on_batch if phase == "inference" else self._network.train_on_batch
        on_batch(images, self._labels[index])
