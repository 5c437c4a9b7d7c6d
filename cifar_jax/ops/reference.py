"""The operations by `lax`: the form of all platforms except the CPU, and the reference for the CPU's forms.

Convolutions have stride 1. Images are [N, H, W, I], kernels [h, w, I, O], gradients (of outputs) [N, H', W', O], all of
one floating-point type; `pads` are ((top, bottom), (left, right)).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]


def as_pads(images: tuple[int, ...], kernel: tuple[int, ...], padding: Any) -> Pads:
    """Returns 'SAME', 'VALID' or two pairs as pads. Args: images, kernel: their shapes."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images[1:3], kernel[:2], (1, 1), padding)
    rows, columns = padding
    return tuple(rows), tuple(columns)


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Under shard_map, makes each array vary over the mesh axes over which any of them varies."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing)]


def image_shape(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> tuple[int, int, int, int]:
    """Returns the shape [N, H, W, I] of the images whose outputs have the gradient's shape."""
    height, width = (
        outputs + size - 1 - sum(pad) for outputs, size, pad in zip(gradient.shape[1:3], kernel.shape[:2], pads)
    )
    return gradient.shape[0], height, width, kernel.shape[2]


def kernel_shape(images: jax.Array, gradient: jax.Array, pads: Pads) -> tuple[int, int, int, int]:
    """Returns the shape [h, w, I, O] of the kernel whose outputs for these images have the gradient's shape."""
    height, width = (
        size + sum(pad) - outputs + 1 for size, outputs, pad in zip(images.shape[1:3], gradient.shape[1:3], pads)
    )
    return height, width, images.shape[3], gradient.shape[3]


def gradient_pads(kernel: jax.Array, pads: Pads) -> Pads:
    """Returns the pads of the convolution that computes the image gradient from the outputs' gradient."""
    (top, bottom), (left, right) = pads
    height, width = kernel.shape[0] - 1, kernel.shape[1] - 1
    return (height - top, height - bottom), (width - left, width - right)


def lax_convolution(images: jax.Array, kernel: jax.Array, pads: Any) -> jax.Array:
    """Convolves images with a kernel: outputs [N, H', W', O]. `pads` may also be 'SAME' or 'VALID'."""
    return lax.conv_general_dilated(images, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def lax_image_gradient(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Returns the image gradient [N, H, W, I]: a convolution of the outputs' gradient with the rotated kernel."""
    turned, pads = lax.rev(kernel, (0, 1)), gradient_pads(kernel, pads)
    return lax.conv_general_dilated(gradient, turned, (1, 1), pads, dimension_numbers=("NHWC", "HWOI", "NHWC"))


def lax_kernel_gradient(images: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """Returns the kernel gradient [h, w, I, O]: a convolution in which channels and images change places."""
    return lax.conv_general_dilated(images, gradient, (1, 1), pads, dimension_numbers=("CHWN", "IHWO", "HWNC"))


def lax_max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """Max pool without padding: [N, H, W, C] → [N, H', W', C]."""
    return nn.max_pool(images, (window, window), (stride, stride))
