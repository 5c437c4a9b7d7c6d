"""The networks in PyTorch, and conversion of their weights to and from Flax.

PyTorch's kernels are OIHW and [outputs, inputs]. PyTorch flattens NCHW and Flax NHWC, so the inputs of a dense layer
after a convolution are reordered. Reading a network from a state_dict needs no twin here; writing one does.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.installed import import_installed
from cifar_jax.models import get_model
from cifar_jax.weights.pairing import pair_tensors
from cifar_jax.weights.params import (
    Named,
    Params,
    layers_from_params,
    params_from_layers,
    reorder_flatten,
)

# Each network's layer names in its twin, then other names found in files.
NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "all_cnn": (tuple(f"conv{i}" for i in range(1, 10)),),
    "lenet5": (
        ("convLayer1", "convLayer2", "fullyc1", "fullyc2", "fullyc3"),  # as in the notebook
        ("conv1", "conv2", "fullyc1", "fullyc2", "fullyc3"),
    ),
}
# Duplicate keys in the original's state_dict: its class stores the result of xavier_normal_, which is the weight.
ALIASES = {"lenet5": {"xav": "fullyc1.weight"}}


def create_model(
    model: str, dropout_rates: Sequence[float] | None = None, final_relu: bool = False, num_classes: int = 10
) -> Any:
    """Returns a torch.nn.Sequential from float images [N, 3, 32, 32] to logits [N, num_classes].

    It has the original's initializers.
    Args: model: one of TWINS; dropout_rates: None: the original's; final_relu: see the network's class.
    Raises: UserError if PyTorch is not installed, or for an unknown network or one without a twin.
    """
    get_model(model)
    if model not in TWINS:
        raise UserError(f"{model} has no twin in PyTorch: choose one of {', '.join(TWINS)}")
    torch = import_torch()
    rates = {} if dropout_rates is None else {"dropout_rates": tuple(dropout_rates)}
    return TWINS[model](torch.nn, num_classes=num_classes, **rates, **({"final_relu": True} if final_relu else {}))


def _lenet5(nn: Any, num_classes: int, dropout_rates: Sequence[float] = (0.2, 0.2)) -> Any:
    first, second = dropout_rates
    network = nn.Sequential(
        OrderedDict(
            convLayer1=nn.Conv2d(3, 32, 5), relu1=nn.ReLU(), dropout1=nn.Dropout(first), pool1=nn.MaxPool2d(2),
            convLayer2=nn.Conv2d(32, 64, 5), relu2=nn.ReLU(), dropout2=nn.Dropout(second), pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fullyc1=nn.Linear(1600, 200), relu3=nn.ReLU(),
            fullyc2=nn.Linear(200, 100), relu4=nn.ReLU(),
            fullyc3=nn.Linear(100, num_classes),
        )
    )  # fmt: skip
    nn.init.xavier_normal_(network.fullyc1.weight)  # the rest is PyTorch's default
    return network


def _all_cnn(
    nn: Any, num_classes: int, dropout_rates: Sequence[float] = (0.2, 0.5, 0.5), final_relu: bool = False
) -> Any:
    first, second, third = dropout_rates
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
            conv9=nn.Conv2d(192, num_classes, 1), relu9=nn.ReLU() if final_relu else nn.Identity(),
            average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
        )
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.xavier_uniform_(parameter) if parameter.ndim == 4 else nn.init.zeros_(parameter)
    return network


TWINS: dict[str, Callable[..., Any]] = {"all_cnn": _all_cnn, "lenet5": _lenet5}


def import_torch() -> Any:
    """Imports torch. Raises: UserError if PyTorch is not installed."""
    try:
        return import_installed("torch")
    except ImportError as error:
        raise UserError("PyTorch is not installed: pip install 'cifar_jax[parity]'") from error


def params_from_pytorch(state_dict: Mapping[str, Any], model: str | None = None) -> Params:
    """Converts a state_dict of tensors to Flax params, float32 (float64 stays float64).

    Args: model: None: found by the tensors' shapes.
    Raises: UserError naming a tensor that is missing, surplus, misshapen, not floating-point or not finite.
    """
    return params_from_arrays([(name, _as_array(name, tensor)) for name, tensor in state_dict.items()], model)[0]


def params_from_arrays(tensors: Sequence[Named], model: str | None = None) -> tuple[Params, str, list[str]]:
    """Like `params_from_pytorch`, for arrays. Returns: (params, network name, notes on dropped or reordered tensors).

    Layers are found as in `pairing`. A copy of another tensor is dropped if its key ends in neither weight nor bias,
    like the notebook's `xav`.
    """
    arrays, notes = dict(tensors), []
    identity = lambda array: (array.shape, array.dtype.str, hashlib.sha256(array.tobytes()).digest())
    identities = {name: identity(array) for name, array in arrays.items()}
    counts = Counter(identities.values())
    for name, last in [(name, name.rpartition(".")[2]) for name in arrays]:
        if last not in ("weight", "bias") and counts[identities[name]] > 1:
            del arrays[name]
        elif any(last in aliases for aliases in ALIASES.values()):
            raise UserError(f"tensor {name} must be a copy of another tensor, and it is not")
    for wrapper in ("_orig_mod.", "module."):
        pattern = rf"(^|(?<=\.)){re.escape(wrapper)}"
        bare = {re.sub(pattern, "", name): array for name, array in arrays.items()}
        if len(bare) == len(arrays) and list(bare) != list(arrays):
            arrays = bare
            notes.append(f"dropped the prefix {wrapper} of its names")
    foreign_shape = lambda shape: (*shape[:1:-1], *shape[:-2]) if len(shape) == 4 else shape[::-1]
    paired = pair_tensors(list(arrays.items()), model, foreign_shape, known_names=lambda name: NAMES.get(name, ()))
    if paired.reordered:
        notes.append("its layers are in another order than the network's: they were matched by name and shape")
    kernels, biases = ([array for _, array in paired.tensors[start::2]] for start in (0, 1))
    to_flax = lambda weight: weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
    layers = reorder_flatten([(to_flax(kernel), bias) for kernel, bias in zip(kernels, biases)], to_channels_last=True)
    return params_from_layers(layers, paired.model), paired.model, notes


def _as_array(name: str, tensor: Any) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        if tensor.dtype.itemsize < 4 and tensor.is_floating_point():  # numpy has no bfloat16
            tensor = tensor.float()
        return tensor.numpy()
    except (RuntimeError, TypeError, AttributeError) as error:  # a type that numpy lacks, or not a tensor
        raise UserError(f"tensor {name} can't be read ({error})") from error


def params_to_pytorch(params: Mapping[str, Any], model: str | None = None) -> dict[str, np.ndarray]:
    """Converts Flax params to the state_dict of `create_model`'s network, as arrays. Inverts `params_from_pytorch`."""
    layers, model = layers_from_params(params, model)
    if model not in NAMES:
        raise UserError(f"{model} has no twin in PyTorch: use .safetensors")
    state_dict: dict[str, np.ndarray] = {}
    for name, (kernel, bias) in zip(NAMES[model][0], reorder_flatten(layers, to_channels_last=False)):
        weight = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        state_dict |= {f"{name}.weight": np.ascontiguousarray(weight), f"{name}.bias": bias}
    return state_dict


def file_state_dict(params: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Returns a state_dict that the original's class can load: torch tensors, with the duplicate keys of ALIASES."""
    torch = import_torch()
    tensors = {name: torch.tensor(array) for name, array in params_to_pytorch(params, model).items()}
    return {alias: tensors[name] for alias, name in ALIASES.get(model, {}).items()} | tensors


def load_params(network: Any, params: Mapping[str, Any]) -> None:
    """Copies Flax params into a network created by `create_model`."""
    torch = import_torch()
    network.load_state_dict({name: torch.tensor(array) for name, array in params_to_pytorch(params).items()})
