"""The networks in Keras (channels last), and conversion of their weights to and from Flax.

Keras and Flax share their layouts (HWIO, [inputs, outputs], NHWC flattening), so a conversion only orders the tensors.
A twin is a list of its layers' (class, fields). Keras builds a network from it, and keras_json compares files with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.installed import import_installed
from cifar_jax.models import get_model
from cifar_jax.weights.pairing import pair_tensors
from cifar_jax.weights.params import Params, layers_from_params, params_from_layers

Layer = tuple[str, dict[str, Any]]
WRITTEN_VERSION = "2.15.0"  # Keras version whose format is written; Keras 3 reads it too


def import_keras() -> Any:
    """Imports keras, with the PyTorch backend unless KERAS_BACKEND is set. TensorFlow is not needed.

    Raises: UserError if Keras or its backend is not installed.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        return import_installed("keras")
    except (ImportError, ValueError) as error:  # ValueError: Keras does not know the KERAS_BACKEND
        backend = os.environ["KERAS_BACKEND"]
        advice = (
            "pip install 'cifar_jax[parity]'" if backend == "torch" else f"KERAS_BACKEND is {backend}: set it to torch"
        )
        raise UserError(f"Keras or its backend is not installed ({error}): {advice}") from error


def _initializer(kind: str, **config: Any) -> dict[str, Any]:
    return {"class_name": kind, "config": config}


def _lenet5(num_classes: int, dropout_rates: Sequence[float] = (0.2, 0.2)) -> list[Layer]:
    first, second = dropout_rates
    uniform = _initializer("VarianceScaling", scale=1 / 3, mode="fan_in", distribution="uniform")  # PyTorch's default
    xavier_normal = _initializer("VarianceScaling", scale=1.0, mode="fan_avg", distribution="untruncated_normal")
    bias = lambda fan_in: _initializer("RandomUniform", minval=-(fan_in**-0.5), maxval=fan_in**-0.5)

    def conv(inputs: int, filters: int) -> Layer:
        fields = {"filters": filters, "kernel_size": [5, 5], "activation": "relu"}
        return "Conv2D", fields | {"kernel_initializer": uniform, "bias_initializer": bias(25 * inputs)}

    def dense(inputs: int, units: int, kernel: dict[str, Any] = uniform, activation: str = "relu") -> Layer:
        fields = {"units": units, "activation": activation}
        return "Dense", fields | {"kernel_initializer": kernel, "bias_initializer": bias(inputs)}

    pool = ("MaxPooling2D", {"pool_size": [2, 2]})
    return [
        conv(3, 32), ("Dropout", {"rate": first}), pool,
        conv(32, 64), ("Dropout", {"rate": second}), pool,
        ("Flatten", {}),
        dense(1600, 200, xavier_normal), dense(200, 100), dense(100, num_classes, activation="linear"),
    ]  # fmt: skip


def _all_cnn(
    num_classes: int, dropout_rates: Sequence[float] = (0.2, 0.5, 0.5), final_relu: bool = False
) -> list[Layer]:
    first, second, third = (("Dropout", {"rate": rate}) for rate in dropout_rates)

    def conv(filters: int, size: int = 3, padding: str = "same", activation: str = "relu") -> Layer:
        fields = {"filters": filters, "kernel_size": [size, size], "padding": padding, "activation": activation}
        return "Conv2D", fields

    pool = ("MaxPooling2D", {"pool_size": [3, 3], "strides": [2, 2]})
    return [
        conv(96), first, conv(96), conv(96), pool, second,
        conv(192), conv(192, padding="valid"), conv(192), pool, third,
        conv(192), conv(192, 1), conv(num_classes, 1, activation="relu" if final_relu else "linear"),
        ("GlobalAveragePooling2D", {}),
    ]  # fmt: skip


TWINS: dict[str, Callable[..., list[Layer]]] = {"all_cnn": _all_cnn, "lenet5": _lenet5}


def twin_layers(
    model: str, dropout_rates: Sequence[float] | None = None, final_relu: bool = False, num_classes: int = 10
) -> list[Layer]:
    """Returns the twin's layers. Raises: UserError for an unknown network or one without a twin."""
    get_model(model)
    if model not in TWINS:
        raise UserError(f"{model} has no twin in Keras: choose one of {', '.join(TWINS)}")
    rates = {} if dropout_rates is None else {"dropout_rates": tuple(dropout_rates)}
    return TWINS[model](num_classes=num_classes, **rates, **({"final_relu": True} if final_relu else {}))


def create_model(
    model: str, dropout_rates: Sequence[float] | None = None, final_relu: bool = False, num_classes: int = 10
) -> Any:
    """Returns a keras.Sequential from float images [N, 32, 32, 3] to logits [N, num_classes].

    It has the original's initializers. The Keras program's softmax becomes part of the loss (`from_logits=True`).
    Args: model: one of TWINS; dropout_rates: None: the original's; final_relu: see the network's class.
    Raises: UserError if Keras is not installed, or for an unknown network or one without a twin.
    """
    layers = twin_layers(model, dropout_rates, final_relu, num_classes)
    keras = import_keras()
    keras.config.set_image_data_format("channels_last")  # overrides the user's keras.json
    built = [getattr(keras.layers, kind)(**fields) for kind, fields in layers]
    return keras.Sequential([keras.layers.Input((32, 32, 3)), *built])


def snake_case(kind: str) -> str:
    """Converts a class name to its form in Keras' files: MaxPooling2D → max_pooling2d."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()


def architecture(model: str, final_relu: bool = False, num_classes: int = 10) -> dict[str, Any]:
    """Returns the twin's architecture as JSON values of Keras 2, which Keras 3 reads too, with the original's names."""
    first = {"name": "input_1", "batch_input_shape": [None, 32, 32, 3], "dtype": "float32"}
    layers: list[dict[str, Any]] = [{"class_name": "InputLayer", "config": first}]
    counts: dict[str, int] = {}
    for kind, fields in twin_layers(model, final_relu=final_relu, num_classes=num_classes):
        counts[kind] = counts.get(kind, 0) + 1
        name = {"name": f"{snake_case(kind)}_{counts[kind]}", "dtype": "float32"}
        formats = {"data_format": "channels_last"} if kind not in ("Dense", "Dropout") else {}
        layers.append({"class_name": kind, "config": name | formats | fields})
    return {"class_name": "Sequential", "config": {"name": model, "layers": layers}}


def params_from_keras(weights: Any, model: str | None = None) -> Params:
    """Converts a Keras model, its get_weights(), or (name, array) pairs in that order to Flax params.

    Returns: float32 params; float64 arrays stay float64.
    Raises: UserError naming a tensor that is missing, surplus, misshapen, not floating-point or not finite.
    """
    if hasattr(weights, "get_weights"):
        weights = [(variable.path, values) for variable, values in zip(weights.weights, weights.get_weights())]
    named = [pair if isinstance(pair, tuple) else (f"number {i}", np.asarray(pair)) for i, pair in enumerate(weights)]
    paired = pair_tensors(named, model, order="stated")
    kernels, biases = ([array for _, array in paired.tensors[start::2]] for start in (0, 1))
    return params_from_layers(list(zip(kernels, biases)), paired.model)


def params_to_keras(params: Mapping[str, Any], model: str | None = None) -> list[np.ndarray]:
    """Converts Flax params to arrays for set_weights() of `create_model`'s network. Inverts `params_from_keras`."""
    layers, _ = layers_from_params(params, model)
    return [array for pair in layers for array in pair]
