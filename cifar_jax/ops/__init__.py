"""Convolution and max pool, in the fastest form for the platform of a lowered program, dense layers and dropout.

reference.py   the operations by lax: the form of all platforms except the CPU
primitives.py  the convolution, its derivatives, and the choice of its form
cpu.py         the CPU's forms: winograd.py needs about half of the products, bfloat16.py is for that type,
               direct.py computes the other convolutions
blocks.py      few images at a time on a CPU
outline.py     parts of a program that XLA compiles by themselves
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.ops import cpu
from cifar_jax.ops.primitives import convolution
from cifar_jax.ops.reference import lax_max_pool, vary_alike


def max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """Max pool without padding. Args: images [N, H, W, C], finite. Returns: [N, H', W', C]."""
    fast, plain = (partial(form, window=window, stride=stride) for form in (cpu.max_pool, lax_max_pool))
    return lax.platform_dependent(images, cpu=fast, default=plain)


def global_average_pool(images: jax.Array) -> jax.Array:
    """Means over [N, H, W, C], in float32 (float64 for such images): [N, C]."""
    if images.dtype == jnp.bfloat16:
        # XLA:CPU of jaxlib 0.11.2 fuses up to three convolutions with the mean of their outputs, which can make it NaN.
        images = lax.platform_dependent(images, cpu=lax.optimization_barrier, default=lambda images: images)
    return images.astype(np.promote_types(images.dtype, np.float32)).mean(axis=(1, 2))


class Conv(nn.Module):
    """flax.linen.Conv with stride 1, in the fastest form for the platform.

    In bfloat16 the gradient of its bias is summed in float32.
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
        images, kernel, bias = vary_alike(images, kernel, bias)  # sums of gradients over devices are then float32 too
        outputs = convolution(images.astype(self.dtype), kernel.astype(self.dtype), self.padding)
        return _add_bias(outputs, bias)


class Dense(nn.Module):
    """flax.linen.Dense for [N, inputs]. In bfloat16 the gradient of its bias is summed in float32, as in `Conv`."""

    features: int
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, inputs] → [N, features] of type `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        x, kernel, bias = vary_alike(x, kernel, bias)
        outputs = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        return _add_bias(outputs, bias)


def _add_bias(outputs: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a float32 bias [features]. Its gradient is a sum in float32, because it is spread before it is rounded.

    Flax rounds first, so in bfloat16 it sums in bfloat16, with errors of up to 40 %.
    """
    return outputs + jnp.broadcast_to(bias, outputs.shape).astype(outputs.dtype)


def bernoulli_mask(key: jax.Array, probability: float, shape: Sequence[int], first: jax.Array | int = 0) -> jax.Array:
    """True with this probability, to 2⁻³³: bool [*shape]. `first`: number of the first row, int32 scalar.

    The rows 0 … n - 1 and the rows n … 2n - 1 are together the mask of 2n rows.
    `jax.random.bernoulli` hashes every element by threefry: a fifth of LeNet-5's step on a CPU. Here threefry draws a
    sequence start + step·i, and a cheap hash of its i-th integer decides on the i-th element. The index is
    summed over the axes, because XLA:CPU is several times faster with it than with a reshaped array.
    """
    start, step = jax.random.bits(key, (2,), jnp.uint32)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    indices = [lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(s) for axis, s in enumerate(strides)]
    start += jnp.asarray(first, jnp.uint32) * jnp.uint32(strides[0]) * (step | jnp.uint32(1))
    words = _hash(start + functools.reduce(jnp.add, indices) * (step | jnp.uint32(1)))
    threshold = round(probability * 2**32)  # of the 2³² words; it may be all of them, which uint32 can't hold
    return words <= jnp.uint32(threshold - 1) if threshold else jnp.zeros(shape, bool)


def _hash(words: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finalizer, uint32 [N] → uint32 [N]: a bijection; each bit changes half of the result's."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


class Dropout(nn.Module):
    """flax.linen.Dropout with the cheaper `bernoulli_mask`."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, first: jax.Array | int = 0) -> jax.Array:
        """Where `train`, each value is 0 with probability `rate`, else divided by 1 - rate; key: rngs 'dropout'.

        Args: first: number of the first image in the global batch, see `number_images`.
        """
        if not train or self.rate == 0.0:
            return x
        mask = bernoulli_mask(self.make_rng("dropout"), 1 - self.rate, x.shape, first)
        return jnp.where(mask, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))


def number_images(first: jax.Array) -> Any:
    """Context in which all Dropout layers number the images first, first + 1, … (int32 scalar).

    Devices that hold parts of a global batch then draw the masks that one device would draw.
    """

    def numbered(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        is_dropout = isinstance(context.module, Dropout) and context.method_name == "__call__"
        return next_call(*args, **kwargs, **({"first": first} if is_dropout else {}))

    return nn.intercept_methods(numbered)
