"""`lax`'s forms of the operations: what they are on every platform but the CPU, and what its forms must equal.

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
    """The pads of 'SAME', 'VALID' or pairs. Args: images, kernel: their shapes."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images[1:3], kernel[:2], (1, 1), padding)
    rows, columns = padding
    return tuple(rows), tuple(columns)


def image_shape(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> tuple[int, int, int, int]:
    """[N, H, W, I] of the images from which this kernel makes outputs of the gradient's shape."""
    height, width = (
        outputs + size - 1 - sum(pad) for outputs, size, pad in zip(gradient.shape[1:3], kernel.shape[:2], pads)
    )
    return gradient.shape[0], height, width, kernel.shape[2]


def kernel_shape(images: jax.Array, gradient: jax.Array, pads: Pads) -> tuple[int, int, int, int]:
    """[h, w, I, O] of the kernel that makes outputs of the gradient's shape from these images."""
    height, width = (
        size + sum(pad) - outputs + 1 for size, outputs, pad in zip(images.shape[1:3], gradient.shape[1:3], pads)
    )
    return height, width, images.shape[3], gradient.shape[3]


def gradient_pads(kernel: jax.Array, pads: Pads) -> Pads:
    """Those of the convolution of an output's gradient that gives the images'."""
    (top, bottom), (left, right) = pads
    height, width = kernel.shape[0] - 1, kernel.shape[1] - 1
    return (height - top, height - bottom), (width - left, width - right)


def lax_convolution(images: jax.Array, kernel: jax.Array, pads: Any) -> jax.Array:
    """Images and a kernel → outputs [N, H', W', O]; `pads` may be 'SAME' or 'VALID' as well."""
    return lax.conv_general_dilated(images, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def lax_image_gradient(gradient: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """A gradient and a kernel → the images' gradient [N, H, W, I]: a convolution by the turned kernel."""
    turned, pads = lax.rev(kernel, (0, 1)), gradient_pads(kernel, pads)
    return lax.conv_general_dilated(gradient, turned, (1, 1), pads, dimension_numbers=("NHWC", "HWOI", "NHWC"))


def lax_kernel_gradient(images: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """Images and a gradient → the kernel's gradient [h, w, I, O]: channels stand for images, images for channels."""
    return lax.conv_general_dilated(images, gradient, (1, 1), pads, dimension_numbers=("CHWN", "IHWO", "HWNC"))


def lax_max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """A max pool without padding: [N, H, W, C] → [N, H', W', C]."""
    return nn.max_pool(images, (window, window), (stride, stride))
