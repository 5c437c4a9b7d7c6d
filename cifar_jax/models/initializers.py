"""Initial kernels and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]
KERNELS: dict[str, Initializer] = {"he": nn.initializers.he_normal(), "lsuv": nn.initializers.orthogonal()}


def pytorch_bias(fan_in: int) -> Initializer:
    """PyTorch's default bias: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), with the fan_in of the layer's kernel."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def unit_variance(model: Any, params: Any, images: jax.Array) -> Any:
    """Kernels divided, from the first layer to the last, by the deviation of their outputs: LSUV (arXiv:1511.06422).

    The paper repeats each division until the variance is 1; with zero biases one does it. Args: model: a network;
    images as it takes them. Returns: parameters like `params`, with which each layer's outputs have unit variance.
    """

    @jax.jit
    def deviations(params: Any) -> dict[str, jax.Array]:
        _, variables = model.apply({"params": params}, images, capture_intermediates=True)
        return {name: variables["intermediates"][name]["__call__"][0].std() for name in params}

    for name in model.LAYERS:
        scale = 1 / deviations(params)[name]
        params = params | {name: params[name] | {"kernel": params[name]["kernel"] * scale}}
    return params
