"""The two networks in Keras 3 (channels last), and their weights to and from Flax.

Keras and Flax share their layouts (HWIO, [inputs, outputs], NHWC flattening), so weights move by order alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.weights.params import Params, layers_from_params, params_from_tensors


def import_keras() -> Any:
    """The keras module, on the PyTorch backend unless KERAS_BACKEND says otherwise (no TensorFlow is needed).

    Raises: UserError if Keras or its backend is not installed.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        import keras
    except (ImportError, ValueError) as error:  # the latter for a KERAS_BACKEND that Keras does not know
        backend = os.environ["KERAS_BACKEND"]
        advice = "pip install -e '.[parity]'" if backend == "torch" else f"KERAS_BACKEND is {backend}: set it to torch"
        raise UserError(f"Keras or its backend is not installed ({error}): {advice}") from error
    return keras


def create_model(model: str, dropout_rates: Sequence[float] | None = None, final_relu: bool = False) -> Any:
    """A keras.Sequential from float images [N, 32, 32, 3] to logits [N, 10], with the original's initialisers.

    The Keras program's softmax is left to the loss (`from_logits=True`).
    Args: model 'all_cnn' or 'lenet5'; dropout_rates: the original's if None; final_relu: see models.AllCNN.
    Raises: UserError if Keras is not installed.
    """
    keras = import_keras()
    keras.config.set_image_data_format("channels_last")  # whatever the user's keras.json says
    layers, initializers = keras.layers, keras.initializers
    if model == "lenet5":
        first, second = dropout_rates or (0.2, 0.2)
        uniform = lambda: initializers.VarianceScaling(1 / 3, "fan_in", "uniform")  # PyTorch's default
        bias = lambda fan_in: initializers.RandomUniform(-(fan_in**-0.5), fan_in**-0.5)
        xavier_normal = initializers.VarianceScaling(1.0, "fan_avg", "untruncated_normal")

        def conv(inputs: int, features: int) -> Any:
            return layers.Conv2D(
                features, 5, activation="relu", kernel_initializer=uniform(), bias_initializer=bias(25 * inputs)
            )

        def dense(inputs: int, features: int, kernel: Any, activation: str | None = "relu") -> Any:
            return layers.Dense(features, activation, kernel_initializer=kernel, bias_initializer=bias(inputs))

        return keras.Sequential(
            [
                layers.Input((32, 32, 3)),
                conv(3, 32), layers.Dropout(first), layers.MaxPooling2D(2),
                conv(32, 64), layers.Dropout(second), layers.MaxPooling2D(2),
                layers.Flatten(),
                dense(1600, 200, xavier_normal), dense(200, 100, uniform()), dense(100, 10, uniform(), None),
            ]
        )  # fmt: skip

    first, second, third = dropout_rates or (0.2, 0.5, 0.5)
    conv3 = lambda features, padding="same": layers.Conv2D(features, 3, padding=padding, activation="relu")
    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            conv3(96), layers.Dropout(first), conv3(96), conv3(96),
            layers.MaxPooling2D(3, 2), layers.Dropout(second),
            conv3(192), conv3(192, "valid"), conv3(192),
            layers.MaxPooling2D(3, 2), layers.Dropout(third),
            conv3(192), layers.Conv2D(192, 1, activation="relu"),
            layers.Conv2D(10, 1, activation="relu" if final_relu else None),
            layers.GlobalAveragePooling2D(),
        ]
    )  # fmt: skip


def params_from_keras(weights: Any, model: str | None = None) -> Params:
    """Flax params, float32 (or float64), from a Keras model, its get_weights(), or a list of (name, array).

    Raises: UserError naming a tensor that is missing, too many, misshapen, not of floating point or not finite.
    """
    if hasattr(weights, "get_weights"):
        weights = [(variable.path, values) for variable, values in zip(weights.weights, weights.get_weights())]
    named = [pair if isinstance(pair, tuple) else (f"number {i}", np.asarray(pair)) for i, pair in enumerate(weights)]
    return params_from_tensors(named, model)


def params_to_keras(params: Mapping[str, Any]) -> list[np.ndarray]:
    """The argument of set_weights() of `create_model`'s network. The inverse of `params_from_keras`."""
    layers, _ = layers_from_params(params)
    return [array for pair in layers for array in pair]
