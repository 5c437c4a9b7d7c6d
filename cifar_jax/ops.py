"""Convolution and max pool in the form that is fastest on the platform, chosen when a program is traced.

On the CPU, XLA computes the gradient of a convolution's kernel, convolutions of few input channels, and the gradient
of a max pool slowly; written with matrix products and slices they are several times faster (figures: DESIGN, and
benchmarks/NOTES.md). Elsewhere these functions are `lax`'s own, which is also their reference in the tests.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
_BLOCK = 4  # images of one im2col matrix: small enough for the cache
_FEW_CHANNELS = 4  # up to here the forward pass is faster as im2col, too


def on_cpu() -> bool:
    """Whether programs are traced for the CPU."""
    return jax.default_backend() == "cpu"


def lax_convolution(images: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    """The reference: stride 1. Args: images [N, H, W, I]; kernel [h, w, I, O]; padding 'SAME', 'VALID' or pairs."""
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=DIMENSION_NUMBERS)


def _patches(images: jax.Array, height: int, width: int) -> jax.Array:
    """im2col: [N, H, W, I], already padded → [N, H', W', height·width·I], in the order of an HWIO kernel."""
    rows, columns = images.shape[1] - height + 1, images.shape[2] - width + 1
    slices = [images[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    return jnp.concatenate(slices, axis=-1)


def _pad(images: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], (1, 1), padding)
    return jnp.pad(images, ((0, 0), *map(tuple, padding), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_convolution(images: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    """`lax_convolution` with the kernel's gradient as blocked im2col products; for few channels forward, too.

    The products are summed in float32 (in float64 for such arguments) whatever the type of the computation.
    """
    height, width, channels, features = kernel.shape
    if channels > _FEW_CHANNELS:
        return lax_convolution(images, kernel, padding)
    patches = _patches(_pad(images, kernel, padding), height, width)
    return patches @ kernel.reshape(-1, features)


def _forward(images: jax.Array, kernel: jax.Array, padding: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul_convolution(images, kernel, padding), (images, kernel)


def _backward(padding: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, kernel = saved
    _, image_vjp = jax.vjp(lambda images: lax_convolution(images, kernel, padding), images)
    height, width, _, features = kernel.shape
    block = math.gcd(images.shape[0], _BLOCK)
    blocks = lambda x: x.reshape(-1, block, *x.shape[1:])
    total_dtype = jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32

    def product(images: jax.Array, gradient: jax.Array) -> jax.Array:
        patches = _patches(images, height, width)
        left, right = patches.reshape(-1, patches.shape[-1]).T, gradient.reshape(-1, features)
        return jnp.matmul(left, right, preferred_element_type=total_dtype)

    padded = _pad(images, kernel, padding)
    if block == images.shape[0]:
        kernel_gradient = product(padded, gradient)
    else:
        add = lambda total, pair: (total + product(*pair), None)
        zero = jnp.zeros((kernel.size // features, features), total_dtype)
        kernel_gradient, _ = lax.scan(add, zero, (blocks(padded), blocks(gradient)))
    return *image_vjp(gradient), kernel_gradient.reshape(kernel.shape).astype(kernel.dtype)


matmul_convolution.defvjp(_forward, _backward)


def lax_max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """The reference: a max pool without padding over [N, H, W, C]."""
    return nn.max_pool(images, (window, window), (stride, stride))


def slices_max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """`lax_max_pool` as the maximum of window² strided slices, for finite values.

    Of equals the first gets the gradient, as there and as in PyTorch; jnp.maximum would split it.
    """
    rows, columns = ((size - window) // stride * stride + 1 for size in images.shape[1:3])
    maximum: jax.Array | None = None
    for i in range(window):
        for j in range(window):
            part = images[:, i : i + rows : stride, j : j + columns : stride]
            maximum = part if maximum is None else jnp.where(maximum >= part, maximum, part)
    assert maximum is not None
    return maximum


def max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """Max pool without padding. Args: images [N, H, W, C]. Returns: [N, H', W', C]."""
    return (slices_max_pool if on_cpu() else lax_max_pool)(images, window, stride)


def conv_general_dilated(
    images: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Any, **kwargs: Any
) -> jax.Array:
    """For flax.linen.Conv(conv_general_dilated=…): stride 1, NHWC and HWIO, without dilation and groups."""
    padding = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    return (matmul_convolution if on_cpu() else lax_convolution)(images, kernel, padding)
