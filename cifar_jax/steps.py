"""Counts a run's steps, and checks that its recipe fits the data and the devices."""

from __future__ import annotations

from cifar_jax.configs.base import Config
from cifar_jax.console import say
from cifar_jax.errors import UserError
from cifar_jax.optimizer import swa_steps


def count_steps_per_epoch(config: Config, num_images: int, num_devices: int) -> int:
    """Returns the number of batches of an epoch, of which the last may be partial.

    Raises: UserError if the recipe does not fit the number of images or devices.
    """
    if (size := config.image_size(config.num_epochs - 1)) < 24:  # the test after 16 pixels costs All-CNN 15 points
        last = f"warning: --image-sizes: the last epoch has images of {size}×{size} pixels"
        say(f"{last}, which suits test images of 32×32 pixels badly: 24 pixels or more do", error=True)
    if config.batch_size > num_images:
        raise UserError(f"--batch-size {config.batch_size}: there are only {num_images} training images")
    steps_per_epoch = -(-num_images // config.batch_size)
    if config.num_epochs * steps_per_epoch >= 2**31:
        raise UserError(f"--num-epochs {config.num_epochs}: too many: the limit is {2**31 - 1:,} steps")
    if config.swa_fraction and swa_steps(config, steps_per_epoch)[1] == 0:
        say(f"warning: --swa-fraction is too small for {config.swa_cycles} cycles: it has no effect", error=True)
    if config.mixes and config.batch_size // num_devices % 2:
        raise UserError("mixing needs an even number of images per device: use another --batch-size or --num-devices")
    return steps_per_epoch
