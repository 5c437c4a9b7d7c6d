"""Checks parity with the Keras program: networks, losses, gradients, optimizer, initial weights, augmentation, results.

python scripts/parity_keras.py [--layers] [--json] [--out FILE] [--data-dir DATA] [--weights FILE …]

Keras runs on its PyTorch backend. The reference of augmentation is keras-preprocessing 1.1.2, which the original uses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # gradients are taken through torch.autograd
os.environ["KERAS_TORCH_DEVICE"] = "cpu"  # else Keras takes a GPU, which lacks float64 or rounds products

import jax
import numpy as np
from parity import command
from parity.check import WHY_FLOAT64, Check, difference
from parity.distributions import distribution_checks
from parity.ours import scaled
from parity.reference import not_installed, torch, torch_loss

from cifar_jax import augment
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config
from cifar_jax.datasets import Dataset
from cifar_jax.weights import keras as keras_weights
from cifar_jax.weights.params import Params

try:
    import keras
    from keras.src.backend.common import dtypes
    from keras_preprocessing.image import ImageDataGenerator
except ImportError as error:
    not_installed(error)

RECIPE = "all_cnn_reference"

# Without TensorFlow, Keras computes dense layers and means of float64 arrays in float32. The float64 checks undo that.
dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"


class KerasReference:
    """Implements parity.reference.Reference with cifar_jax.weights.keras."""

    MODELS = tuple(keras_weights.TWINS)

    def __init__(
        self, model: str, params: Params | None = None, dtype: str = "float32", final_relu: bool = False
    ) -> None:
        self.model, self.dtype = model, dtype
        keras.config.set_floatx(dtype)  # the type of Input
        keras.config.set_dtype_policy(dtype)
        # Keras takes seeds of initial weights from Python's random. This ties them to torch.manual_seed's state.
        keras.utils.set_random_seed(torch.initial_seed() % 2**32)
        self.network = keras_weights.create_model(model, final_relu=final_relu)
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        if params is not None:
            self.network.set_weights(keras_weights.params_to_keras(params))

    def params(self) -> Params:
        return keras_weights.params_from_keras(self.network, self.model)

    def logits(self, images: np.ndarray, dropout: bool = False) -> torch.Tensor:
        return self.network(torch.tensor(images), training=dropout)

    def gradients(self, loss: torch.Tensor) -> Params:
        variables = [variable.value for variable in self.network.trainable_weights]
        gradients = torch.autograd.grad(loss, variables)
        return keras_weights.params_from_keras([gradient.numpy() for gradient in gradients], self.model)

    def activations(self, images: np.ndarray) -> list[np.ndarray]:
        outputs: list[np.ndarray] = []
        x = torch.tensor(images)
        for layer in self.network.layers:
            x = layer(x, training=False) if isinstance(layer, keras.layers.Dropout) else layer(x)
            if layer.weights and not isinstance(layer, keras.layers.Dropout):
                outputs.append(x.detach().numpy())
        return outputs

    def train(self, config: Config, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Params:
        optimizer = sgd(config)
        for images, labels in batches:
            variables = self.network.trainable_weights
            loss = torch_loss(self.logits(images), labels)
            gradients = torch.autograd.grad(loss, [variable.value for variable in variables])
            with torch.no_grad():
                optimizer.apply(list(gradients), variables)
        return self.params()


def sgd(config: Config) -> keras.optimizers.Optimizer:
    """Returns Keras 2's SGD(decay=…). Keras 3 ignores `decay` with a warning, so InverseTimeDecay replaces it."""
    schedule = keras.optimizers.schedules.InverseTimeDecay(config.learning_rate, 1, config.lr_decay)
    return keras.optimizers.SGD(schedule, momentum=config.momentum, nesterov=config.nesterov)


def fed_optimizer(config: Config, params: Params, gradients: Sequence[Params]) -> Params:
    """Applies keras.optimizers.SGD to given gradients in turn. Returns: the params."""
    variables: Any = {name: keras.Variable(values, dtype=str(values.dtype)) for name, values in params.items()}
    optimizer = sgd(config)
    with torch.no_grad():
        for gradient in gradients:
            optimizer.apply([torch.tensor(values) for values in gradient.values()], list(variables.values()))
    return {name: variable.value.detach().numpy() for name, variable in variables.items()}


def check_augmentation(images: np.ndarray) -> list[Check]:
    """Compares warp and flip with keras-preprocessing's for the same drawn parameters, and compares the draws."""
    config = RECIPES[RECIPE]
    generator = ImageDataGenerator(
        rotation_range=config.rotation_degrees, width_shift_range=config.shift_fraction,
        height_shift_range=config.shift_fraction, horizontal_flip=True,
    )  # fmt: skip
    np.random.seed(0)
    drawn = [generator.get_random_transform(images.shape[1:]) for _ in range(2000)]
    angle, shift_y, shift_x = (np.array([draw[name] for draw in drawn]) for name in ("theta", "tx", "ty"))
    angle = np.deg2rad(angle)
    flip = np.array([draw["flip_horizontal"] for draw in drawn], bool)
    count, result = len(images), []
    for dtype, tolerance, reason in (
        ("float32", 2e-5, "float32 coordinates: floor 2.4e-6"),
        ("float64", 1e-12, WHY_FLOAT64),
    ):
        inputs = scaled(images, config.model).astype(dtype)
        theirs = np.stack([generator.apply_transform(image, draw) for image, draw in zip(inputs, drawn)])
        parameters = (values[:count].astype(dtype) for values in (angle, shift_y, shift_x))
        with jax.enable_x64(dtype == "float64"):
            ours = np.asarray(jax.jit(jax.vmap(augment.affine))(inputs, *parameters))
        ours = np.where(flip[:count, None, None, None], ours[:, :, ::-1], ours)
        error = difference(ours, theirs)
        result.append(Check(f"augmentation of {count} images, {dtype}", error, tolerance, reason))
    keys = jax.random.split(jax.random.key(0), len(drawn))
    draw_affine = lambda key: augment.draw_affine(key, config.rotation_degrees, config.shift_fraction)
    our_draws = [np.asarray(values) for values in jax.jit(jax.vmap(draw_affine))(keys)]
    names = ("angle", "height shift", "width shift")
    for name, a, b in zip(names, our_draws, (angle, shift_y, shift_x)):
        result += distribution_checks(f"augmentation: {name}", a, b)
    marked = np.arange(2, dtype=np.float32).reshape(1, 2, 1)
    flips = np.asarray(jax.vmap(lambda key: augment.random_flip(key, marked))(keys))[:, 0, 0, 0]
    spread = 5 * float(np.sqrt(0.5 / len(drawn)))
    result.append(Check("augmentation: share of flips", abs(flips.mean() - flip.mean()), spread, "five deviations"))
    return result


def checks(arguments: command.Arguments, dataset: Dataset) -> list[Check]:
    recipe = RECIPES[RECIPE]
    result = command.common_checks(KerasReference, recipe, fed_optimizer, arguments, dataset)
    return result + check_augmentation(dataset.test_images[:500])


if __name__ == "__main__":
    sys.exit(command.run("scripts/parity_keras.py", ("keras", "torch", "keras-preprocessing"), checks))
