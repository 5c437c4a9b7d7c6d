"""Forms for the CPU: convolutions in Winograd's or the direct form, whichever is faster; max pool by slices."""

from __future__ import annotations

import functools
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.ops import bfloat16, direct, winograd
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
    """Returns the module of Winograd's convolution and image gradient for this type."""
    return bfloat16 if dtype == jnp.bfloat16 else winograd


def max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """`lax_max_pool` for finite values, as the maximum of window² slices, whose gradient is fast.

    If several values are the maximum, the first gets the gradient, as in `lax_max_pool` and PyTorch. Gradients of
    bfloat16 are summed in float32, which is also faster.
    """
    exact = images.astype(np.promote_types(images.dtype, np.float32))
    return _max_pool(exact, window, stride).astype(images.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    return functools.reduce(jnp.maximum, _window_parts(images, window, stride))


@_max_pool.defjvp
def _max_pool_jvp(window: int, stride: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Selects the tangent by the number of the largest part: XLA would find it again for each term of the gradient."""
    maximum, *others = _window_parts(primals[0], window, stride)
    largest = jnp.zeros(maximum.shape, jnp.int32)
    for number, part in enumerate(others, start=1):
        largest = jnp.where(part > maximum, number, largest)
        maximum = jnp.maximum(maximum, part)
    parts = enumerate(_window_parts(tangents[0], window, stride))
    return maximum, functools.reduce(jnp.add, (jnp.where(largest == number, part, 0) for number, part in parts))


def _window_parts(images: jax.Array, window: int, stride: int) -> list[jax.Array]:
    """Returns [N, H', W', C] for each place in a window, row by row.

    The images are cut into cells of stride×stride pixels, so that each part is a slice without a stride. XLA would pad
    the gradient of a slice with a stride to the size of the images.
    """
    counts = [(size - window) // stride + 1 for size in images.shape[1:3]]
    fill = [(0, -size % stride) for size in images.shape[1:3]]
    images = jnp.pad(images, ((0, 0), *fill, (0, 0)))
    height, width = (size // stride for size in images.shape[1:3])
    images = images.reshape(images.shape[0], height, stride, *images.shape[2:])  # for sharded images one axis at a time
    images = images.reshape(*images.shape[:3], width, stride, images.shape[4])
    places = [(i, slice(i // stride, i // stride + counts[0])) for i in range(window)]
    columns = [(j, slice(j // stride, j // stride + counts[1])) for j in range(window)]
    return [images[:, rows, i % stride, across, j % stride] for i, rows in places for j, across in columns]
