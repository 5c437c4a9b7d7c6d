"""A network's parameters as an ordered list of (kernel, bias), the form between all frameworks.

Kernels are HWIO or [inputs, outputs] with inputs flattened from NHWC. Biases are [outputs]. All are numpy arrays of
floats, in the order of MODELS[name].LAYERS. The last bias has one value per class.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.models import MODELS, get_model

Layers = list[tuple[np.ndarray, np.ndarray]]
Named = tuple[str, np.ndarray]
Params = dict[str, dict[str, Any]]
Shape = tuple[int, ...]
Shapes = tuple[tuple[str, Shape, Shape], ...]


def expected_shapes(model: str, num_classes: int = 10) -> Shapes:
    """Returns (Flax layer name, kernel shape, bias shape) of each layer in order. Raises: UserError: unknown model."""
    network: Any = get_model(model)
    *layers, (name, kernel, _) = _shapes(network)
    return (*layers, (name, (*kernel[:-1], num_classes), (num_classes,)))  # only the last layer depends on num_classes


@functools.cache
def _shapes(network: Any) -> Shapes:
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = lambda images: network().init(jax.random.key(0), images)  # a key outside would start JAX's devices
    params = jax.eval_shape(init, images)["params"]
    if set(params) != set(network.LAYERS):
        raise ValueError(f"{network.__name__}.LAYERS is {network.LAYERS}, but its parameters belong to {list(params)}")
    return tuple((name, params[name]["kernel"].shape, params[name]["bias"].shape) for name in network.LAYERS)


def has_final_relu(model: str) -> bool:
    """Returns whether the network's class has the field `final_relu`, an optional ReLU after the last layer."""
    return "final_relu" in get_model(model).__dataclass_fields__


def create_module(model: str, num_classes: int, final_relu: bool, **fields: Any) -> nn.Module:
    """Creates the Flax network. Args: fields: other fields of its class (dropout_rates, dtype)."""
    relu: dict[str, Any] = {"final_relu": True} if final_relu else {}
    return get_model(model)(num_classes=num_classes, **relu, **fields)


def check_tensors(tensors: Sequence[Named], shapes: Sequence[Shape]) -> None:
    """Checks (name, tensor) pairs. Raises: UserError naming a missing, surplus, misshapen or non-finite tensor."""
    for (name, tensor), shape in zip(tensors, shapes):
        if tuple(tensor.shape) != tuple(shape):
            raise UserError(f"tensor {name} has shape {tuple(tensor.shape)}, must have {tuple(shape)}")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise UserError(f"tensor {name} has type {tensor.dtype}, must be a floating-point type")
        with np.errstate(over="ignore"):
            finite = np.isfinite(tensor.astype(np.float32, copy=False)).all()
        if not finite:
            raise UserError(f"tensor {name} has values that are not finite in float32")
    if len(tensors) > len(shapes):
        raise UserError(f"tensor {tensors[len(shapes)][0]} is surplus: there must be {len(shapes)}")
    if len(tensors) < len(shapes):
        after = f" after {tensors[-1][0]}" if tensors else ""
        raise UserError(f"a tensor of shape {tuple(shapes[len(tensors)])} is missing{after}")


def layers_from_params(params: Mapping[str, Any], model: str | None = None) -> tuple[Layers, str]:
    """Converts Flax params to (layers in the network's order, the network's name).

    Args: model: None: found by the layers' names. Raises: UserError if the params don't fit the network.
    """
    if model is not None:
        return _layers_of(params, model), model
    missing = {name: [layer for layer in MODELS[name].LAYERS if layer not in params] for name in MODELS}
    candidates = sorted(MODELS, key=lambda name: (len(missing[name]), abs(len(MODELS[name].LAYERS) - len(params))))
    for name in candidates:
        with contextlib.suppress(UserError):
            return _layers_of(params, name), name
    return _layers_of(params, candidates[0]), candidates[0]  # raises the error of the closest network


def _layers_of(params: Mapping[str, Any], model: str) -> Layers:
    layers: Layers = []
    for name in get_model(model).LAYERS:
        if not {"kernel", "bias"} <= set(params.get(name, ())):
            raise UserError(f"tensors of {name} are missing")
        layers.append((np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])))
    surplus = [name for name in params if name not in get_model(model).LAYERS]
    if surplus:
        raise UserError(f"tensors of {surplus[0]} do not belong to {model}")
    outputs = layers[-1][1].shape
    for (name, *shapes), arrays in zip(expected_shapes(model, outputs[0] if len(outputs) == 1 else 10), layers):
        check_tensors([(f"{name}/kernel", arrays[0]), (f"{name}/bias", arrays[1])], shapes)
    return layers


def params_from_layers(layers: Sequence[tuple[np.ndarray, np.ndarray]], model: str) -> Params:
    """Converts layers in the network's order to Flax params, float32 (float64 stays float64)."""
    as_float = lambda array: np.ascontiguousarray(array, np.float64 if array.dtype == np.float64 else np.float32)
    return {
        name: {"kernel": as_float(kernel), "bias": as_float(bias)}
        for name, (kernel, bias) in zip(get_model(model).LAYERS, layers, strict=True)
    }


def num_classes_of(params: Mapping[str, Any], model: str) -> int:
    return int(params[get_model(model).LAYERS[-1]]["bias"].shape[0])


def reorder_flatten(layers: Layers, to_channels_last: bool) -> Layers:
    """Reorders layers for features flattened from NHWC instead of NCHW, or the inverse.

    Only a dense layer that follows a convolution changes. Its inputs are square feature maps.
    """
    layers = list(layers)
    for i in range(1, len(layers)):
        kernel, channels = layers[i][0], len(layers[i - 1][1])
        if kernel.ndim == 2 and layers[i - 1][0].ndim == 4:
            size = round((len(kernel) / channels) ** 0.5)
            if to_channels_last:
                order = np.arange(len(kernel)).reshape(channels, size, size).transpose(1, 2, 0)
            else:
                order = np.arange(len(kernel)).reshape(size, size, channels).transpose(2, 0, 1)
            layers[i] = kernel[order.ravel()], layers[i][1]
    return layers
