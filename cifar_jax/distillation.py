"""Knowledge distillation: a network also learns the logits of a trained one, its teacher (arXiv:1503.02531).

The teacher sees each training image in every view that mirroring and cropping can give. The number of a view says which
one a step has drawn; teacher.py computes the logits of all views before training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cifar_jax.augment import augmentation_keys, crop_offset, is_mirrored, part_keys
from cifar_jax.configs.base import Config


class View(NamedTuple):
    """An image as the teacher sees it: mirrored (0 or 1), then shifted by whole pixels with reflected edges."""

    mirrored: int
    shift_y: int
    shift_x: int


def list_views(config: Config) -> list[View]:
    """Returns all views that the recipe's flips and crops can give. A view's number is its place in this list."""
    shifts = range(-config.crop_padding, config.crop_padding + 1)
    flips = (0, 1) if config.random_flip or config.alternating_flip else (0,)
    return [View(mirrored, y, x) for mirrored in flips for y in shifts for x in shifts]


def create_view_numbers(config: Config) -> Callable[..., jax.Array]:
    """Returns numbers(rng, step, device, batch) → int32 [n], the views that `create_input_transform` draws.

    Its arguments are those of `create_input_transform`'s result.
    """
    padding = config.crop_padding
    side = 2 * padding + 1

    def number(key: jax.Array, mirrored: jax.Array) -> jax.Array:
        _, crop_key, flip_key, _ = part_keys(key)
        y, x = crop_offset(crop_key, padding) if padding else jnp.zeros(2, jnp.int32)
        if config.random_flip:  # the crop is mirrored, which is a crop of the mirrored image
            mirrored = jax.random.bernoulli(flip_key).astype(jnp.int32)
            x = jnp.where(mirrored == 1, 2 * padding - x, x)
        return (mirrored * side + y) * side + x

    def numbers(rng: jax.Array, step: jax.Array, device: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        size = batch["label"].shape[0]
        keys = augmentation_keys(rng, step, device * size + jnp.arange(size, dtype=jnp.int32))
        mirrored = jnp.zeros(size, jnp.int32)
        if config.alternating_flip:
            mirrored = is_mirrored(rng, batch["index"], batch["epoch"]).astype(jnp.int32)
        return jax.vmap(number)(keys, mirrored)

    return numbers


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Returns temperature² · KL(teacher ‖ student) per example, nats, of probabilities softmax(logits / temperature).

    The factor keeps the size of the gradients independent of the temperature. It is 0 where both agree.
    Args: logits, teacher_logits: float32 [N, C]. Returns: float32 [N].
    """
    log_probabilities = jax.nn.log_softmax(logits / temperature)
    targets = jax.nn.softmax(teacher_logits / temperature)
    return temperature**2 * optax.losses.kl_divergence(log_probabilities, targets)
