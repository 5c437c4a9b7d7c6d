"""Interface of the networks in the other framework: PyTorch, or Keras on its PyTorch backend."""

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
    """A network in another framework. Images are float NHWC arrays. Params have Flax's form.

    MODELS: names of the networks that exist in the framework.
    """

    MODELS: ClassVar[tuple[str, ...]]

    def __init__(
        self, model: str, params: Params | None = None, dtype: str = "float32", final_relu: bool = False
    ) -> None:
        """Args: params: None: the framework initialises from torch.manual_seed's state; final_relu: see AllCNN."""

    def params(self) -> Params:
        """Returns the weights."""

    def logits(self, images: np.ndarray, dropout: bool = False) -> torch.Tensor:
        """Returns differentiable logits [N, num_classes]."""

    def gradients(self, loss: torch.Tensor) -> Params:
        """Returns the gradients of a loss computed from `logits`."""

    def activations(self, images: np.ndarray) -> list[np.ndarray]:
        """Returns the output of every layer with weights, after its ReLU, in order, NHWC."""

    def train(self, config: Config, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Params:
        """Trains a step of the recipe's optimizer on every (images, labels), without dropout. Returns: the weights."""


def torch_loss(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels, dtype=torch.int64))
