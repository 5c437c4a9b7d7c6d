"""Convolutions of stride 1 as XLA:CPU computes them fastest without Winograd's form, and their two gradients.

XLA is slow on the CPU at the gradient of a convolution's kernel, and at convolutions without padding or of few input
channels. As matrix products and convolutions of other shapes they are up to several times faster.

Each function takes and returns tuples, for several convolutions of the same shapes: images [N, H, W, I], kernels
[h, w, I, O], gradients (of the outputs) [N, H', W', O]; `pads` are ((top, bottom), (left, right)). They have JAX's own
derivatives, but none needs them: see primitives.py.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.ops.reference import Pads, gradient_pads, lax_convolution

BLOCK = 4  # images whose products are one summand of a kernel's gradient: small enough for the cache
CHANNELS = 4  # XLA:CPU is 4 times slower where the number of channels is no multiple
LARGE_KERNEL = 5  # from this width on, the kernel gradient pays as a convolution

Arrays = tuple[jax.Array, ...]


def unpadded_convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution without padding, as one with a row of padding whose result is dropped.

    Without any padding XLA:CPU takes another way, at some sizes 4 times slower (15×15, 192→192; jaxlib 0.10).
    """
    return lax_convolution(images, kernel, ((0, 1), (0, 0)))[:, :-1]


def convolutions(images: Arrays, kernels: Arrays, pads: Pads) -> Arrays:
    """The convolution of each pair."""
    return tuple(_convolution(x, kernel, pads) for x, kernel in zip(images, kernels))


def _convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    fill = (0, -kernel.shape[2] % CHANNELS)
    if fill[1]:
        images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), fill))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), fill, (0, 0)))
    if kernel.shape[:2] != (1, 1) and pads == ((0, 0), (0, 0)):  # 1×1 has no slow way
        return unpadded_convolution(images, kernel)
    return lax_convolution(images, kernel, pads)


def image_gradients(gradients: Arrays, kernels: Arrays, pads: Pads) -> Arrays:
    """Convolutions of the gradients by the turned kernels.

    lax's own, the same with other names of the axes, was slower on the CPU in a loop of steps (docs/log.md).
    """
    turned = (kernel[::-1, ::-1].transpose(0, 1, 3, 2) for kernel in kernels)
    pads = gradient_pads(kernels[0], pads)
    return tuple(lax_convolution(gradient, kernel, pads) for gradient, kernel in zip(gradients, turned))


def kernel_gradients(images: Arrays, gradients: Arrays, pads: Pads) -> Arrays:
    """Summed over blocks of images in one loop, in the form that copies least.

    Of a wide kernel: a convolution of the images by the gradient, with channels in place of images and images in place
    of channels. Else a product for each row of the kernel, of its columns of the images (im2col) and the gradient.
    Sums are in float32 (in float64 for such arguments) whatever the type of the computation.
    """
    padded = tuple(jnp.pad(x, ((0, 0), *pads, (0, 0))) for x in images)
    batch_size, *sizes, channels = padded[0].shape
    height, width = (size - outputs + 1 for size, outputs in zip(sizes, gradients[0].shape[1:3]))
    shape = (height, width, channels, gradients[0].shape[3])
    dtype = images[0].dtype
    total_dtype = np.promote_types(dtype, np.float32)
    block = math.gcd(batch_size, BLOCK) if isinstance(batch_size, int) else batch_size  # not of a symbolic one
    form = _as_convolution if width >= LARGE_KERNEL else _as_products

    def add(totals: Arrays, block: tuple[Arrays, Arrays]) -> tuple[Arrays, None]:
        return tuple(total + form(x, gradient, total) for total, x, gradient in zip(totals, *block)), None

    totals = (jnp.zeros(shape, total_dtype),) * len(padded)
    if block == batch_size:
        totals, _ = add(totals, (padded, gradients))
    else:
        blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (padded, gradients))
        totals, _ = lax.scan(add, totals, blocks)
    return tuple(total.astype(dtype) for total in totals)


def _as_convolution(images: jax.Array, gradient: jax.Array, like: jax.Array) -> jax.Array:
    """A block's kernel gradient, of the shape and type of `like`."""
    images, gradient = images.astype(like.dtype), gradient.astype(like.dtype)
    by_channel = unpadded_convolution(images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3))
    return by_channel.transpose(1, 2, 0, 3)


def _as_products(images: jax.Array, gradient: jax.Array, like: jax.Array) -> jax.Array:
    """A block's kernel gradient, of the shape and type of `like`."""
    height, width, _, features = like.shape
    size = gradient.shape[2]
    columns = jnp.concatenate([images[:, :, i : i + size] for i in range(width)], axis=-1)
    right, products = gradient.reshape(-1, features), []
    for i in range(height):
        left = columns[:, i : i + gradient.shape[1]].reshape(-1, columns.shape[-1]).T
        products.append(jnp.matmul(left, right, preferred_element_type=like.dtype))
    return jnp.stack(products).reshape(like.shape)
