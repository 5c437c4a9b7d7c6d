"""The networks in the other framework, Keras (on its PyTorch backend) or PyTorch, as the checks see them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import ClassVar, NoReturn, Protocol

import numpy as np

from cifar_jax.configs.base import Config
from cifar_jax.weights.params import Params


def not_installed(error: ImportError) -> NoReturn:
    what = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else f"can't import: {error}"
    print(f"error: {what}: pip install -e '.[parity]'", file=sys.stderr)
    sys.exit(2)


try:
    import torch
except ImportError as error:
    not_installed(error)

FedOptimizer = Callable[[Config, Params, Sequence[Params]], Params]


class Reference(Protocol):
    """One of the networks in another framework. Images are float NHWC arrays; params are Flax'.

    MODELS: names of the networks that the framework has.
    """

    MODELS: ClassVar[tuple[str, ...]]

    def __init__(
        self, model: str, params: Params | None = None, dtype: str = "float32", final_relu: bool = False
    ) -> None:
        """Without params: initialised by the framework, from torch.manual_seed's state. final_relu: see AllCNN."""

    def params(self) -> Params:
        """Its weights."""

    def logits(self, images: np.ndarray, dropout: bool = False) -> torch.Tensor:
        """[N, classes], differentiable."""

    def gradients(self, loss: torch.Tensor) -> Params:
        """Of a loss made from `logits`."""

    def activations(self, images: np.ndarray) -> list[np.ndarray]:
        """The output of every layer with weights after its ReLU, in order, NHWC."""

    def train(self, config: Config, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Params:
        """The weights after a step of the recipe's optimizer on every (images, labels), dropout off."""


def torch_loss(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels, dtype=torch.int64))
