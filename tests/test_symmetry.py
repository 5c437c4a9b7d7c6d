import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import assert_trees_close, first_images, train_epoch

from cifar_jax.models import MODELS, LeNet5
from cifar_jax.optimizer import create_tx
from cifar_jax.parallel import AXIS
from cifar_jax.symmetry import mirror, symmetric_part, symmetric_start
from cifar_jax.train_step import create_train_state

pytestmark = pytest.mark.usefixtures("direct_convolutions", "no_figures")
SIDES = {"lenet5": 32, "all_cnn": 31}  # image sizes for which the pools skip no column


@pytest.fixture(params=list(SIDES), scope="module")
def network(request):
    """Returns (apply, params, images, layers) with small random images and nonzero biases."""
    model, side = MODELS[request.param](), SIDES[request.param]
    images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    shifted = {name: layer | {"bias": layer["bias"] + jnp.linspace(0, 0.1, len(layer["bias"]))}
               for name, layer in params.items()}  # fmt: skip
    return jax.jit(lambda params, images: model.apply({"params": params}, images)), shifted, images, model.LAYERS


def test_mirrored_weights_see_the_mirror_image(network):
    apply, params, images, layers = network
    ours = apply(mirror(params, layers), images)
    assert_trees_close(ours, apply(params, images[:, :, ::-1]), 1e-4)
    assert np.abs(ours - apply(params, images)).max() > 1e-3
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(mirror(mirror(params, layers), layers)), jax.device_get(params)
    )


def test_symmetric_weights_see_both_alike_and_keep_their_variance(network):
    apply, params, images, layers = network
    start = symmetric_start(params, layers)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(mirror(start, layers)), jax.device_get(start))
    assert_trees_close(apply(start, images), apply(start, images[:, :, ::-1]), 1e-4)
    for name, layer in params.items():
        assert float(start[name]["kernel"].std()) == pytest.approx(float(layer["kernel"].std()), rel=0.1)


def test_a_symmetric_gradient_is_the_mean_over_both_images(network):
    apply, params, images, layers = network
    gradient = jax.jit(jax.grad(lambda params, images: (apply(params, images) ** 2).sum()))
    start = symmetric_start(params, layers)
    plain, mirrored = gradient(start, images), gradient(start, images[:, :, ::-1])
    both = jax.tree.map(lambda a, b: (a + b) / 2, plain, mirrored)
    assert_trees_close(symmetric_part(plain, layers), both, 1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": "sgd", "sam_rho": 0.05}, marks=pytest.mark.long),
        {"optimizer": "muon", "ema_decay": 0.9},
    ],
)
def test_training_keeps_the_symmetry(plain_config, tiny_dataset, changes):
    config = dataclasses.replace(plain_config, num_epochs=1, mirror_symmetry=True, initializer="lsuv", **changes)
    config = dataclasses.replace(config, weight_decay=0.1, gradient_clip=10.0)
    with jax.numpy_dtype_promotion("standard"):  # optax takes powers of an integer
        state, _ = train_epoch(config, first_images(tiny_dataset, 32))
    state = jax.device_get(state)
    start = create_train_state(config, 1, tiny_dataset.train_images[:32]).params
    for trained in (state.params, state.eval_params):
        assert np.abs(trained["Dense_0"]["kernel"] - start["Dense_0"]["kernel"]).max() > 1e-3
        assert_trees_close(mirror(trained, LeNet5.LAYERS), trained, 1e-4)


def test_sam_climbs_to_symmetric_weights(tiny_config):
    config = dataclasses.replace(tiny_config, mirror_symmetry=True, sam_rho=0.05)
    params = create_train_state(config, 1).params
    tx = create_tx(config, 1)
    seen = []
    gradients = jax.tree.map(lambda x: jnp.linspace(0, 1, x.size).reshape(x.shape), params)
    grad_fn = lambda params, _: seen.append(params) or gradients

    def update(_):
        return tx.update(gradients, tx.init(params), params, grad_fn=grad_fn)[0], seen[0]

    _, climbed = jax.jit(jax.vmap(update, axis_name=AXIS))(jnp.zeros(1))
    climbed = jax.tree.map(lambda x: x[0], climbed)
    assert_trees_close(mirror(climbed, LeNet5.LAYERS), climbed, 1e-5)
    assert np.abs(climbed["Dense_0"]["kernel"] - params["Dense_0"]["kernel"]).max() > 0
