"""Winograd's form of a convolution in bfloat16, accurate because only the factors of its products are rounded.

Transforms and sums are float32. Processors with AVX512-BF16 multiply bfloat16 twice as fast as float32. XLA:CPU does so
in matrix products, but not in convolutions, and not if the left matrix is transposed. The transforms work on blocks of
a few images, which stay in the processor's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from cifar_jax.ops import winograd
from cifar_jax.ops.reference import Pads, gradient_pads, image_shape

BLOCK = 2**19  # values of a block's transformed images: they and the products stay in a core's cache


def convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [h, w, I, O] → [N, H', W', O]."""
    width, size = kernel.shape[1], images.shape[2] + sum(pads[1]) - kernel.shape[1] + 1
    kernels = _transform_kernel(kernel)

    def convolve(images: jax.Array) -> jax.Array:
        products = _products(winograd.stack_images(images, width, pads), kernels)
        return winograd.transform_products(tuple(products), width, size)

    return _map_blocks(convolve, images, width).astype(kernel.dtype)


def image_gradient(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H', W', O], [h, w, I, O] → [N, H, W, I]."""
    width = kernel.shape[1]
    kernels = _transform_kernel(kernel)[:, ::-1].transpose(0, 1, 3, 2)
    rows, _ = gradient_pads(kernel, pads)

    def convolve(gradient: jax.Array) -> jax.Array:
        products = _products(winograd.stack_gradient(gradient, width, rows), kernels)
        images = jax.typeof(products).update(shape=image_shape(gradient, kernel, pads))
        transposed = jax.linear_transpose(lambda images: winograd.transform_images(images, width, pads), images)
        return transposed(tuple(products))[0]

    return _map_blocks(convolve, gradient, width).astype(kernel.dtype)


def _map_blocks(convolve: Callable[[jax.Array], jax.Array], images: jax.Array, width: int) -> jax.Array:
    """Returns convolve(images), block by block: float32, because XLA is slow at writing blocks of bfloat16."""
    block = winograd.block_size(images, width, BLOCK)
    if block == images.shape[0]:
        return convolve(images)
    results = lax.map(convolve, images.reshape(-1, block, *images.shape[1:]))
    return results.reshape(-1, *results.shape[2:])


def _transform_kernel(kernel: jax.Array) -> jax.Array:
    """Returns G·g, of the kernel's type: [points, h, I, O]."""
    return jnp.stack(winograd.transform_kernel(kernel.astype(jnp.float32)))[:, :, 0].astype(kernel.dtype)


def _products(values: jax.Array, kernels: jax.Array) -> jax.Array:
    """Convolves the rows: [points, N, H, tiles, I], [points, h, I, O] → float32 [points, N, H', tiles, O]."""
    points, size, height, tiles, _ = values.shape
    rows = height - kernels.shape[1] + 1
    parts = enumerate(winograd.row_parts(values, rows))
    products = (jnp.matmul(part, kernels[:, i], preferred_element_type=jnp.float32) for i, part in parts)
    return functools.reduce(jnp.add, products).reshape(points, size, rows, tiles, kernels.shape[-1])
