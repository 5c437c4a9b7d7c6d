"""Selects what a step sees: the order of an epoch's images, the batches, and the scaling of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cifar_jax.datasets import DATASETS

# A fixed generator keeps runs independent of the user's jax_default_prng_impl.
PRNG_IMPL = "threefry2x32"


def split_seed(seed: int) -> jax.Array:
    """Returns a run's three independent keys: for initial parameters, for training steps, for the order of epochs."""
    return jax.random.split(jax.random.key(seed, impl=PRNG_IMPL), 3)


def epoch_order(seed: int, epoch: int, num_images: int) -> jax.Array:
    """Returns an epoch's permutation of the training images, int32 [num_images]. It depends only on seed and epoch."""
    _, _, order_key = split_seed(seed)
    return jax.random.permutation(jax.random.fold_in(order_key, epoch), num_images)


def take_batch(
    images: jax.Array, labels: jax.Array, order: jax.Array, start: jax.Array, size: int, wrap: bool = False
) -> dict[str, jax.Array]:
    """Takes positions start … start + size - 1 of an order as a batch. Positions past the end are padding.

    Args: images: uint8 [N, 32, 32, 3]; labels: int32 [N]; order: int32 [N]; start: int32 scalar; wrap: pad with the
    order's first images, so that batch statistics see different images, instead of copies of the last image.
    Returns: {'image': uint8 [size, 32, 32, 3], 'label': int32 [size], 'index': int32 [size], position in the dataset,
    'mask': float32 [size], 1 for real examples and 0 for padding}.
    """
    positions = start + jnp.arange(size, dtype=jnp.int32)
    last = order.shape[0] - 1
    indices = order[positions % order.shape[0] if wrap else jnp.minimum(positions, last)]
    mask = (positions < order.shape[0]).astype(jnp.float32)
    return {"image": images[indices], "label": labels[indices], "index": indices, "mask": mask}


InputScaling = Literal["unit", "symmetric", "standardized"]
INPUT_SCALINGS: tuple[str, ...] = get_args(InputScaling)


def pixel_statistics(input_scaling: str, dataset: str) -> tuple[Sequence[float], Sequence[float]]:
    """Returns (mean, std) with which `scale_images` scales pixels: one number each, or one per channel.

    Args: input_scaling: 'unit' (pixels in [0, 1]), 'symmetric' ([-1, 1]) or 'standardized' (zero mean and unit
    variance per channel over the dataset's training images).
    """
    info = DATASETS[dataset]
    return {"unit": ((0.0,), (1.0,)), "symmetric": ((0.5,), (0.5,)), "standardized": (info.mean, info.std)}[
        input_scaling
    ]


def scale_images(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Scales pixels: uint8 [N, H, W, 3] → float32, (pixel / 255 - mean) / std. See `pixel_statistics`."""
    shift, divisor = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return (images.astype(jnp.float32) / 255 - shift) / divisor
