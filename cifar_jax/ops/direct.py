"""Direct forms of convolutions of stride 1 and of their two gradients that are fast on XLA:CPU.

XLA is slow on a CPU at kernel gradients, at convolutions without padding and at convolutions of few input channels.
Here these are matrix products, or convolutions of other shapes, which are up to several times as fast.

`convolutions` and `image_gradients` take and return tuples, for several of the same shapes. Images are [N, H, W, I],
kernels [h, w, I, O], gradients of the outputs [N, H', W', O]. `pads` are ((top, bottom), (left, right)). primitives.py
defines the derivatives.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.ops.reference import Pads, gradient_pads, kernel_shape, lax_convolution

BLOCK = 4  # images in each term of a kernel gradient's sum: few enough for the processor's cache
CHANNELS = 4  # XLA:CPU is 4 times slower if the number of channels is not a multiple of this
LARGE_KERNEL = 5  # from this width on, the kernel gradient is faster as a convolution

Arrays = tuple[jax.Array, ...]


def unpadded_convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution without padding. It is computed with a row of padding, and the additional output is dropped.

    XLA:CPU has another algorithm for no padding, which is 4 times slower at some sizes (15×15, 192→192; jaxlib 0.10).
    """
    return lax_convolution(images, kernel, ((0, 1), (0, 0)))[:, :-1]


def convolutions(images: Arrays, kernels: Arrays, pads: Pads) -> Arrays:
    """Convolves each array of images with its kernel."""
    return tuple(_convolution(x, kernel, pads) for x, kernel in zip(images, kernels))


def _convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    fill = (0, -kernel.shape[2] % CHANNELS)
    if fill[1]:
        images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), fill))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), fill, (0, 0)))
    if kernel.shape[:2] != (1, 1) and pads == ((0, 0), (0, 0)):  # 1×1 is never slow
        return unpadded_convolution(images, kernel)
    return lax_convolution(images, kernel, pads)


def image_gradients(gradients: Arrays, kernels: Arrays, pads: Pads) -> Arrays:
    """Convolves the gradients with the rotated kernels.

    `lax_image_gradient` computes the same with other dimension numbers. It was slower in a loop of steps (docs/log.md).
    """
    turned = (kernel[::-1, ::-1].transpose(0, 1, 3, 2) for kernel in kernels)
    pads = gradient_pads(kernels[0], pads)
    return tuple(lax_convolution(gradient, kernel, pads) for gradient, kernel in zip(gradients, turned))


def kernel_gradient(images: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """Sums the kernel gradient over blocks of images.

    A wide kernel's gradient is a convolution of the images with the gradient, where channels and images change places.
    A narrow kernel's gradient is one matrix product for each of its rows: the image columns under the row (im2col) by
    the gradient. The sum is float32, or float64 for arguments of that type.
    """
    height, width, channels, features = kernel_shape(images, gradient, pads)
    images = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    total = jnp.zeros((height, width, channels, features), np.promote_types(images.dtype, np.float32))
    size = images.shape[0]
    block = math.gcd(size, BLOCK) if isinstance(size, int) else size  # a symbolic size is not divided
    form = _as_convolution if width >= LARGE_KERNEL else _as_products

    def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + form(*block, total), None

    if block == size:
        total, _ = add(total, (images, gradient))
    else:
        blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (images, gradient))
        total, _ = lax.scan(add, total, blocks)
    return total.astype(images.dtype)


def _as_convolution(images: jax.Array, gradient: jax.Array, like: jax.Array) -> jax.Array:
    """Returns a block's kernel gradient, of the shape and type of `like`."""
    images, gradient = images.astype(like.dtype), gradient.astype(like.dtype)
    by_channel = unpadded_convolution(images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3))
    return by_channel.transpose(1, 2, 0, 3)


def _as_products(images: jax.Array, gradient: jax.Array, like: jax.Array) -> jax.Array:
    """Returns a block's kernel gradient, of the shape and type of `like`."""
    height, width, _, features = like.shape
    size = gradient.shape[2]
    columns = jnp.concatenate([images[:, :, i : i + size] for i in range(width)], axis=-1)
    right, products = gradient.reshape(-1, features), []
    for i in range(height):
        left = columns[:, i : i + gradient.shape[1]].reshape(-1, columns.shape[-1]).T
        products.append(jnp.matmul(left, right, preferred_element_type=like.dtype))
    return jnp.stack(products).reshape(like.shape)
