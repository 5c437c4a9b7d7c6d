"""Convolution and max pool in the form that is fastest on the platform, chosen when a program is traced; dropout.

On the CPU, most convolutions take Winograd's form, which needs about half of the products. XLA is slow there at the
gradient of a convolution's kernel, at convolutions without padding or of few input channels, and at the gradient of a
max pool: as matrix products, slices and convolutions of other shapes they are up to several times faster
(docs/log.md). Elsewhere these functions are `lax`'s own, which is also their reference in the tests: on a first
reading take them for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
_BLOCK = 4  # images whose products are one summand of a kernel's gradient: small enough for the cache
_CHANNELS = 4  # XLA:CPU is 4 times slower where the number of channels is no multiple
_LARGE_KERNEL = 5  # from this width on, the kernel gradient pays as a convolution
_TILE = 4  # outputs of a Winograd tile: more save more products, and cost accuracy
# A Winograd form takes the first of these and infinity: the sets that arXiv:1803.10986 found to have small errors.
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0, -0.5, 2.0)

Arrays = tuple[jax.Array, ...]
Pads = tuple[tuple[int, int], tuple[int, int]]


def on_cpu() -> bool:
    """Whether programs are traced for the CPU."""
    return jax.default_backend() == "cpu"


def lax_convolution(images: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    """The reference: stride 1. Args: images [N, H, W, I]; kernel [h, w, I, O]; padding 'SAME', 'VALID' or pairs."""
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=DIMENSION_NUMBERS)


def cpu_convolution(images: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    """`lax_convolution` in Winograd's form where that pays, and with faster gradients."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], (1, 1), padding)
    rows, columns = map(tuple, padding)
    if winograd_pays(kernel, images.shape[2] + sum(columns) - kernel.shape[1] + 1):
        return winograd_convolution(images, kernel, (rows, columns))
    return direct_convolutions((images,), (kernel,), (rows, columns))[0]


# --- Winograd's form ---


def winograd_pays(kernel: jax.Array, size: int) -> bool:
    """Whether a convolution with rows of `size` outputs needs at most three quarters of the products in this form.

    Not for few channels: then the transforms are all the work; nor in bfloat16, which has too few digits for it.
    """
    _, width, channels, _ = kernel.shape
    products = (_TILE + width - 1) * -(-size // _TILE)
    fits = 1 < width <= len(_POINTS) + 2 - _TILE and products <= 0.75 * width * size
    return fits and channels > 4 and kernel.dtype in (jnp.float32, jnp.float64)


def toom_cook(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices A [outputs, n], G [n, taps], B [n, n], float64, of n = outputs + taps - 1 points, for which
    y = A·(G·g ∘ B·d) is the correlation y_i = Σ_k g_k·d_{i+k}: n products in place of outputs·taps.

    Winograd's F(outputs, taps) (arXiv:1509.09308): polynomials are multiplied by their values at n - 1 points and
    infinity; the correlation is the transpose of that.
    """
    points, count = np.array(_POINTS[: outputs + taps - 2]), outputs + taps - 1
    a, g, b = np.zeros((outputs, count)), np.zeros((count, taps)), np.zeros((count, count))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        a[:, i] = point ** np.arange(outputs)
        g[i] = point ** np.arange(taps) / np.prod(point - others)
        b[i, :-1] = np.poly(others)[::-1]
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = np.poly(points)[::-1]
    return a, g, b


def _combine(weights: np.ndarray, arrays: Sequence[jax.Array]) -> jax.Array:
    """The weighted sum of arrays."""
    terms = [x if w == 1 else x * jnp.asarray(w, x.dtype) for w, x in zip(weights, arrays) if w != 0]
    return functools.reduce(jnp.add, terms)


def winograd_convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """`lax_convolution` along the rows by Winograd's F(4, width): half of the products for a width of 3, 0.4 for 5.

    Along the columns nothing is saved, so each of its points is a convolution with a kernel of one column: transforms
    in one direction are cheap, and so are theirs in the gradients, which are this form's own. In float32 the error is
    2 to 3 times that of the plain sum; and where an image is flat its outputs are equal but for rounding, so a max
    pool's gradient goes to any of them.
    """
    _, width, channels, features = kernel.shape
    left, right = pads[1]
    size = left + images.shape[2] + right - width + 1
    tiles = -(-size // _TILE)
    a, g, b = toom_cook(_TILE, width)
    count = len(b)
    blocks = tiles + -(-count // _TILE) - 1  # of _TILE columns, which tiles begin with and reach into
    images = jnp.pad(images, ((0, 0), (0, 0), (left, blocks * _TILE - left - images.shape[2]), (0, 0)))
    images = images.reshape(*images.shape[:2], blocks, _TILE, channels)
    columns = [images[:, :, i // _TILE : i // _TILE + tiles, i % _TILE] for i in range(count)]  # of all tiles
    kernel_columns = [kernel[:, i : i + 1] for i in range(width)]
    values = tuple(_combine(weights, columns) for weights in b)
    products = direct_convolutions(values, tuple(_combine(weights, kernel_columns) for weights in g), (pads[0], (0, 0)))
    outputs = jnp.stack([_combine(weights, products) for weights in a], axis=3)
    return outputs.reshape(*outputs.shape[:2], tiles * _TILE, features)[:, :, :size]


# --- the direct form ---


def unpadded_convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`lax_convolution` with 'VALID', as one with a row of padding whose result is dropped.

    Without any padding XLA:CPU takes another way, at some sizes 4 times slower (15×15, 192→192; jaxlib 0.10).
    """
    return lax_convolution(images, kernel, ((0, 1), (0, 0)))[:, :-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def direct_convolutions(images: Arrays, kernels: Arrays, pads: Pads) -> Arrays:
    """`lax_convolution` of each pair, all of the same shapes, with another gradient of the kernels.

    Its products are summed in float32 (in float64 for such arguments) whatever the type of the computation.
    """
    return tuple(_direct_convolution(x, kernel, pads) for x, kernel in zip(images, kernels))


def _direct_convolution(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    fill = (0, -kernel.shape[2] % _CHANNELS)
    if fill[1]:
        images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), fill))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), fill, (0, 0)))
    if kernel.shape[:2] != (1, 1) and pads == ((0, 0), (0, 0)):  # 1×1 has no slow way
        return unpadded_convolution(images, kernel)
    return lax_convolution(images, kernel, pads)


def _forward(images: Arrays, kernels: Arrays, pads: Pads) -> tuple[Arrays, tuple[Arrays, Arrays]]:
    return direct_convolutions(images, kernels, pads), (images, kernels)


def _backward(pads: Pads, saved: tuple[Arrays, Arrays], gradients: Arrays) -> tuple[Arrays, Arrays]:
    images, kernels = saved
    image_gradients = tuple(_image_gradient(kernel, gradient, pads) for kernel, gradient in zip(kernels, gradients))
    padded = tuple(jnp.pad(x, ((0, 0), *pads, (0, 0))) for x in images)
    return image_gradients, _kernel_gradients(padded, gradients, kernels[0])


def _image_gradient(kernel: jax.Array, gradient: jax.Array, pads: Pads) -> jax.Array:
    """A convolution of the gradient by the turned kernel.

    lax's own, the same with other names of the axes, was slower on the CPU in a loop of steps (docs/log.md).
    """
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    (top, bottom), (left, right) = pads
    height, width = kernel.shape[0] - 1, kernel.shape[1] - 1
    return lax_convolution(gradient, turned, ((height - top, height - bottom), (width - left, width - right)))


def _kernel_gradients(padded: Arrays, gradients: Arrays, kernel: jax.Array) -> Arrays:
    """Summed over blocks of images in one loop, in the form that copies least; `kernel` is one of the kernels.

    Of a wide kernel: a convolution of the images by the gradient, with channels in place of images and images in place
    of channels. Else a product for each row of the kernel, of its columns of the images (im2col) and the gradient.
    """
    height, width, _, features = kernel.shape
    block = math.gcd(padded[0].shape[0], _BLOCK)
    total_dtype = np.promote_types(kernel.dtype, np.float32)

    def convolution(images: jax.Array, gradient: jax.Array) -> jax.Array:
        images, gradient = images.astype(total_dtype), gradient.astype(total_dtype)
        by_channel = unpadded_convolution(images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3))
        return by_channel.transpose(1, 2, 0, 3)

    def product_by_row(images: jax.Array, gradient: jax.Array) -> jax.Array:
        size = gradient.shape[2]
        columns = jnp.concatenate([images[:, :, i : i + size] for i in range(width)], axis=-1)
        right, products = gradient.reshape(-1, features), []
        for i in range(height):
            left = columns[:, i : i + gradient.shape[1]].reshape(-1, columns.shape[-1]).T
            products.append(jnp.matmul(left, right, preferred_element_type=total_dtype))
        return jnp.stack(products).reshape(kernel.shape)

    form = convolution if width >= _LARGE_KERNEL else product_by_row

    def add(totals: Arrays, block: tuple[Arrays, Arrays]) -> tuple[Arrays, None]:
        return tuple(total + form(*pair) for total, *pair in zip(totals, *block)), None

    totals = (jnp.zeros(kernel.shape, total_dtype),) * len(padded)
    if block == padded[0].shape[0]:
        totals, _ = add(totals, (padded, gradients))
    else:
        blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (padded, gradients))
        totals, _ = lax.scan(add, totals, blocks)
    return tuple(total.astype(kernel.dtype) for total in totals)


direct_convolutions.defvjp(_forward, _backward)


def lax_max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """The reference: a max pool without padding over [N, H, W, C]."""
    return nn.max_pool(images, (window, window), (stride, stride))


def slices_max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """`lax_max_pool` as the maximum of window² strided slices, for finite values.

    Of equals the first gets the gradient, as there and as in PyTorch; jnp.maximum would split it.
    """
    rows, columns = ((size - window) // stride * stride + 1 for size in images.shape[1:3])
    parts = (images[:, i : i + rows : stride, j : j + columns : stride] for i in range(window) for j in range(window))
    return functools.reduce(lambda maximum, part: jnp.where(maximum >= part, maximum, part), parts)


def max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """Max pool without padding. Args: images [N, H, W, C]. Returns: [N, H', W', C]."""
    return (slices_max_pool if on_cpu() else lax_max_pool)(images, window, stride)


def global_average_pool(images: jax.Array) -> jax.Array:
    """Means over [N, H, W, C], in float32 (float64 for such images): [N, C]."""
    if on_cpu() and images.dtype == jnp.bfloat16:
        # XLA of jaxlib 0.11.2 fuses up to three convolutions with a mean of theirs, and then it can be NaN.
        images = lax.optimization_barrier(images)
    return images.astype(np.promote_types(images.dtype, np.float32)).mean(axis=(1, 2))


class Conv(nn.Module):
    """flax.linen.Conv of stride 1 in the form that is fastest on the platform.

    In bfloat16 its bias's gradient is summed in float32: summed in bfloat16, as Flax does, it is wrong by up to 40 %.
    """

    features: int
    size: int
    padding: str
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[N, H, W, I] → [N, H', W', features] of type `dtype`."""
        shape = (self.size, self.size, images.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        convolution = cpu_convolution if on_cpu() else lax_convolution
        outputs = convolution(images.astype(self.dtype), kernel.astype(self.dtype), self.padding)
        return outputs + jnp.broadcast_to(bias, outputs.shape).astype(self.dtype)  # in this order: see above


def bernoulli_mask(key: jax.Array, probability: float, shape: Sequence[int]) -> jax.Array:
    """True with this probability, to 1/131,072: bool [*shape].

    `jax.random.bernoulli` hashes twice 32 bits for each element; here they make four of 16 bits, on every platform:
    the lower halves of all words, then the upper ones (interleaved, XLA:CPU would compute each element on its own).
    """
    count = math.prod(shape)
    words = threefry_2x32(jax.random.bits(key, (2,), jnp.uint32), lax.iota(jnp.uint32, -(-count // 2)))
    bits = jnp.concatenate([words & 0xFFFF, words >> 16])[:count].reshape(shape)
    return bits < jnp.uint32(round(probability * 2**16))


class Dropout(nn.Module):
    """flax.linen.Dropout with the cheaper `bernoulli_mask`."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Where `train`, each value is 0 with probability `rate`, else divided by 1 - rate; key: rngs 'dropout'."""
        if not train or self.rate == 0.0:
            return x
        mask = bernoulli_mask(self.make_rng("dropout"), 1 - self.rate, x.shape)
        return jnp.where(mask, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))
