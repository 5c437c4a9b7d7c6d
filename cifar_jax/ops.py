"""Convolution and max pool in the form that is fastest on the platform, chosen when a program is traced; dropout.

On the CPU, XLA is slow at the gradient of a convolution's kernel, the gradient of the images of one without padding,
convolutions of few input channels, and the gradient of a max pool; as matrix products, slices and convolutions of other
shapes they are up to several times faster (benchmarks/NOTES.md). Elsewhere these functions are `lax`'s own, which is
also their reference in the tests.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry_2x32

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
_BLOCK = 4  # images of one im2col matrix: small enough for the cache
_CHANNELS = 4  # XLA:CPU is 4 times slower where the number of channels is no multiple
_FEW_CHANNELS = 4  # up to here, the kernel gradient does not pay as one product of rows and columns
_LARGE_KERNEL = 5  # from here on, the kernel gradient pays as a convolution
_WIDE = 1.2  # up to this padded width by width, the kernel gradient pays as one product of rows and columns


def on_cpu() -> bool:
    """Whether programs are traced for the CPU."""
    return jax.default_backend() == "cpu"


def lax_convolution(images: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    """The reference: stride 1. Args: images [N, H, W, I]; kernel [h, w, I, O]; padding 'SAME', 'VALID' or pairs."""
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=DIMENSION_NUMBERS)


def unpadded_convolution(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """`lax_convolution` with 'VALID', as one with a row of padding whose result is dropped.

    Without any padding XLA:CPU takes another way, at some sizes 4 times slower (15×15, 192→192; jaxlib 0.10).
    """
    return lax_convolution(images, kernel, ((0, 1), (0, 0)))[:, :-1]


def _patches(images: jax.Array, height: int, width: int) -> jax.Array:
    """im2col: [N, H, W, I], already padded → [N, H', W', height·width·I], in the order of an HWIO kernel."""
    rows, columns = images.shape[1] - height + 1, images.shape[2] - width + 1
    slices = [images[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    return jnp.concatenate(slices, axis=-1)


def _pads(images: jax.Array, kernel: jax.Array, padding: Any) -> Any:
    """The padding as pairs: of rows and of columns, before and after."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], (1, 1), padding)
    return tuple(map(tuple, padding))


def _is_unpadded(images: jax.Array, kernel: jax.Array, padding: Any) -> bool:
    """Whether a kernel larger than 1×1 is applied without padding (1×1 never has any, nor a slow way)."""
    return kernel.shape[:2] != (1, 1) and _pads(images, kernel, padding) == ((0, 0), (0, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cpu_convolution(images: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    """`lax_convolution` in other forms, for its gradients above all.

    The products of the kernel's gradient are summed in float32 (in float64 for such arguments) whatever the type of the
    computation.
    """
    fill = (0, -kernel.shape[2] % _CHANNELS)
    if fill[1]:
        images = jnp.pad(images, ((0, 0), (0, 0), (0, 0), fill))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), fill, (0, 0)))
    if _is_unpadded(images, kernel, padding):
        return unpadded_convolution(images, kernel)
    return lax_convolution(images, kernel, padding)


def _forward(images: jax.Array, kernel: jax.Array, padding: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return cpu_convolution(images, kernel, padding), (images, kernel)


def _backward(padding: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, kernel = saved
    padded = jnp.pad(images, ((0, 0), *_pads(images, kernel, padding), (0, 0)))
    if _is_unpadded(images, kernel, padding):
        image_gradient = _image_gradient(kernel, gradient)
    else:
        _, image_vjp = jax.vjp(lambda images: lax_convolution(images, kernel, padding), images)
        (image_gradient,) = image_vjp(gradient)
    return image_gradient, _kernel_gradient(padded, gradient, kernel)


def _image_gradient(kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    """Of a convolution without padding: by one along the rows, for all rows of the kernel, whose results are added up.

    lax makes this a convolution of the gradient padded all around: for 5×5 on 14×14 2 times the products, not 1.4.
    """
    height, width, channels, features = kernel.shape
    by_row = kernel[:, ::-1].transpose(1, 3, 0, 2).reshape(1, width, features, height * channels)
    rows = lax_convolution(gradient, by_row, ((0, 0), (width - 1, width - 1)))
    rows = rows.reshape(*rows.shape[:3], height, channels)
    total = jnp.pad(rows[..., 0, :], ((0, 0), (0, height - 1), (0, 0), (0, 0)))
    for i in range(1, height):  # in place: as a sum of padded rows, XLA would keep each of them
        part = total[:, i : i + gradient.shape[1]] + rows[..., i, :]
        total = lax.dynamic_update_slice_in_dim(total, part, i, axis=1)
    return total


def _kernel_gradient(padded: jax.Array, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """Summed over blocks of images, in the form that copies least for the kernel's size and the images'.

    Of a large kernel: a convolution of the images by the gradient, with channels in place of images and images in place
    of channels. Of a small one, where the image is wide: one product of the kernel's rows of the images, side by side,
    with its columns of the gradient. Else a product for each row of the kernel, of its columns of the images (im2col).
    """
    height, width, channels, features = kernel.shape
    block = math.gcd(padded.shape[0], _BLOCK)
    blocks = lambda x: x.reshape(-1, block, *x.shape[1:])
    total_dtype = jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32

    def convolution(images: jax.Array, gradient: jax.Array) -> jax.Array:
        images, gradient = images.astype(total_dtype), gradient.astype(total_dtype)
        return unpadded_convolution(images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3))

    def product_of_rows_and_columns(images: jax.Array, gradient: jax.Array) -> jax.Array:
        rows = _patches(images, height, 1).reshape(-1, height * channels)
        shifts = [jnp.pad(gradient, ((0, 0), (0, 0), (j, width - 1 - j), (0, 0))) for j in range(width)]
        columns = jnp.concatenate(shifts, axis=-1).reshape(-1, width * features)
        return jnp.matmul(rows.T, columns, preferred_element_type=total_dtype)

    def product_by_row(images: jax.Array, gradient: jax.Array) -> jax.Array:
        columns, right = _patches(images, 1, width), gradient.reshape(-1, features)
        products = []
        for i in range(height):
            left = columns[:, i : i + gradient.shape[1]].reshape(-1, columns.shape[-1]).T
            products.append(jnp.matmul(left, right, preferred_element_type=total_dtype))
        return jnp.concatenate(products)

    # The form, the shape of its result, and where in it the kernel's axes are.
    form: Callable[[jax.Array, jax.Array], jax.Array]
    shape: tuple[int, ...]
    if height >= _LARGE_KERNEL:
        form, shape, order = convolution, (channels, height, width, features), (1, 2, 0, 3)
    elif height > 1 and channels > _FEW_CHANNELS and padded.shape[2] <= _WIDE * gradient.shape[2]:
        form, shape, order = product_of_rows_and_columns, (height, channels, width, features), (0, 2, 1, 3)
    else:
        form, shape, order = product_by_row, kernel.shape, (0, 1, 2, 3)
    if block == padded.shape[0]:
        total = form(padded, gradient)
    else:
        result = jax.eval_shape(form, padded, gradient)
        add = lambda total, pair: (total + form(*pair), None)
        total, _ = lax.scan(add, jnp.zeros(result.shape, total_dtype), (blocks(padded), blocks(gradient)))
    return total.reshape(shape).transpose(order).astype(kernel.dtype)


cpu_convolution.defvjp(_forward, _backward)


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
    return (cpu_convolution if on_cpu() else lax_convolution)(images, kernel, padding)


def bernoulli_mask(key: jax.Array, probability: float, shape: Sequence[int]) -> jax.Array:
    """True with this probability, to 1/131,072: bool [*shape].

    `jax.random.bernoulli` hashes twice 32 bits for each element; here they make four of 16 bits, on every platform:
    the lower halves of all words, then the upper ones (in turn, XLA:CPU would compute each element on its own).
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
