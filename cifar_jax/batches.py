"""The order of an epoch, its batches, their keys, and the scaling of pixels: pure functions on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the training set's pixels, by channel, in [0, 1]
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
# What is subtracted from pixels in [0, 1], and then divided by, for each input_scaling.
SCALINGS = {"unit": ((0.0,), (1.0,)), "symmetric": ((0.5,), (0.5,)), "standardized": (CIFAR10_MEAN, CIFAR10_STD)}


def split_seed(seed: int) -> jax.Array:
    """A run's three independent keys: of the initial parameters, of the training steps, of the epochs' orders."""
    return jax.random.split(jax.random.key(seed), 3)


def epoch_order(seed: int, epoch: int, num_images: int) -> jax.Array:
    """The order of the training images in an epoch: int32 [num_images], a function of seed and epoch alone."""
    _, _, order_key = split_seed(seed)
    return jax.random.permutation(jax.random.fold_in(order_key, epoch), num_images)


def step_keys(rng: jax.Array, step: jax.Array | int) -> jax.Array:
    """The two keys of a training step: of augmentation and of dropout."""
    return jax.random.split(jax.random.fold_in(rng, step))


def augmentation_keys(rng: jax.Array, step: jax.Array | int, positions: jax.Array) -> jax.Array:
    """The keys of a step's images, by position in the global batch: the same whatever the number of devices."""
    augment_rng, _ = step_keys(rng, step)
    return jax.vmap(lambda i: jax.random.fold_in(augment_rng, i))(positions)


def take_batch(
    images: jax.Array, labels: jax.Array, order: jax.Array, start: jax.Array, size: int
) -> dict[str, jax.Array]:
    """Positions start … start+size of an order as a batch; those past the end are masked copies of the last.

    Args: images uint8 [N, 32, 32, 3]; labels int32 [N]; order int32 [N]; start int32 scalar.
    Returns: {'image': uint8 [size, 32, 32, 3], 'label': int32 [size], 'index': int32 [size], its place in the dataset,
    'mask': float32 [size], 1 for real examples}.
    """
    positions = start + jnp.arange(size, dtype=jnp.int32)
    indices = order[jnp.minimum(positions, order.shape[0] - 1)]
    mask = (positions < order.shape[0]).astype(jnp.float32)
    return {"image": images[indices], "label": labels[indices], "index": indices, "mask": mask}


def scale_images(images: jax.Array, input_scaling: str) -> jax.Array:
    """uint8 [N, H, W, 3] → float32, scaled as the recipe's `input_scaling` says."""
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in SCALINGS[input_scaling])
    return (images.astype(jnp.float32) / 255 - mean) / std
