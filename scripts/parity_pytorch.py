"""Checks parity with the PyTorch notebook: networks, losses, gradients, optimizer, initializers, predictions.

python scripts/parity_pytorch.py [--layers] [--json] [--out FILE] [--data-dir DATA] [--weights FILE …]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from parity import command, predictions
from parity.check import Check
from parity.reference import torch, torch_loss

from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config
from cifar_jax.datasets import Dataset
from cifar_jax.weights import pytorch
from cifar_jax.weights.files import load_weights
from cifar_jax.weights.params import Params


class PyTorchReference:
    """Implements parity.reference.Reference with cifar_jax.weights.pytorch."""

    MODELS = tuple(pytorch.TWINS)

    def __init__(
        self, model: str, params: Params | None = None, dtype: str = "float32", final_relu: bool = False
    ) -> None:
        self.model = model
        self.dtype = getattr(torch, dtype)
        self.network = pytorch.create_model(model, final_relu=final_relu).to(self.dtype)
        if params is not None:
            pytorch.load_params(self.network, params)

    def params(self) -> Params:
        return pytorch.params_from_pytorch(self.network.state_dict(), self.model)

    def _images(self, images: np.ndarray) -> torch.Tensor:
        return torch.tensor(images, dtype=self.dtype).permute(0, 3, 1, 2)

    def logits(self, images: np.ndarray, dropout: bool = False) -> torch.Tensor:
        return self.network.train(dropout)(self._images(images))

    def gradients(self, loss: torch.Tensor) -> Params:
        names, parameters = zip(*self.network.named_parameters())
        return pytorch.params_from_pytorch(dict(zip(names, torch.autograd.grad(loss, parameters))), self.model)

    def activations(self, images: np.ndarray) -> list[np.ndarray]:
        outputs: list[torch.Tensor] = []
        x = self._images(images)
        for layer in self.network.eval().children():
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                outputs[-1] = x
            elif list(layer.parameters()):
                outputs.append(x)
        to_nhwc = lambda x: x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        return [to_nhwc(output.detach()).numpy() for output in outputs]

    def train(self, config: Config, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Params:
        optimizer = sgd(config, self.network.parameters())
        for images, labels in batches:
            optimizer.zero_grad()
            torch_loss(self.logits(images), labels).backward()
            optimizer.step()
        return self.params()


def sgd(config: Config, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, config.learning_rate, momentum=config.momentum, nesterov=config.nesterov)


def fed_optimizer(config: Config, params: Params, gradients: Sequence[Params]) -> Params:
    """Applies torch.optim.SGD to given gradients in turn. Returns: the params."""
    parameters: Any = {name: torch.nn.Parameter(torch.tensor(values)) for name, values in params.items()}
    optimizer = sgd(config, parameters.values())
    for gradient in gradients:
        for name, values in gradient.items():
            parameters[name].grad = torch.tensor(values)
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def checks(arguments: command.Arguments, dataset: Dataset) -> list[Check]:
    recipe = RECIPES["lenet5_reference"]
    result = command.common_checks(PyTorchReference, recipe, fed_optimizer, arguments, dataset)
    test = dataset.test_images[: arguments.test_images], dataset.test_labels[: arguments.test_images]
    for path in arguments.weights:
        if load_weights(path).model == recipe.model:  # only the notebook tests with dropout on
            result += predictions.check_dropout_at_test(PyTorchReference, path, *test)
    return result


if __name__ == "__main__":
    sys.exit(command.run("scripts/parity_pytorch.py", ("torch",), checks))
