"""Prepares a training batch on the device: random keys, scaling, augmentation, resizing and mixing.

Each augmentation is a pure function of (key, image) for one image [H, W, C], and is vmapped over the batch. Each image
has its own key, so the draws do not depend on the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.configs.base import Config
from cifar_jax.mixing import Mixture, mix


def affine(image: jax.Array, angle: jax.Array, shift_y: jax.Array, shift_x: jax.Array) -> jax.Array:
    """Rotates an image about its centre and shifts it, in one bilinear warp with edge fill (keras-preprocessing 1.1).

    Output pixel (i, j) samples the input at (c·u - s·v + o_y, s·u + c·v + o_x) with c, s = cos and sin of the angle,
    u = i - o_y + shift_y, v = j - o_x + shift_x, o = size/2 + 0.5. Source: keras_preprocessing/image/
    affine_transformations.py, which multiplies rotation by shift and moves the origin to the centre.

    Args: image: float [H, W, C]; angle: radians; shift_y, shift_x: pixels, scalars. Returns: float [H, W, C].
    """
    height, width, _ = image.shape
    o_y, o_x = height / 2 + 0.5, width / 2 + 0.5
    u = (jnp.arange(height, dtype=image.dtype) - o_y + shift_y)[:, None]
    v = (jnp.arange(width, dtype=image.dtype) - o_x + shift_x)[None, :]
    c, s = jnp.cos(angle), jnp.sin(angle)
    return _warp(image, [c * u - s * v + o_y, s * u + c * v + o_x])


def _warp(image: jax.Array, coordinates: list[jax.Array]) -> jax.Array:
    """Samples each channel at the coordinates (rows [H, W], columns [H, W]): bilinear, with edge fill."""
    warp_channel = lambda channel: map_coordinates(channel, coordinates, order=1, mode="nearest")
    return jax.vmap(warp_channel, in_axes=-1, out_axes=-1)(image)


def draw_affine(
    key: jax.Array, rotation_degrees: float, shift_fraction: float, height: int = 32, width: int = 32
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws float32 (angle, shift_y, shift_x): U(±rotation_degrees) in radians, U(±shift_fraction · size) in pixels."""
    angle_key, y_key, x_key = jax.random.split(key, 3)
    uniform = lambda key, bound: jax.random.uniform(key, (), jnp.float32, -bound, bound)
    angle = jnp.deg2rad(uniform(angle_key, rotation_degrees))
    return angle, uniform(y_key, shift_fraction * height), uniform(x_key, shift_fraction * width)


def random_affine(key: jax.Array, image: jax.Array, rotation_degrees: float, shift_fraction: float) -> jax.Array:
    """Applies `affine` with parameters drawn by `draw_affine`."""
    return affine(image, *draw_affine(key, rotation_degrees, shift_fraction, *image.shape[:2]))


def crop_offset(key: jax.Array, padding: int) -> jax.Array:
    """Draws the (row, column) at which `random_crop` cuts, int32 [2], uniform from 0 to 2·padding."""
    return jax.random.randint(key, (2,), 0, 2 * padding + 1)


def random_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Pads by reflection and crops at a uniform whole-pixel offset, which shifts by up to ±padding pixels."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    y, x = crop_offset(key, padding)
    sliced, selected = (partial(form, padding=padding) for form in (slice_window, select_window))
    return jax.lax.platform_dependent(padded, y, x, cpu=sliced, default=selected)


def slice_window(padded: jax.Array, y: jax.Array, x: jax.Array, padding: int) -> jax.Array:
    """Cuts the window at (y, x) out of a padded image. On a TPU a batch of these becomes a loop over the images."""
    height, width, channels = padded.shape
    shape = (height - 2 * padding, width - 2 * padding, channels)
    return jax.lax.dynamic_slice(padded, (y, x, jnp.zeros_like(x)), shape)


def select_window(padded: jax.Array, y: jax.Array, x: jax.Array, padding: int) -> jax.Array:
    """Does the same by choosing among all shifted rows, then among all shifted columns."""
    for axis, offset in enumerate((y, x)):
        size = padded.shape[axis] - 2 * padding
        shifted = [jax.lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * padding + 1)]
        padded = jax.lax.select_n(offset, *shifted)
    return padded


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors the image horizontally with probability 0.5."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def is_mirrored(key: jax.Array, indices: jax.Array, epoch: jax.Array) -> jax.Array:
    """Returns which images alternating flip mirrors in an epoch, bool [N] (arXiv:2404.00498).

    Even epochs mirror a random half of the images and odd epochs the other half, so two consecutive epochs show each
    image both ways. Args: indices: int32 [N], positions in the dataset; epoch: int32 scalar from 0.
    """
    at_first = jax.vmap(lambda index: jax.random.bernoulli(jax.random.fold_in(key, index)))(indices)
    return at_first ^ (epoch % 2 == 1)


def cutout(key: jax.Array, image: jax.Array, size: int) -> jax.Array:
    """Sets a square with sides of `size` pixels to 0 (arXiv:1708.04552).

    The centre is uniform over the image. The square is clipped at the image's edges.
    """
    height, width, _ = image.shape
    y_key, x_key = jax.random.split(key)
    top = jax.random.randint(y_key, (), 0, height) - size // 2
    left = jax.random.randint(x_key, (), 0, width) - size // 2
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_rows = (rows >= top) & (rows < top + size)
    inside_columns = (columns >= left) & (columns < left + size)
    inside = inside_rows[:, None, None] & inside_columns[None, :, None]
    return jnp.where(inside, jnp.zeros((), image.dtype), image)


def trivial_augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """Applies one of 13 operations at random, with strength U(0, 1), like TrivialAugment (arXiv:2103.10158).

    The operations are TrivialAugment's except equalize, with AutoAugment's ranges: identity; rotation (±30°), shear
    (±0.3) and shift (±10 pixels), with edge fill; brightness, contrast, colour and sharpness (1 ± 0.9); solarize
    (threshold 256 to 0), posterize (8 to 4 bits), autocontrast.
    Args: image: uint8 or float [H, W, 3], from 0 to 255. Returns: float32 [H, W, 3], from 0 to 255.
    """
    kind_key, strength_key, sign_key = jax.random.split(key, 3)
    kind = jax.random.randint(kind_key, (), 0, 13)
    strength = jax.random.uniform(strength_key, dtype=jnp.float32)
    signed = jnp.where(jax.random.bernoulli(sign_key), strength, -strength)
    image = image.astype(jnp.float32)

    # Operations 1 to 5 are one warp, in which only the chosen one's amount is not 0.
    most = (jnp.pi / 6, 0.3, 10.0, 0.3, 10.0)
    rotation, shear_y, shift_y, shear_x, shift_x = (
        jnp.where(kind == number, amount * signed, 0.0) for number, amount in enumerate(most, 1)
    )
    height, width, _ = image.shape
    y, x = (jnp.arange(size, dtype=jnp.float32) - (size - 1) / 2 for size in (height, width))
    c, s = jnp.cos(rotation), jnp.sin(rotation)
    rows = c * y[:, None] - (s + shear_y) * x[None, :] + shift_y
    columns = (s + shear_x) * y[:, None] + c * x[None, :] + shift_x
    warped = _warp(image, [rows + (height - 1) / 2, columns + (width - 1) / 2])

    gray = (image * jnp.array([0.299, 0.587, 0.114], jnp.float32).reshape(1, 1, 3)).sum(-1, keepdims=True)
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    box = sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3))
    blend = lambda dull: dull + (1 + 0.9 * signed) * (image - dull)  # moves away from or towards the dull image
    step = 2.0 ** jnp.round(4 * strength)
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    results = [
        *[warped] * 6,  # operation 0 is the identity
        blend(jnp.zeros_like(image)),
        blend(jnp.full_like(image, gray.mean())),
        blend(jnp.broadcast_to(gray, image.shape)),
        blend((box + 4 * image) / 13),
        jnp.where(image >= 256 * (1 - strength), 255 - image, image),
        jnp.floor(image / step) * step,
        jnp.where(high > low, (image - low) * (255 / jnp.maximum(high - low, 1)), image),
    ]
    return jnp.clip(jax.lax.select_n(kind, *results), 0, 255)


def part_keys(key: jax.Array) -> jax.Array:
    """Returns an image's four keys, for the affine warp, the crop, the flip and the cutout."""
    return jax.random.split(key, 4)


def create_augment(config: Config) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the recipe's augmentation of scaled images: (keys [N], float images [N, H, W, C]) → images."""

    def augment_one(key: jax.Array, image: jax.Array) -> jax.Array:
        affine_key, crop_key, flip_key, cutout_key = part_keys(key)
        if config.rotation_degrees or config.shift_fraction:
            image = random_affine(affine_key, image, config.rotation_degrees, config.shift_fraction)
        if config.crop_padding:
            image = random_crop(crop_key, image, config.crop_padding)
        if config.random_flip:
            image = random_flip(flip_key, image)
        if config.cutout_size:
            image = cutout(cutout_key, image, config.cutout_size)
        return image

    return jax.vmap(augment_one)


def step_keys(rng: jax.Array, step: jax.Array | int) -> jax.Array:
    """Returns a training step's two keys: the first for augmentation and mixing, the second for dropout."""
    return jax.random.split(jax.random.fold_in(rng, step))


def augmentation_keys(rng: jax.Array, step: jax.Array | int, positions: jax.Array) -> jax.Array:
    """Returns one key per image. It depends on the position in the global batch, not on the number of devices.

    Args: rng: the run's key; step: int32 scalar; positions: int32 [n]. Returns: keys [n].
    """
    augment_rng, _ = step_keys(rng, step)
    return jax.vmap(lambda i: jax.random.fold_in(augment_rng, i))(positions)


def create_input_transform(config: Config, image_size: int) -> Callable[..., tuple[jax.Array, Mixture | None]]:
    """Returns transform(rng, step, device, batch) → (images, mixture), which prepares a device's part of a batch.

    Its arguments: rng: the run's key; step, device: int32 scalars; batch: `take_batch`'s result and 'epoch', int32 from
    0. Its results: images: float32 [n, image_size, image_size, 3]; mixture: None if the recipe does not mix.
    """
    augment = create_augment(config)
    statistics = pixel_statistics(config.input_scaling, config.dataset)

    def transform(
        rng: jax.Array, step: jax.Array, device: jax.Array, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, Mixture | None]:
        images, size = batch["image"], batch["label"].shape[0]
        keys = augmentation_keys(rng, step, device * size + jnp.arange(size, dtype=jnp.int32))
        if config.trivial_augment:
            images = jax.vmap(lambda key, image: trivial_augment(jax.random.fold_in(key, 4), image))(keys, images)
        if config.alternating_flip:
            mirrored = is_mirrored(rng, batch["index"], batch["epoch"])
            images = jnp.where(mirrored.reshape(-1, 1, 1, 1), images[:, :, ::-1], images)
        images = augment(keys, scale_images(images, *statistics))
        if image_size != images.shape[1]:
            images = jax.image.resize(images, (size, image_size, image_size, 3), "linear")  # antialiased
        if not config.mixes:
            return images, None
        place, real = jnp.arange(size), batch["mask"].sum().astype(jnp.int32)
        neighbour = place ^ 1
        partner = jnp.where(neighbour < real, neighbour, place)  # no padding
        mix_keys = jax.vmap(lambda key: jax.random.fold_in(key, 5))(keys)
        images, share = mix(mix_keys, images, images[partner], config.mixup_alpha, config.cutmix_alpha)
        return images, Mixture(partner, share)

    return transform
