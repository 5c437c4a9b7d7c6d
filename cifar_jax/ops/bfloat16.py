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
from cifar_jax.ops.reference import Pads, gradient_pads, image_shape, kernel_shape

BLOCK_BYTES = 2**20  # of a block's transformed images: they and the products fit in a core's level 2 cache

Carry = tuple[jax.Array, jax.Array, jax.Array]  # totals, transformed images, transformed gradient


def convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [h, w, I, O] → [N, H', W', O]."""
    width, size = kernel.shape[1], images.shape[2] + sum(pads[1]) - kernel.shape[1] + 1
    kernels = _transform_kernel(kernel)

    def convolve(images: jax.Array) -> jax.Array:
        products = _products(_transform_images(images, width, pads), kernels)
        return winograd.transform_products(tuple(products), width, size)

    return _map_blocks(convolve, images, _points(width)).astype(kernel.dtype)


def image_gradient(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H', W', O], [h, w, I, O] → [N, H, W, I]."""
    width = kernel.shape[1]
    kernels = _transform_kernel(kernel)[:, ::-1].transpose(0, 1, 3, 2)
    rows, _ = gradient_pads(kernel, pads)

    def convolve(gradient: jax.Array) -> jax.Array:
        products = _products(_transform_gradient(gradient, width, rows), kernels)
        images = jax.ShapeDtypeStruct(image_shape(gradient, kernel, pads), jnp.float32)
        transposed = jax.linear_transpose(lambda images: winograd.transform_images(images, width, pads), images)
        return transposed(tuple(products))[0]

    return _map_blocks(convolve, gradient, _points(width)).astype(kernel.dtype)


def kernel_gradient(images: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [N, H', W', O] → [h, w, I, O]."""
    shape = kernel_shape(images, gradient, pads)
    height, width, channels, features = shape
    count, rows = _points(width), gradient.shape[1]
    block = _block(images, count)

    def transform(start: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        of_block = lambda x: lax.dynamic_slice_in_dim(x, start, block)
        return _transform_images(of_block(images), width, pads), _transform_gradient(of_block(gradient), width)

    def add(totals: jax.Array, images: jax.Array, gradient: jax.Array) -> jax.Array:
        # Transposed before it is a matrix, so that XLA makes a copy: it would multiply by a transposed matrix slowly.
        left = gradient.transpose(0, 4, 1, 2, 3).reshape(count, features, -1)
        parts = [images[:, :, i : i + rows].reshape(count, -1, channels) for i in range(height)]
        return totals + jnp.stack([_product(left, part) for part in parts])

    def step(carry: Carry, start: jax.Array) -> tuple[Carry, None]:
        return (add(*carry), *transform(start)), None

    # Each step multiplies what the step before transformed. Otherwise XLA would transform again for each product.
    totals = jnp.zeros((height, count, features, channels), jnp.float32)
    carry, _ = lax.scan(step, (totals, *transform(0)), jnp.arange(block, images.shape[0], block))
    kernels = add(*carry).transpose(1, 0, 3, 2)[:, :, None]
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.linear_transpose(winograd.transform_kernel, like)(tuple(kernels))[0].astype(images.dtype)


def _points(width: int) -> int:
    return winograd.TILE + width - 1


def _block(images: jax.Array, count: int) -> int:
    """Returns the number of images in a block, a divisor of the batch size."""
    size, height, width, channels = images.shape
    each = count * height * -(-width // winograd.TILE) * channels * 2
    block = 1
    while size % (2 * block) == 0 and 2 * block * each <= BLOCK_BYTES:
        block *= 2
    return block


def _map_blocks(convolve: Callable[[jax.Array], jax.Array], images: jax.Array, count: int) -> jax.Array:
    """Returns convolve(images), block by block: float32, because XLA is slow at writing blocks of bfloat16."""
    if not isinstance(images.shape[0], int):  # a symbolic size is not divided
        return convolve(images)
    block = _block(images, count)
    results = lax.map(convolve, images.reshape(-1, block, *images.shape[1:]))
    return results.reshape(-1, *results.shape[2:])


def _transform_images(images: jax.Array, width: int, pads: Pads) -> jax.Array:
    """Returns B·d, with padded rows: bfloat16 [points, N, H + pads, tiles, I]."""
    return _pad_rows(jnp.stack(winograd.transform_images(images.astype(jnp.float32), width, pads)), pads[0])


def _transform_gradient(gradient: jax.Array, width: int, rows: tuple[int, int] = (0, 0)) -> jax.Array:
    """Returns Aᵀ·gradient, with padded rows: bfloat16 [points, N, H' + pads, tiles, O]."""
    return _pad_rows(jnp.stack(winograd.transposed_products(gradient.astype(jnp.float32), width)), rows)


def _pad_rows(values: jax.Array, rows: tuple[int, int]) -> jax.Array:
    return jnp.pad(values.astype(jnp.bfloat16), ((0, 0), (0, 0), rows, (0, 0), (0, 0)))


def _transform_kernel(kernel: jax.Array) -> jax.Array:
    """Returns G·g: bfloat16 [points, h, I, O]."""
    return jnp.stack(winograd.transform_kernel(kernel.astype(jnp.float32)))[:, :, 0].astype(jnp.bfloat16)


def _products(values: jax.Array, kernels: jax.Array) -> jax.Array:
    """Convolves the rows: [points, N, H, tiles, I], [points, h, I, O] → float32 [points, N, H', tiles, O]."""
    count, size, height, tiles, channels = values.shape
    taps, features = kernels.shape[1], kernels.shape[3]
    rows = height - taps + 1
    parts = [values[:, :, i : i + rows].reshape(count, -1, channels) for i in range(taps)]
    total = functools.reduce(jnp.add, (_product(part, kernels[:, i]) for i, part in enumerate(parts)))
    return total.reshape(count, size, rows, tiles, features)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)
