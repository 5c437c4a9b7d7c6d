import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import parallel
from cifar_jax.ops import blocks
from cifar_jax.ops.blocks import infer
from cifar_jax.train_step import create_eval_step, create_train_state

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)


def network(images):
    """uint8 [N, 2, 2, 3] → float32 [N, 3]. Images of zeros are no special case."""
    return jnp.cos(images.reshape(images.shape[0], 12).astype(jnp.float32) @ KERNEL + 1)


def random_images(count):
    return np.random.default_rng(1).integers(256, size=(count, 2, 2, 3), dtype=np.uint8)


def lowered(function, images, platform):
    return jax.jit(function).trace(images).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("count", "block"), [(0, 0), (1, 1), (8, 8), (9, 5), (20, 7), (32, 8)])
@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function])
def test_blocks_are_of_equal_size_and_compute_the_same(count, block, wrap):
    images, seen = random_images(count), []

    def recorded(images):
        seen.append(len(images))
        return network(images)

    np.testing.assert_allclose(wrap(lambda images: infer(recorded, images))(images), network(images), rtol=1e-6)
    assert min(seen) == block


def test_the_gradient_through_blocks():
    images = random_images(20).astype(np.float32) / 255
    gradient = jax.grad(lambda images: infer(network, images).sum())(images)
    np.testing.assert_allclose(gradient, jax.grad(lambda images: network(images).sum())(images), rtol=1e-5, atol=1e-5)


def test_other_platforms_and_symbolic_sizes_have_no_blocks():
    ours = lambda images: infer(network, images)
    for platform in ("cuda", "tpu"):
        assert "while" not in lowered(ours, random_images(20), platform)
    assert "while" in lowered(ours, random_images(20), "cpu")
    symbolic = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), 2, 2, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(ours))(symbolic)
    np.testing.assert_allclose(exported.call(random_images(20)), network(random_images(20)), rtol=1e-6)


@pytest.mark.parametrize("dropout", [False, True])
def test_an_evaluation_is_in_blocks_unless_dropout_numbers_the_images(dropout, tiny_config, tiny_dataset):
    state = create_train_state(tiny_config, 1)
    count = 2 * blocks.SIZE
    batch = {"image": tiny_dataset.train_images[:count], "label": tiny_dataset.train_labels[:count]}
    batch |= {"mask": np.ones(count, np.float32), "start": np.int32(0)}
    step = jax.vmap(create_eval_step(tiny_config, dropout), (None, 0), axis_name=parallel.AXIS)
    text = lowered(lambda batch: step(state, batch), jax.tree.map(lambda x: x[None], batch), "cpu")
    assert (f"tensor<1x{blocks.SIZE}x32x32x3xf32>" in text) != dropout
