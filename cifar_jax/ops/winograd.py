"""Winograd's form of a convolution along the rows: 0.5 of the products for kernels of width 3, 0.4 for width 5.

y = A·(G·g ∘ B·d). Images d and kernel g are transformed. For each point of a tile, the products are a convolution with
a kernel of one column, or matrix products (the kernel gradient). Their results are transformed back. The columns are
not transformed: transforms in one direction are cheap. The gradients use the transposed transforms.

The float32 error is 2 to 3 times that of the direct form. Where an image is constant, outputs that would be equal
differ by rounding, so a max pool's gradient goes to any of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.ops import direct
from cifar_jax.ops.outline import outlined
from cifar_jax.ops.reference import Pads, image_shape, kernel_shape, vary_alike

TILE = 4  # outputs of a tile: a larger tile saves more products and is less accurate
# A transform uses the first of these points, and infinity. arXiv:1803.10986 found that these sets have small errors.
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0, -0.5, 2.0)
KERNEL_BLOCK = 2**18  # values of the transformed images in a term of a kernel gradient: they stay in a core's cache

Blocks = tuple[jax.Array, jax.Array, jax.Array]  # totals, transformed images, transformed gradient


def pays(kernel: tuple[int, ...], size: int) -> bool:
    """Tells whether this form needs at most three quarters of the products for rows of `size` outputs.

    It is False for few channels, where the transforms are most of the work.
    Args: kernel: the kernel's shape.
    """
    _, width, channels, _ = kernel
    products = (TILE + width - 1) * -(-size // TILE)
    fits = 1 < width <= len(POINTS) + 2 - TILE and products <= 0.75 * width * size
    return fits and channels > 4


def toom_cook(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns matrices A [outputs, n], G [n, taps], B [n, n], float64, for n = outputs + taps - 1 points.

    y = A·(G·g ∘ B·d) is the correlation y_i = Σ_k g_k·d_{i+k} with n products instead of outputs·taps. This is
    Winograd's F(outputs, taps) (arXiv:1509.09308): polynomials are multiplied through their values at n - 1 points and
    infinity, and a correlation is the transpose of such a product.
    """
    points, count = np.array(POINTS[: outputs + taps - 2]), outputs + taps - 1
    a, g, b = np.zeros((outputs, count)), np.zeros((count, taps)), np.zeros((count, count))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        a[:, i] = point ** np.arange(outputs)
        g[i] = point ** np.arange(taps) / np.prod(point - others)
        b[i, :-1] = np.poly(others)[::-1]
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = np.poly(points)[::-1]
    return a, g, b


def convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [h, w, I, O] → [N, H', W', O]."""
    width, size = kernel.shape[1], images.shape[2] + sum(pads[1]) - kernel.shape[1] + 1
    values, kernels = transform_images(images, width, pads), transform_kernel(kernel)
    return transform_products(direct.convolutions(values, kernels, (pads[0], (0, 0))), width, size)


def image_gradient(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """[N, H', W', O], [h, w, I, O] → [N, H, W, I]."""
    width = kernel.shape[1]
    images = _like(gradient, image_shape(gradient, kernel, pads))
    values = direct.image_gradients(transposed_products(gradient, width), transform_kernel(kernel), (pads[0], (0, 0)))
    (result,) = jax.linear_transpose(lambda images: transform_images(images, width, pads), images)(values)
    return result


def kernel_gradient(images: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """[N, H, W, I], [N, H', W', O] → [h, w, I, O]. In bfloat16 only the factors of the products are rounded."""
    shape = kernel_shape(images, gradient, pads)
    height, width, channels, features = shape
    rows, points = gradient.shape[1], TILE + width - 1
    block = block_size(images, width, KERNEL_BLOCK)
    totals = jnp.zeros((height, points, features, channels), np.promote_types(images.dtype, np.float32))
    images, gradient, totals = vary_alike(images, gradient, totals)  # a loop's values keep their type

    def transform(start: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        of_block = lambda x: lax.dynamic_slice_in_dim(x, start, block)
        return stack_images(of_block(images), width, pads), stack_gradient(of_block(gradient), width, (0, 0))

    def add(totals: jax.Array, images: jax.Array, gradient: jax.Array) -> jax.Array:
        # Transposed before it is a matrix, so that XLA makes a copy. It is slow at products with a transposed matrix.
        left = gradient.transpose(0, 4, 1, 2, 3).reshape(points, features, -1)
        products = [jnp.matmul(left, part, preferred_element_type=totals.dtype) for part in row_parts(images, rows)]
        return totals + jnp.stack(products)

    def step(carry: Blocks, start: jax.Array) -> tuple[Blocks, None]:
        return (add(*carry), *transform(start)), None

    carry = (totals, *transform(0))
    if block != images.shape[0]:
        # Each step multiplies what the step before transformed. Otherwise XLA would transform again for each product.
        carry, _ = lax.scan(step, carry, jnp.arange(block, images.shape[0], block))
    return _sum_points(add(*carry), width).transpose(0, 1, 3, 2).astype(images.dtype)


@partial(outlined, static_argnames=("width",))
def _sum_points(products: jax.Array, width: int) -> jax.Array:
    """Returns Gᵀ·products, the kernel gradient: [h, points, O, I] → [h, width, O, I]."""
    height, _, *channels = products.shape
    points = products.transpose(1, 0, 2, 3)[:, :, None]
    (result,) = jax.linear_transpose(transform_kernel, _like(products, (height, width, *channels)))(tuple(points))
    return result


def block_size(images: jax.Array, width: int, limit: int) -> int:
    """Returns the number of images in a block: the largest divisor of theirs with at most `limit` values, or else 1."""
    size, height, columns, channels = images.shape
    if not isinstance(size, int) or size == 0:  # a symbolic size is not divided
        return size
    each = (TILE + width - 1) * height * -(-columns // TILE) * channels
    most = max(limit // each, 1)
    return max(block for block in range(1, size + 1) if size % block == 0 and block <= most)


def stack_images(images: jax.Array, width: int, pads: Pads) -> jax.Array:
    """Returns B·d with padded rows, of the images' type: [points, N, H + pads, tiles, I]."""
    return _stack(lambda images: transform_images(images, width, pads), images, pads[0])


def stack_gradient(gradient: jax.Array, width: int, pads: tuple[int, int]) -> jax.Array:
    """Returns Aᵀ·gradient with padded rows, of the gradient's type: [points, N, H' + pads, tiles, O]."""
    return _stack(lambda gradient: transposed_products(gradient, width), gradient, pads)


def _stack(transform: Callable[[jax.Array], direct.Arrays], array: jax.Array, pads: tuple[int, int]) -> jax.Array:
    """Transforms in float32 or float64, rounds, and pads the rows: jnp.pad refuses negative pads."""
    exact = array.astype(np.promote_types(array.dtype, np.float32))
    values = jnp.stack(transform(exact)).astype(array.dtype)
    return lax.pad(values, jnp.zeros((), values.dtype), [(0, 0, 0), (0, 0, 0), (*pads, 0), (0, 0, 0), (0, 0, 0)])


def row_parts(values: jax.Array, rows: int) -> list[jax.Array]:
    """Returns, for each row of the kernel, the values under it as matrices: [points, N·rows·tiles, I].

    Args: values: from `stack_images` or `stack_gradient`; rows: number of rows of the outputs.
    """
    taps = values.shape[2] - rows + 1
    return [values[:, :, i : i + rows].reshape(len(values), -1, values.shape[-1]) for i in range(taps)]


def _like(array: jax.Array, shape: tuple[int, ...]) -> Any:
    """Returns what tracing needs to know of an array (type, devices), with another shape."""
    return jax.typeof(array).update(shape=shape)


def _combine(weights: np.ndarray, arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns the weighted sum of arrays."""
    terms = [x if w == 1 else x * jnp.asarray(w, x.dtype) for w, x in zip(weights, arrays) if w != 0]
    return functools.reduce(jnp.add, terms)


def transform_images(images: jax.Array, width: int, pads: Pads) -> direct.Arrays:
    """Returns B·d: for each point [N, H, tiles, I]."""
    left, right = pads[1]
    _, _, b = toom_cook(TILE, width)
    count = len(b)
    tiles = -(-(images.shape[2] + left + right - width + 1) // TILE)
    blocks = tiles + -(-count // TILE) - 1  # each of TILE columns: a tile begins with one and extends into the next
    images = jnp.pad(images, ((0, 0), (0, 0), (left, blocks * TILE - left - images.shape[2]), (0, 0)))
    images = images.reshape(*images.shape[:2], blocks, TILE, images.shape[3])
    columns = [images[:, :, i // TILE : i // TILE + tiles, i % TILE] for i in range(count)]  # of all tiles
    return tuple(_combine(weights, columns) for weights in b)


def transform_kernel(kernel: jax.Array) -> direct.Arrays:
    """Returns G·g: for each point [h, 1, I, O]."""
    width = kernel.shape[1]
    _, g, _ = toom_cook(TILE, width)
    columns = [kernel[:, i : i + 1] for i in range(width)]
    return tuple(_combine(weights, columns) for weights in g)


def transform_products(products: direct.Arrays, width: int, size: int) -> jax.Array:
    """Returns A·products, the outputs [N, H', size, O]. Args: products: for each point [N, H', tiles, O]."""
    a, _, _ = toom_cook(TILE, width)
    outputs = jnp.stack([_combine(weights, products) for weights in a], axis=3)
    *leading, tiles, _, features = outputs.shape
    return outputs.reshape(*leading, tiles * TILE, features)[:, :, :size]


def transposed_products(gradient: jax.Array, width: int) -> direct.Arrays:
    """Returns Aᵀ·gradient: for each point [N, H', tiles, O]. Args: gradient: [N, H', W', O]."""
    batch_size, height, size, features = gradient.shape
    shape = (batch_size, height, -(-size // TILE), features)
    products = (_like(gradient, shape),) * (TILE + width - 1)
    (result,) = jax.linear_transpose(lambda products: transform_products(products, width, size), products)(gradient)
    return result
