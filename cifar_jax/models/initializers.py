"""Initializers of kernels and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax.errors import UserError

Initializer = Callable[..., jax.Array]
WHITENING_EPSILON = 5e-4  # limits the gain of the smallest variances, as in airbench


def identity_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Like he_normal, except that the first filters of a convolution [h, w, I, O] copy input channels 0, 1, …"""
    kernel = nn.initializers.he_normal()(key, shape, dtype)
    if len(shape) != 4:
        return kernel
    height, width, inputs, outputs = shape
    count = min(inputs, outputs)
    delta = jnp.zeros((height, width, inputs, count), dtype).at[height // 2, width // 2].set(jnp.eye(inputs, count))
    return kernel.at[..., :count].set(delta)


def whitening_kernel(images: jax.Array, size: int) -> jax.Array:
    """Returns filters that whiten image patches (outputs uncorrelated, of unit variance), and their negatives.

    Args: images: float [N, H, W, C]; size: side of a patch in pixels.
    Returns: float32 [size, size, C, 2·size²·C], sorted by falling variance.
    """
    _, height, width, channels = images.shape
    rows, columns = height - size + 1, width - size + 1
    patches = [images[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)]
    flat = jnp.concatenate(patches, axis=-1).reshape(-1, size * size * channels)
    variances, vectors = jnp.linalg.eigh(flat.T @ flat / flat.shape[0])
    filters = (vectors / jnp.sqrt(variances + WHITENING_EPSILON))[:, ::-1]
    return jnp.concatenate([filters, -filters], axis=-1).reshape(size, size, channels, -1)


KERNELS: dict[str, Initializer] = {
    "he": nn.initializers.he_normal(),
    "lsuv": nn.initializers.orthogonal(),
    "identity": identity_kernel,
}


def choose_kernel(name: str, original: Initializer) -> Initializer:
    """Returns the initializer of KERNELS with this name, or `original`. Raises: UserError for an unknown name."""
    if name != "original" and name not in KERNELS:
        raise UserError(f"unknown initializer {name!r}: choose one of original, {', '.join(KERNELS)}")
    return KERNELS.get(name, original)


def pytorch_bias(fan_in: int) -> Initializer:
    """Returns PyTorch's default bias initializer, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) with the kernel's fan_in."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def unit_variance(model: Any, params: Any, images: jax.Array) -> Any:
    """Scales kernels from the first layer to the last so that each layer's outputs have unit variance.

    This is LSUV (arXiv:1511.06422). The paper repeats each division until the variance is 1. With zero biases one
    division is enough. Args: model: a network; images: scaled, float32 [N, H, W, 3]. Returns: the scaled parameters.
    """

    @jax.jit
    def deviations(params: Any) -> dict[str, jax.Array]:
        _, variables = model.apply({"params": params}, images, capture_intermediates=True)
        return {name: variables["intermediates"][name]["__call__"][0].std() for name in params}

    for name in model.LAYERS:
        scale = 1 / deviations(params)[name]
        params = params | {name: params[name] | {"kernel": params[name]["kernel"] * scale}}
    return params
