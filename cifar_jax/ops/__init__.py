"""Convolution and max pool in the form that is fastest on the platform for which a program is lowered; dropout.

reference.py   lax's forms: what these operations are on every platform but the CPU
primitives.py  the convolution, its derivatives, and the choice of its form
cpu.py         the CPU's forms: winograd.py needs about half of the products, direct.py is for the other convolutions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32

from cifar_jax.ops import cpu
from cifar_jax.ops.primitives import convolution
from cifar_jax.ops.reference import lax_max_pool


def max_pool(images: jax.Array, window: int, stride: int) -> jax.Array:
    """Max pool without padding. Args: images [N, H, W, C], finite. Returns: [N, H', W', C]."""
    fast, plain = (partial(form, window=window, stride=stride) for form in (cpu.max_pool, lax_max_pool))
    return lax.platform_dependent(images, cpu=fast, default=plain)


def global_average_pool(images: jax.Array) -> jax.Array:
    """Means over [N, H, W, C], in float32 (float64 for such images): [N, C]."""
    if images.dtype == jnp.bfloat16:
        # XLA:CPU of jaxlib 0.11.2 fuses up to three convolutions with a mean of theirs, and then it can be NaN.
        images = lax.platform_dependent(images, cpu=lax.optimization_barrier, default=lambda images: images)
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
