"""Forms for the CPU: convolutions in Winograd's or the direct form, whichever is faster; max pool by slices."""

from __future__ import annotations

import functools
import itertools
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.ops import bfloat16, direct, winograd
from cifar_jax.ops.outline import outlined
from cifar_jax.ops.reference import Pads, kernel_shape


def convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [h, w, I, O] → [N, H', W', O]."""
    size = images.shape[2] + sum(pads[1]) - kernel.shape[1] + 1
    if winograd.pays(kernel.shape, size):
        return _winograd(kernel.dtype).convolution(images, kernel, pads)
    return direct.convolutions((images,), (kernel,), pads)[0]


def image_gradient(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H', W', O], [h, w, I, O] → [N, H, W, I]."""
    if winograd.pays(kernel.shape, gradient.shape[2]):
        return _winograd(kernel.dtype).image_gradient(gradient, kernel, pads)
    return direct.image_gradients((gradient,), (kernel,), pads)[0]


def kernel_gradient(images: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [N, H', W', O] → [h, w, I, O]."""
    if winograd.pays(kernel_shape(images, gradient, pads), gradient.shape[2]):
        return winograd.kernel_gradient(images, gradient, pads)
    return direct.kernel_gradient(images, gradient, pads)


def _winograd(dtype: np.dtype) -> ModuleType:
    """Returns the module of Winograd's convolution and image gradient for this type. Types of 16 bits share one."""
    return bfloat16 if dtype.itemsize == 2 else winograd


@partial(outlined, static_argnames=("window", "stride"))
def max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """`lax_max_pool` for finite values, as the maximum of window² strided slices, whose gradient is fast.

    If several values are the maximum, the first gets the gradient, as in `lax_max_pool` and PyTorch. jnp.maximum would
    divide it among them. Gradients of bfloat16 are summed in float32, which is five times as fast.
    """

    @partial(jax.checkpoint, prevent_cse=False)  # else it would store the result of each comparison
    def pool(images: jax.Array) -> jax.Array:
        exact = images.astype(np.promote_types(images.dtype, np.float32))
        rows, columns = ((size - window) // stride * stride + 1 for size in images.shape[1:3])
        places = itertools.product(range(window), repeat=2)
        parts = (exact[:, i : i + rows : stride, j : j + columns : stride] for i, j in places)
        maximum = functools.reduce(lambda maximum, part: jnp.where(maximum >= part, maximum, part), parts)
        return maximum.astype(images.dtype)

    return pool(images)
