"""What a step sees: the order of an epoch's images, batches of them, and how their pixels are scaled."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cifar_jax.datasets import DATASETS

# Always the same generator: a run then does not depend on the user's jax_default_prng_impl.
PRNG_IMPL = "threefry2x32"


def split_seed(seed: int) -> jax.Array:
    """A run's three independent keys: of the initial parameters, of the training steps, of the epochs' orders."""
    return jax.random.split(jax.random.key(seed, impl=PRNG_IMPL), 3)


def epoch_order(seed: int, epoch: int, num_images: int) -> jax.Array:
    """The order of the training images in an epoch: int32 [num_images], a function of seed and epoch alone."""
    _, _, order_key = split_seed(seed)
    return jax.random.permutation(jax.random.fold_in(order_key, epoch), num_images)


def take_batch(
    images: jax.Array, labels: jax.Array, order: jax.Array, start: jax.Array, size: int, wrap: bool = False
) -> dict[str, jax.Array]:
    """Positions start … start+size of an order as a batch. Positions past the end are masked.

    Args: images uint8 [N, 32, 32, 3]; labels int32 [N]; order int32 [N]; start int32 scalar; wrap: the masked ones are
    the order's first images, so that a batch's statistics are of different images, else copies of the last one.
    Returns: {'image': uint8 [size, 32, 32, 3], 'label': int32 [size], 'index': int32 [size], its place in the dataset,
    'mask': float32 [size], 1 for real examples}.
    """
    positions = start + jnp.arange(size, dtype=jnp.int32)
    last = order.shape[0] - 1
    indices = order[positions % order.shape[0] if wrap else jnp.minimum(positions, last)]
    mask = (positions < order.shape[0]).astype(jnp.float32)
    return {"image": images[indices], "label": labels[indices], "index": indices, "mask": mask}


INPUT_SCALINGS = ("unit", "symmetric", "standardized")


def pixel_statistics(input_scaling: str, dataset: str) -> tuple[Sequence[float], Sequence[float]]:
    """What is subtracted from pixels in [0, 1], and then divided by: one number, or one by channel, each.

    Args: input_scaling: 'unit' (pixels in [0, 1]), 'symmetric' ([-1, 1]) or 'standardized' (zero mean and unit
    variance over the dataset's training images).
    """
    info = DATASETS[dataset]
    return {"unit": ((0.0,), (1.0,)), "symmetric": ((0.5,), (0.5,)), "standardized": (info.mean, info.std)}[
        input_scaling
    ]


def scale_images(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 [N, H, W, 3] → float32, (pixel / 255 - mean) / std. Args: mean and std as `pixel_statistics` gives them."""
    shift, divisor = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std))
    return (images.astype(jnp.float32) / 255 - shift) / divisor
