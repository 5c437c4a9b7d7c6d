"""The CPU's forms: a convolution in Winograd's form where that pays, else the direct one; a max pool by slices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from cifar_jax.ops import direct, winograd
from cifar_jax.ops.reference import Pads, kernel_shape


def convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [h, w, I, O] → [N, H', W', O]."""
    size = images.shape[2] + sum(pads[1]) - kernel.shape[1] + 1
    if winograd.pays(kernel.shape, size, kernel.dtype):
        return winograd.convolution(images, kernel, pads)
    return direct.convolutions((images,), (kernel,), pads)[0]


def image_gradient(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H', W', O], [h, w, I, O] → [N, H, W, I]."""
    if winograd.pays(kernel.shape, gradient.shape[2], kernel.dtype):
        return winograd.image_gradient(gradient, kernel, pads)
    return direct.image_gradients((gradient,), (kernel,), pads)[0]


def kernel_gradient(images: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [N, H', W', O] → [h, w, I, O]."""
    if winograd.pays(kernel_shape(images, gradient, pads), gradient.shape[2], images.dtype):
        return winograd.kernel_gradient(images, gradient, pads)
    return direct.kernel_gradients((images,), (gradient,), pads)[0]


def max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """`lax_max_pool` as the maximum of window² strided slices, for finite values: its gradient is many times as fast.

    Of equals the first gets the gradient, as there and as in PyTorch; jnp.maximum would split it.
    """
    rows, columns = ((size - window) // stride * stride + 1 for size in images.shape[1:3])
    parts = (images[:, i : i + rows : stride, j : j + columns : stride] for i in range(window) for j in range(window))
    return functools.reduce(lambda maximum, part: jnp.where(maximum >= part, maximum, part), parts)
