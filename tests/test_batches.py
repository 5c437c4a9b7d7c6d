import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.batches import epoch_order, pixel_statistics, scale_images, take_batch
from cifar_jax.datasets import DATASETS


def test_scale_images():
    images = jnp.asarray([0, 255, 51], jnp.uint8).reshape(1, 1, 1, 3)
    scaled = lambda *scaling: scale_images(images, *pixel_statistics(*scaling)).ravel()
    for dataset in DATASETS:
        np.testing.assert_allclose(scaled("unit", dataset), [0, 1, 0.2], rtol=1e-6)
        np.testing.assert_allclose(scaled("symmetric", dataset), [-1, 1, -0.6], rtol=1e-6)
    expected = [(0 - 0.4914) / 0.2470, (1 - 0.4822) / 0.2435, (0.2 - 0.4465) / 0.2616]
    np.testing.assert_allclose(scaled("standardized", "cifar10"), expected, rtol=1e-6)
    np.testing.assert_allclose(scaled("standardized", "digits"), expected, rtol=1e-6)
    expected = [(0 - 0.5071) / 0.2673, (1 - 0.4865) / 0.2564, (0.2 - 0.4409) / 0.2762]
    np.testing.assert_allclose(scaled("standardized", "cifar100"), expected, rtol=1e-6)


def test_epoch_order_is_a_function_of_seed_and_epoch():
    orders = [np.asarray(epoch_order(seed, epoch, 1000)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (orders[0] != orders[2]).mean() > 0.9
    np.testing.assert_array_equal(epoch_order(0, 1, 1000), orders[1])


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_batches_cover_the_order_once_whatever_the_number_of_devices(num_devices):
    """The reference recipe in small: 130 images in batches of 64, the last with 2."""
    images = jnp.arange(130, dtype=jnp.uint8).reshape(130, 1, 1, 1)
    order, size = epoch_order(0, 0, 130), 64 // num_devices
    seen = []
    for step in range(3):
        slices = [
            take_batch(images, jnp.arange(130), order, jnp.int32(step * 64 + device * size), size)
            for device in range(num_devices)
        ]
        batch = jax.tree.map(lambda *parts: np.concatenate(parts), *slices)
        assert batch["image"].shape == (64, 1, 1, 1)
        np.testing.assert_array_equal(batch["image"].ravel(), batch["label"])
        np.testing.assert_array_equal(batch["index"], batch["label"])
        assert batch["mask"].sum() == (64 if step < 2 else 2)
        seen.append(batch["label"][batch["mask"] == 1])
    np.testing.assert_array_equal(np.concatenate(seen), order)
