"""cifar_jax's side of the checks: initial weights, inputs, logits and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.batches import pixel_statistics, scale_images, split_seed
from cifar_jax.models import get_model
from cifar_jax.parallel import dividing_count
from cifar_jax.train_step import cross_entropy
from cifar_jax.weights.params import Params

ORIGINAL_DATASET = "cifar10"  # the original programs' dataset


def as_dtype(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


@functools.cache
def jitted_init(model: str) -> Callable[..., Any]:
    return jax.jit(get_model(model)().init)


@functools.cache
def initial_params(model: str, seed: int = 0) -> Params:
    """Returns the initial params of create_train_state for a seed, compiled once."""
    params_key, *_ = split_seed(seed)
    return as_dtype(jitted_init(model)(params_key, jnp.zeros((1, 32, 32, 3)))["params"], "float32")


def scaled(images: np.ndarray, model: str, dtype: str = "float32") -> np.ndarray:
    """Scales uint8 images like the model's original program."""
    statistics = pixel_statistics(get_model(model).INPUT_SCALING, ORIGINAL_DATASET)
    return np.asarray(scale_images(jnp.asarray(images), *statistics), dtype)


@functools.cache
def jitted_apply(model: str, dtype: np.dtype, final_relu: bool) -> Callable[..., Any]:
    network = get_model(model)(dtype=dtype, **({"final_relu": True} if final_relu else {}))
    return jax.jit(lambda params, images: network.apply({"params": params}, images))


def dividing_devices(count: int) -> list[jax.Device]:
    """Returns the largest number of devices that divides `count`."""
    devices = jax.local_devices()
    return devices[: dividing_count(count, len(devices))]


def divided(images: np.ndarray) -> jax.Array:
    """Divides a batch over devices, so that computations on it are divided too."""
    mesh = jax.sharding.Mesh(np.array(dividing_devices(len(images))), ("batch",))
    return jax.device_put(images, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch")))


def jax_logits(model: str, params: Params, images: np.ndarray | jax.Array, final_relu: bool = False) -> jax.Array:
    return jitted_apply(model, images.dtype, final_relu)(params, images)


def jax_loss_and_gradients(model: str, params: Params, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Params]:
    network = get_model(model)(dtype=images.dtype)
    loss = lambda params, images, labels: cross_entropy(network.apply({"params": params}, images), labels).mean()
    return jax.jit(jax.value_and_grad(loss))(params, images, labels)
