import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps

from cifar_jax import augment, mixing
from cifar_jax.configs import RECIPES


@pytest.fixture
def image():
    return jnp.asarray(np.random.default_rng(0).random((32, 32, 3), np.float32))


def test_affine_whole_pixel_shifts(image):
    """A shift by +2 samples two rows further down and repeats the edge row. Columns behave alike."""
    down = augment.affine(image, jnp.float32(0), jnp.float32(2), jnp.float32(0))
    np.testing.assert_allclose(down[:-2], image[2:], atol=1e-5)
    np.testing.assert_allclose(down[-2:], np.stack([image[-1]] * 2), atol=1e-5)
    left = augment.affine(image, jnp.float32(0), jnp.float32(0), jnp.float32(-3))
    np.testing.assert_allclose(left[:, 3:], image[:, :-3], atol=1e-5)
    np.testing.assert_allclose(left[:, :3], np.stack([image[:, 0]] * 3, axis=1), atol=1e-5)


def test_affine_quarter_turn(image):
    """A quarter turn about (16.5, 16.5) takes pixel (i, j) from (33 - j, i)."""
    turned = augment.affine(image, jnp.float32(np.pi / 2), jnp.float32(0), jnp.float32(0))
    np.testing.assert_allclose(turned[5, 10], image[23, 5], atol=1e-4)
    np.testing.assert_allclose(turned[20, 7], image[26, 20], atol=1e-4)


def test_affine_is_keras_preprocessings(image):
    """The matrices of keras-preprocessing 1.1, passed to the SciPy function that it calls."""
    for angle, shift_y, shift_x in [(0.17, 3.1, -2.4), (-0.1, -0.7, 1.9), (0.0, 0.5, 0.5)]:
        c, s = np.cos(angle), np.sin(angle)
        rotate = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        shift = np.array([[1, 0, shift_y], [0, 1, shift_x], [0, 0, 1]])
        to_centre = np.array([[1, 0, 16.5], [0, 1, 16.5], [0, 0, 1]])
        matrix = to_centre @ rotate @ shift @ np.linalg.inv(to_centre)
        warp = lambda channel, matrix=matrix: scipy.ndimage.affine_transform(
            channel, matrix[:2, :2], matrix[:2, 2], order=1, mode="nearest"
        )
        expected = np.stack([warp(np.asarray(image)[..., i]) for i in range(3)], axis=-1)
        actual = augment.affine(image, *map(jnp.float32, (angle, shift_y, shift_x)))
        np.testing.assert_allclose(actual, expected, atol=5e-6)


def test_random_affine_draws():
    """The draws fill their ranges and stay within them, seen on coordinates, which a linear warp keeps exactly."""
    rows, columns = jnp.meshgrid(jnp.arange(32.0), jnp.arange(32.0), indexing="ij")
    keys = jax.random.split(jax.random.key(0), 2000)
    grid = jnp.stack([rows, columns], axis=-1)
    warped = jax.vmap(lambda key: augment.random_affine(key, grid, 0.0, 0.1))(keys)
    shifts = np.asarray(warped[:, 16, 16] - 16.0)
    assert np.abs(shifts).max() <= 3.2 + 1e-4
    assert (np.abs(shifts).max(axis=0) > 3.15).all()
    np.testing.assert_allclose(shifts.mean(axis=0), 0, atol=0.15)
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.1
    turned = jax.vmap(lambda key: augment.random_affine(key, grid, 10.0, 0.0))(keys)
    angles = np.rad2deg(np.arctan2(*np.moveaxis(np.asarray(turned[:, 20, 16] - turned[:, 12, 16]), -1, 0)[::-1]))
    assert 9.9 < np.abs(angles).max() <= 10.001
    np.testing.assert_allclose(angles.std(), 10 / np.sqrt(3), rtol=0.05)


def test_random_flip(image):
    keys = jax.random.split(jax.random.key(0), 400)
    flipped, image = np.asarray(jax.vmap(augment.random_flip, (0, None))(keys, image)), np.asarray(image)
    is_flipped = (flipped == image[:, ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == image).all(axis=(1, 2, 3)) ^ is_flipped).all()
    assert 160 < is_flipped.sum() < 240


def test_random_crop_is_a_reflected_shift(image):
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    shifts = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(5) for x in range(5)}
    keys = jax.random.split(jax.random.key(0), 300)
    crops = np.asarray(jax.vmap(lambda key: augment.random_crop(key, image, 2))(keys))
    assert {shifts[crop.tobytes()] for crop in crops} == set(shifts.values())


def test_cutout():
    keys = jax.random.split(jax.random.key(0), 500)
    holes = np.asarray(jax.vmap(lambda key: augment.cutout(key, jnp.ones((32, 32, 3)), 8))(keys)) == 0
    assert (holes == holes[..., :1]).all()
    sizes = holes[..., 0].sum(axis=(1, 2))
    assert sizes.max() == 64
    assert sizes.min() >= 16  # a centre in the corner leaves a quarter
    rows, columns = holes[..., 0].any(axis=2).sum(axis=1), holes[..., 0].any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(sizes, rows * columns)  # each hole is a rectangle
    assert 0.03 < holes.mean() < 64 / 1024
    assert holes.any(axis=0).all()  # holes occur everywhere


def test_a_recipe_without_augmentation_changes_nothing(image):
    keys, images = jax.random.split(jax.random.key(0), 4), jnp.stack([image] * 4)
    np.testing.assert_array_equal(augment.create_augment(RECIPES["lenet5_reference"])(keys, images), images)
    changed = augment.create_augment(RECIPES["all_cnn_reference"])(keys, images)
    assert (np.abs(changed - images).max(axis=(1, 2, 3)) > 0.1).all()
    assert np.abs(changed[0] - changed[1]).max() > 0.1


def test_both_forms_of_a_crop_are_the_same():
    padded = jax.random.normal(jax.random.key(0), (14, 12, 3))
    offsets = jnp.indices((5, 5)).reshape(2, -1)
    sliced, selected = (
        jax.vmap(partial(form, padding=2), (None, 0, 0))(padded, *offsets)
        for form in (augment.slice_window, augment.select_window)
    )
    assert sliced.shape == (25, 10, 8, 3)
    np.testing.assert_array_equal(selected, sliced)
    np.testing.assert_array_equal(sliced[7], padded[1:11, 2:10])


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def test_mixup_weighs_pixels_and_labels_alike():
    images = jnp.arange(4.0).reshape(4, 1, 1, 1) * jnp.ones((4, 8, 8, 3))
    mixed, share = mixing.mix(keys(0, 4), images, images[::-1], 0.4, 0.0)
    own, other = np.arange(4.0), np.arange(4.0)[::-1]
    expected = share * own + (1 - share) * other
    np.testing.assert_allclose(mixed, expected.reshape(4, 1, 1, 1) * np.ones((4, 8, 8, 3)), rtol=1e-5)
    many = jnp.zeros((40_000, 1, 1, 1))
    shares = mixing.mix(keys(1, 40_000), many, many, 0.4, 0.0)[1]
    np.testing.assert_allclose([shares.mean(), shares.var()], [0.5, 0.25 / 1.8], atol=0.01)  # Beta(0.4, 0.4)


def test_cutmix_pastes_a_rectangle_of_the_other_image():
    images = jnp.concatenate([jnp.zeros((200, 16, 16, 3)), jnp.ones((200, 16, 16, 3))])
    mixed, share = mixing.mix(keys(0, 400), images, images[::-1], 0.0, 1.0)
    pasted = np.asarray(mixed != images)
    assert (pasted == pasted[..., :1]).all()
    pasted = pasted[..., 0]
    np.testing.assert_allclose(1 - share, pasted.mean((1, 2)), atol=1e-6)
    rows, columns = pasted.any(axis=2).sum(axis=1), pasted.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(pasted.sum((1, 2)), rows * columns)
    assert pasted.any(axis=0).all()
    assert 0.3 < pasted.mean() < 0.45  # 0.5 minus what the edges cut off


def test_trivial_augment_is_one_of_its_operations():
    """Each of many draws on one image is the identity, a warp, or the result of Pillow (or its formula)."""
    image = np.asarray(jax.random.randint(jax.random.key(0), (32, 32, 3), 20, 220), np.uint8)
    keys = jax.random.split(jax.random.key(1), 600)
    results = np.asarray(jax.jit(jax.vmap(augment.trivial_augment, (0, None)))(keys, image))
    assert results.dtype == np.float32
    assert 0 <= results.min() < results.max() <= 255
    strengths = np.linspace(0, 1, 201)
    pillow = Image.fromarray(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, ImageEnhance.Sharpness)
    as_array = lambda picture: np.asarray(picture, np.float32)
    expected = {
        "identity": [image.astype(np.float32)],
        "solarize": [as_array(ImageOps.solarize(pillow, threshold)) for threshold in range(257)],
        "posterize": [as_array(ImageOps.posterize(pillow, bits)) for bits in (7, 6, 5, 4)],
        "autocontrast": [as_array(ImageOps.autocontrast(pillow))],
    }
    for enhancer in enhancers:
        factors = np.concatenate([1 - 0.9 * strengths, 1 + 0.9 * strengths])
        expected[enhancer.__name__] = [as_array(enhancer(pillow).enhance(factor)) for factor in factors]
    inner = lambda images: images[:, 1:-1, 1:-1]  # Pillow does not sharpen the edges
    is_near = lambda candidates, result: np.abs(candidates - result).max((1, 2, 3)) < 2
    expected = {name: inner(np.stack(candidates)) for name, candidates in expected.items()}
    found = dict.fromkeys(expected, 0)
    for result in inner(results):
        for name, candidates in expected.items():
            few = is_near(candidates[:, ::8, ::8], result[::8, ::8])  # a few pixels first, which is faster
            if is_near(candidates[few], result).any():
                found[name] += 1
                break
    others = len(results) - sum(found.values())
    for name, count in found.items():  # each of 13 kinds has 46; weak draws of other kinds count as the identity
        assert 12 < count < 85, (name, count)
    assert 170 < others < 260  # the five warps


def test_trivial_augment_leaves_most_of_a_constant_image():
    """Like Pillow's autocontrast. Brightness, solarize and posterize change a constant image."""
    keys = jax.random.split(jax.random.key(1), 600)
    results = jax.jit(jax.vmap(augment.trivial_augment, (0, None)))(keys, jnp.full((8, 8, 3), 100, jnp.uint8))
    assert (results == 0).all((1, 2, 3)).mean() < 0.01
    assert jnp.isclose(results, 100, atol=0.01).all((1, 2, 3)).mean() > 10 / 13


def test_trivial_augment_shifts_turns_and_shears():
    """On an image of coordinates the warps return straight lines within their bounds, except at the edges."""
    rows, columns = np.meshgrid(np.arange(32.0) * 4, np.arange(32.0) * 4, indexing="ij")
    grid = np.stack([rows, columns, np.zeros((32, 32))], -1).astype(np.float32)
    warp = jax.vmap(lambda key: augment.trivial_augment(key, grid))
    results = np.asarray(warp(jax.random.split(jax.random.key(0), 1500)))[..., :2] / 4
    a = results[:, 17, 16] - results[:, 15, 16]  # derivative along rows
    b = results[:, 16, 17] - results[:, 16, 15]
    middle = results[:, 16, 16] - 16
    straight = np.abs(a - (results[:, 18, 16] - results[:, 16, 16])).max(-1) < 1e-3
    near = lambda x, value: np.abs(x - value) < 1e-3
    kept = straight & near(a[:, 0], 2) & near(b[:, 1], 2)
    shifts = kept & near(a[:, 1], 0) & near(b[:, 0], 0) & (np.abs(middle).max(-1) > 0.1)
    assert 9 < np.abs(middle[shifts]).max() <= 10.01
    assert (np.abs(middle[shifts]).max(0) > 9).all()
    assert near(middle[shifts].min(-1) * middle[shifts].max(-1), 0).all()  # each shift has one direction
    shears = np.stack([a[:, 1], b[:, 0]], -1)[kept & ~shifts] / 2
    assert (np.abs(shears).max(0) > 0.28).all()
    assert np.abs(shears).max() < 0.301
    turned = straight & near(a[:, 0], b[:, 1]) & near(a[:, 1], -b[:, 0]) & (np.abs(a[:, 1]) > 0.01)
    angles = np.rad2deg(np.arctan2(a[turned][:, 1], a[turned][:, 0]))
    assert 29 < angles.max() <= 30.01
    assert -30.01 <= angles.min() < -29


def test_alternating_flip_mirrors_a_random_half_and_then_the_other():
    mirrored = jax.jit(augment.is_mirrored)
    key, indices = jax.random.key(0), jnp.arange(1000)
    epochs = [np.asarray(mirrored(key, indices, jnp.int32(epoch))) for epoch in range(4)]
    assert 450 < epochs[0].sum() < 550
    np.testing.assert_array_equal(epochs[1], ~epochs[0])
    np.testing.assert_array_equal(epochs[2], epochs[0])
    np.testing.assert_array_equal(epochs[3], epochs[1])
    np.testing.assert_array_equal(mirrored(key, indices[::-1], jnp.int32(0)), epochs[0][::-1])  # same image


def is_a_turn(images, image):
    """The rotation is about the centre and moves nearly all pixels."""
    return np.abs(images[:, 16, 16] - image[16, 16]).max() < 0.01 and (np.abs(images - image) > 1e-4).mean() > 0.8


def is_a_shift(images, image):
    """The shift is constant in the middle of an image, sub-pixel, and up to 3.2 pixels."""
    moves = (images - image)[:, 6:26, 6:26, :2]
    steps = moves[:, 0, 0] * [31, 100]
    return (
        np.ptp(moves, (1, 2)).max() < 1e-5 and np.abs(steps - steps.round()).max() > 0.1 and np.abs(steps).max() < 3.21
    )


def is_a_crop(images, image):
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    crops = {padded[y : y + 32, x : x + 32].tobytes() for y in range(5) for x in range(5)}
    return {crop.tobytes() for crop in images} <= crops


def is_a_flip(images, image):
    return {image_or_mirror.tobytes() for image_or_mirror in images} == {image.tobytes(), image[:, ::-1].tobytes()}


def is_a_hole(images, image):
    changed = (images != image).any(-1)
    return (images[changed] == 0).all() and changed.sum((1, 2)).max() <= 64


@pytest.mark.parametrize(
    ("field", "value", "is_so"),
    [
        ("rotation_degrees", 10.0, is_a_turn),
        ("shift_fraction", 0.1, is_a_shift),
        ("crop_padding", 2, is_a_crop),
        ("random_flip", True, is_a_flip),
        ("cutout_size", 8, is_a_hole),
    ],
)
def test_each_field_augments_by_itself(field, value, is_so):
    """The image is a ramp to the right and down."""
    rows, columns = jnp.meshgrid(jnp.arange(32.0) / 100, jnp.arange(32.0) / 31, indexing="ij")
    image = jnp.stack([columns, rows, rows + 0.1], -1)
    keys = jax.random.split(jax.random.key(0), 16)
    config = dataclasses.replace(RECIPES["lenet5_reference"], **{field: value})
    images = np.asarray(augment.create_augment(config)(keys, jnp.stack([image] * 16)))
    image = np.asarray(image)
    assert (np.abs(images - image).max((1, 2, 3)) > 0.01).sum() > 4
    kinds = (is_a_turn, is_a_shift, is_a_crop, is_a_flip, is_a_hole)
    assert [kind(images, image) for kind in kinds] == [kind is is_so for kind in kinds]


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0)])
def test_draws_are_float32_also_where_float64_is_enabled(alphas):
    with jax.enable_x64(True):
        image = jnp.zeros((8, 8, 3), jnp.uint8)
        assert augment.trivial_augment(jax.random.key(0), image).dtype == jnp.float32
        images = jnp.zeros((2, 8, 8, 3), jnp.float32)
        mixed, share = mixing.mix(keys(0, 2), images, images[::-1], *alphas)
        assert (mixed.dtype, share.dtype) == (jnp.float32, jnp.float32)
