"""Mixes the images of a batch and their labels: mixup and cutmix."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixture(NamedTuple):
    """How a batch was mixed: each image's partner, int32 [N], and the weight of its own label, float32 [N]."""

    partner: jax.Array
    share: jax.Array


def mix(
    keys: jax.Array, images: jax.Array, others: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with another by mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899).

    Args: keys [N]; images, others: float [N, H, W, C]; mixup_alpha, cutmix_alpha: exactly one is above 0.
    Returns: (mixed images [N, H, W, C], weight of each image's own label, float32 [N]).
    """
    _, height, width, _ = images.shape
    share_keys, y_keys, x_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    alpha = mixup_alpha or cutmix_alpha
    share = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha, dtype=jnp.float32))(share_keys)
    if mixup_alpha:
        weight = share.reshape(-1, 1, 1, 1).astype(images.dtype)
        return weight * images + (1 - weight) * others, share

    def inside(keys: jax.Array, length: int) -> jax.Array:
        centre = jax.vmap(lambda key: jax.random.uniform(key, (1,), jnp.float32))(keys) * length
        half = length * jnp.sqrt(1 - share)[:, None] / 2
        return jnp.abs(jnp.arange(0.5, length, dtype=jnp.float32)[None, :] - centre) < half

    box = inside(y_keys, height)[:, :, None] & inside(x_keys, width)[:, None, :]  # clipped at the edges: count pixels
    return jnp.where(box[..., None], others, images), 1 - box.mean((1, 2), dtype=jnp.float32)
