import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import assert_trees_close

from cifar_jax import parallel
from cifar_jax.train_step import create_eval_step, create_train_state, create_train_step, cross_entropy

pytestmark = pytest.mark.usefixtures("direct_convolutions")


def test_cross_entropy():
    logits, labels = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])), jnp.array([0, 1])
    np.testing.assert_allclose(cross_entropy(logits, labels), -np.log([0.7, 0.1]), rtol=1e-5)
    # Smoothing by 0.3 over three classes leaves 0.8 for the label and gives 0.1 to each other class.
    targets, logs = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), np.asarray(logits)
    np.testing.assert_allclose(cross_entropy(logits, labels, 0.3), -(targets * logs).sum(-1), rtol=1e-5)


def test_lsuv_scales_by_the_images_of_the_recipe(tiny_dataset, tiny_config):
    config = dataclasses.replace(tiny_config, initializer="lsuv", input_scaling="unit", ema_decay=0.9)
    state = create_train_state(config, 1, tiny_dataset.train_images)
    images = jnp.asarray(tiny_dataset.train_images, jnp.float32) / 255
    assert float(state.apply_fn({"params": state.params}, images).std()) == pytest.approx(1, rel=1e-4)
    assert_trees_close(state.ema_params, state.params, 0)


def first_step(config, dataset, logits, mask=None, image_size=32, epoch=0, index=None):
    """A train_step and an eval_step on a whole dataset, with a network that returns `logits` for any input.

    Returns: the images that it was given in training, scaled; the metrics of both steps.
    """
    seen, size = [], len(dataset.train_labels)

    def apply_fn(variables, images, **_):
        jax.debug.callback(lambda images: seen.append(np.asarray(images)), images)
        return jnp.asarray(logits) + 0 * images.sum()

    batch = {"image": dataset.train_images, "label": dataset.train_labels, "start": np.int32(0)}
    batch |= {"mask": np.ones(size, np.float32) if mask is None else mask, "epoch": np.int32(epoch)}
    batch |= {"index": np.arange(size, dtype=np.int32) if index is None else index}
    state = create_train_state(config, 1).replace(apply_fn=apply_fn, step=jnp.int32(epoch))
    on_one_device = lambda step: jax.jit(jax.vmap(step, (None, 0), axis_name=parallel.AXIS))
    batch = jax.tree.map(lambda x: x[None], batch)
    _, metrics = on_one_device(create_train_step(config, image_size))(state, batch)
    jax.effects_barrier()
    (images,) = {array.tobytes(): array for array in seen}.values()  # loss and gradient see the same images
    evaluated = on_one_device(create_eval_step(config))(state, batch)
    return images, *({name: value[0] for name, value in result.items()} for result in (metrics, evaluated))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture
def plain_config(tiny_config):
    """A recipe for 4 images in [0, 1], without randomness."""
    return dataclasses.replace(
        tiny_config, batch_size=4, input_scaling="unit", dropout_rates=(0.0, 0.0), crop_padding=0, random_flip=False
    )


def squares(tiny_dataset, *values):
    """A dataset of single-coloured images with the labels 0, 1, …"""
    images = np.broadcast_to(np.array(values, np.uint8).reshape(-1, 1, 1, 1), (len(values), 32, 32, 3))
    return dataclasses.replace(tiny_dataset, train_images=images, train_labels=np.arange(len(values), dtype=np.int32))


def test_labels_are_smoothed_in_training_alone(plain_config, tiny_dataset):
    config = dataclasses.replace(plain_config, label_smoothing=0.2)
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    _, trained, evaluated = first_step(config, squares(tiny_dataset, 0, 1, 2, 3), logits)
    logs = log_softmax(logits)
    own = logs[range(4), range(4)]
    assert float(trained["loss"]) == pytest.approx(-(0.8 * own + 0.2 * logs.mean(-1)).mean(), rel=1e-5)
    assert float(evaluated["loss"]) == pytest.approx(-own.sum(), rel=1e-5)


def test_padding_does_not_count_as_right(plain_config, tiny_dataset):
    logits, mask = np.eye(10, dtype=np.float32)[:4], np.array([1, 1, 0, 0], np.float32)
    for metrics in first_step(plain_config, squares(tiny_dataset, 0, 1, 2, 3), logits, mask)[1:]:
        assert (metrics["correct"], metrics["count"]) == (2, 2)


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_images_and_labels_are_mixed_by_the_same_share(kind, plain_config, tiny_dataset):
    """Each of four images, with pixels 0, 50, 150 and 250, is mixed with its neighbour."""
    config = dataclasses.replace(plain_config, **{kind: 1.0})
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    images, trained, _ = first_step(config, squares(tiny_dataset, 0, 50, 150, 250), logits)
    own, other = np.array([0, 50, 150, 250]) / 255, np.array([50, 0, 250, 150]) / 255
    share = (images.mean((1, 2, 3)) - other) / (own - other)
    assert ((share > 0.001) & (share < 0.999)).any()
    is_even = np.ptp(images, axis=(1, 2, 3)) < 1e-5
    np.testing.assert_array_equal(is_even, kind == "mixup_alpha" or (share < 1e-5) | (share > 1 - 1e-5))
    logs, labels = log_softmax(logits), np.arange(4)
    expected = -(share * logs[labels, labels] + (1 - share) * logs[labels, labels ^ 1]).mean()
    assert float(trained["loss"]) == pytest.approx(expected, rel=1e-4)


def test_smaller_images_are_antialiased(plain_config, tiny_dataset):
    """Alternating lines of 0 and 255 become grey. Picking single pixels would give black or white."""
    lines = np.zeros((1, 32, 32, 3), np.uint8)
    lines[:, ::2] = 255
    dataset = dataclasses.replace(squares(tiny_dataset, 0), train_images=lines)
    images, *_ = first_step(plain_config, dataset, np.zeros((1, 10), np.float32), image_size=16)
    assert images.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(images[:, 1:-1], 0.5, atol=1e-5)


def test_each_image_is_seen_both_ways_in_two_epochs(plain_config, tiny_dataset):
    """Flips depend on the image's place in the dataset, not on its place in the batch or its label."""
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8).reshape(1, 1, 32, 1), (64, 32, 32, 3))
    dataset = dataclasses.replace(tiny_dataset, train_images=ramp, train_labels=np.zeros(64, np.int32))
    config = dataclasses.replace(plain_config, batch_size=64, alternating_flip=True)
    order, logits = np.random.default_rng(0).permutation(64).astype(np.int32), np.zeros((64, 10), np.float32)

    def is_mirrored(epoch, index):
        images, *_ = first_step(config, dataset, logits, epoch=epoch, index=index)
        return images[:, 0, 0, 0] > images[:, 0, -1, 0]

    first = is_mirrored(0, np.arange(64, dtype=np.int32))
    assert 16 < first.sum() < 48
    np.testing.assert_array_equal(is_mirrored(1, np.arange(64, dtype=np.int32)), ~first)
    np.testing.assert_array_equal(is_mirrored(2, order), first[order])
