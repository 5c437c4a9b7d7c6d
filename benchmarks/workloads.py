"""Workloads to time: a network's reference recipe at a batch size and dtype, on random images, and its FLOPs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config
from cifar_jax.datasets import get_dataset
from cifar_jax.errors import UserError
from cifar_jax.models import get_model
from cifar_jax.train_step import create_model

Phase = Literal["training", "training_augmented", "inference"]
PHASES: tuple[Phase, ...] = get_args(Phase)
ORDER_STEPS = 1000  # steps after which the order of the images repeats, the most that JAX runs in one call

# Batch sizes in addition to the reference recipe's, and changes of the recipe for them: usual settings for LeNet-5 with
# larger batches, which every framework supports.
MORE_BATCH_SIZES = {"lenet5": (128,)}
LARGE_BATCH: dict[str, dict[str, Any]] = {
    "lenet5": {
        "dropout_rates": (0.0, 0.0),
        "learning_rate": 0.05,
        "nesterov": True,
        "weight_decay": 1e-3,
        "input_scaling": "standardized",
    }
}
# Augmentations that every backend supports. A recipe without any of them is timed with crops and flips.
NO_AUGMENTATION: dict[str, Any] = {
    "rotation_degrees": 0.0,
    "shift_fraction": 0.0,
    "crop_padding": 0,
    "random_flip": False,
}
CROPS_AND_FLIPS: dict[str, Any] = {"crop_padding": 3, "random_flip": True}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A recipe without and with augmentation at one batch size and dtype, on random images that stay on the device."""

    plain: Config
    augmented: Config

    def config(self, phase: str) -> Config:
        """Returns the recipe of a phase."""
        return self.augmented if phase == "training_augmented" else self.plain

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns images, uint8 [N, 32, 32, 3]; labels, int32 [N]; shuffled order, int32 [ORDER_STEPS, batch]."""
        batch = self.plain.batch_size
        size = batch * max(4, 4096 // batch)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        passes = [rng.permutation(size) for _ in range(-(-ORDER_STEPS * batch // size))]
        order = np.concatenate(passes)[: ORDER_STEPS * batch].reshape(ORDER_STEPS, batch)
        num_classes = get_dataset(self.plain.dataset).num_classes
        return images, rng.integers(0, num_classes, size, dtype=np.int32), order.astype(np.int32)


def reference_recipe(model: str) -> str:
    """Returns the name of a network's reference recipe. Raises: UserError if there is none."""
    name = f"{model}_reference"
    if name not in RECIPES:
        raise UserError(f"{model} has no recipe {name}: add cifar_jax/configs/{name}.py")
    return name


def default_batch_sizes(model: str) -> tuple[int, ...]:
    """Returns the reference recipe's batch size and those of MORE_BATCH_SIZES."""
    return (RECIPES[reference_recipe(model)].batch_size, *MORE_BATCH_SIZES.get(model, ()))


def create_workload(model: str, batch_size: int, dtype: str) -> tuple[str, Workload]:
    """Returns the reference recipe's name, and the recipe at this batch size without and with augmentation."""
    name = reference_recipe(model)
    recipe = RECIPES[name]
    changes = LARGE_BATCH.get(model, {}) if batch_size != recipe.batch_size else {}
    sizes: dict[str, Any] = {"batch_size": batch_size, "eval_batch_size": batch_size, "dtype": dtype}
    augmented = dataclasses.replace(recipe, **sizes, **changes)
    plain = dataclasses.replace(augmented, **NO_AUGMENTATION)
    if plain == augmented:
        augmented = dataclasses.replace(plain, **CROPS_AND_FLIPS)
    return name, Workload(plain, augmented)


def layer_flops(config: Config, image_size: int = 32) -> list[int]:
    """Returns each layer's FLOPs in the forward pass of one image. A multiplication and an addition count as 2.

    A convolution has 2·H_out·W_out·kh·kw·I·O, a dense layer 2·I·O.
    """
    init = functools.partial(create_model(config).init_with_output, capture_intermediates=True)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))[1]
    outputs, params = variables["intermediates"], variables["params"]
    positions = lambda name: math.prod(outputs[name]["__call__"][0].shape[1:-1])
    layers = get_model(config.model).LAYERS
    return [2 * positions(name) * math.prod(params[name]["kernel"].shape) for name in layers]


def flops_per_image(config: Config, image_size: int = 32) -> dict[str, int]:
    """Returns FLOPs by phase. Backward has two products for each forward product, except the image's gradient."""
    layers = layer_flops(config, image_size)
    training = 3 * sum(layers) - layers[0]
    return {"training": training, "training_augmented": training, "inference": sum(layers)}
