"""The two networks in PyTorch, and their weights to and from Flax.

PyTorch's kernels are OIHW and [outputs, inputs], and it flattens NCHW where Flax' LeNet flattens NHWC: the first dense
kernel's inputs are reordered. Tensors are mapped by their order in the state_dict.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.weights.params import Params, layers_from_params, params_from_tensors

NAMES = {
    "all_cnn": tuple(f"conv{i}" for i in range(1, 10)),
    "lenet5": ("conv1", "conv2", "fullyc1", "fullyc2", "fullyc3"),
}

# LeNet's first dense layer: for each of Flax' inputs, a flattened [5, 5, 64], its place in PyTorch's [64, 5, 5].
_FLATTENED = np.arange(64 * 5 * 5).reshape(64, 5, 5).transpose(1, 2, 0).ravel()
_reordered = lambda kernel, order: kernel[order] if len(kernel) == len(order) else kernel


def create_model(model: str, dropout_rates: Sequence[float] | None = None, final_relu: bool = False) -> Any:
    """A torch.nn.Sequential from float images [N, 3, 32, 32] to logits [N, 10], with the original's initialisers.

    Args: model 'all_cnn' or 'lenet5'; dropout_rates: the original's if None; final_relu: see models.AllCNN.
    Raises: UserError if PyTorch is not installed.
    """
    torch = import_torch()
    nn = torch.nn
    if model == "lenet5":
        first, second = dropout_rates or (0.2, 0.2)
        network = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 32, 5), relu1=nn.ReLU(), dropout1=nn.Dropout(first), pool1=nn.MaxPool2d(2),
                conv2=nn.Conv2d(32, 64, 5), relu2=nn.ReLU(), dropout2=nn.Dropout(second), pool2=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fullyc1=nn.Linear(1600, 200), relu3=nn.ReLU(),
                fullyc2=nn.Linear(200, 100), relu4=nn.ReLU(),
                fullyc3=nn.Linear(100, 10),
            )
        )  # fmt: skip
        nn.init.xavier_normal_(network.fullyc1.weight)  # the rest is PyTorch's default
        return network

    first, second, third = dropout_rates or (0.2, 0.5, 0.5)
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 96, 3, padding=1), relu1=nn.ReLU(), dropout1=nn.Dropout(first),
            conv2=nn.Conv2d(96, 96, 3, padding=1), relu2=nn.ReLU(),
            conv3=nn.Conv2d(96, 96, 3, padding=1), relu3=nn.ReLU(),
            pool1=nn.MaxPool2d(3, 2), dropout2=nn.Dropout(second),
            conv4=nn.Conv2d(96, 192, 3, padding=1), relu4=nn.ReLU(),
            conv5=nn.Conv2d(192, 192, 3), relu5=nn.ReLU(),
            conv6=nn.Conv2d(192, 192, 3, padding=1), relu6=nn.ReLU(),
            pool2=nn.MaxPool2d(3, 2), dropout3=nn.Dropout(third),
            conv7=nn.Conv2d(192, 192, 3, padding=1), relu7=nn.ReLU(),
            conv8=nn.Conv2d(192, 192, 1), relu8=nn.ReLU(),
            conv9=nn.Conv2d(192, 10, 1), relu9=nn.ReLU() if final_relu else nn.Identity(),
            average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
        )
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.xavier_uniform_(parameter) if parameter.ndim == 4 else nn.init.zeros_(parameter)
    return network


def import_torch() -> Any:
    """The torch module. Raises UserError if PyTorch is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch is not installed: pip install -e '.[parity]'") from error
    return torch


def params_from_pytorch(state_dict: Mapping[str, Any], model: str | None = None) -> Params:
    """Flax params, float32 (or float64), from a state_dict of tensors; `model` is guessed from their number if None.

    The notebook's state_dict has fullyc1.weight once more under the key `xav`, which is passed over.
    Raises: UserError naming a tensor that is missing, too many, misshapen, not of floating point or not finite.
    """
    tensors = {}
    for name, tensor in state_dict.items():
        try:
            tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
            if tensor.dtype.itemsize < 4 and tensor.is_floating_point():  # numpy has no bfloat16
                tensor = tensor.float()
            tensors[name] = tensor.numpy()
        except (RuntimeError, TypeError) as error:  # of a type that numpy does not have
            raise UserError(f"tensor {name} can't be read ({error})") from error
    xav = next((tensors.pop(name) for name in list(tensors) if name.rpartition(".")[2] == "xav"), None)
    if xav is not None and not any(np.array_equal(xav, tensor) for tensor in tensors.values()):
        raise UserError("tensor xav differs from fullyc1.weight, of which it must be a copy")
    foreign_shape = lambda shape: (*shape[:1:-1], *shape[:-2]) if len(shape) == 4 else shape[::-1]
    to_flax = lambda weight: weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else _reordered(weight.T, _FLATTENED)
    return params_from_tensors(list(tensors.items()), model, foreign_shape, to_flax)


def params_to_pytorch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state_dict of `create_model`'s network, as arrays. The inverse of `params_from_pytorch`, of tensors."""
    layers, model = layers_from_params(params)
    state_dict: dict[str, np.ndarray] = {}
    for name, (kernel, bias) in zip(NAMES[model], layers):
        weight = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else _reordered(kernel, np.argsort(_FLATTENED)).T
        state_dict |= {f"{name}.weight": np.ascontiguousarray(weight), f"{name}.bias": bias}
    return state_dict


def load_params(network: Any, params: Mapping[str, Any]) -> None:
    """Copies Flax params into a network of `create_model`."""
    torch = import_torch()
    network.load_state_dict({name: torch.tensor(array) for name, array in params_to_pytorch(params).items()})
