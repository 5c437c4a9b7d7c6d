import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import assert_trees_close

from cifar_jax.configs import RECIPES
from cifar_jax.optimizer import create_averaging_share, create_schedule, create_tx, swa_steps
from cifar_jax.parallel import AXIS
from cifar_jax.train_step import create_train_state


@pytest.mark.parametrize(("step", "rate"), [(0, 0.01), (1, 0.0099995000), (782, 0.0096237128), (156_400, 0.0011337868)])
def test_keras_schedule(step, rate):
    schedule = create_schedule(RECIPES["all_cnn_reference"], 782)
    np.testing.assert_allclose(schedule(jnp.int32(step)), rate, rtol=1e-6)


def test_pytorch_schedule_is_constant():
    schedule = create_schedule(RECIPES["lenet5_reference"], 12_500)
    assert [float(schedule(step)) for step in (0, 1, 782, 156_400)] == [pytest.approx(1e-4)] * 4


def test_cosine_schedule_warms_up_and_ends_at_zero():
    config = dataclasses.replace(
        RECIPES["lenet5_reference"], num_epochs=10, schedule="cosine", warmup_fraction=0.2, learning_rate=0.1
    )
    schedule = create_schedule(config, 100)
    rates = [float(schedule(step)) for step in (0, 100, 200, 400, 600, 1000)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.05 + 0.05 * 2**-0.5, 0.05, 0], atol=1e-7)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_warm_up_leaves_a_step_to_the_schedule(schedule):
    config = dataclasses.replace(RECIPES["lenet5_reference"], num_epochs=1, schedule=schedule, warmup_fraction=0.99)
    rates = [float(create_schedule(config, 45)(step)) for step in (0, 44, 45)]
    np.testing.assert_allclose(rates, [0, config.learning_rate, 0], atol=1e-7)


def test_one_cycle_schedule_rises_and_falls_in_lines():
    config = dataclasses.replace(
        RECIPES["lenet5_reference"], num_epochs=10, schedule="one_cycle", warmup_fraction=0.2, learning_rate=0.1
    )
    rates = [float(create_schedule(config, 100)(step)) for step in (0, 100, 200, 600, 1000)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.05, 0], atol=1e-7)


def test_one_cycle_without_warm_up_begins_at_its_peak():
    config = dataclasses.replace(
        RECIPES["lenet5_reference"], num_epochs=10, schedule="one_cycle", warmup_fraction=0.0, learning_rate=0.1
    )
    rates = [float(create_schedule(config, 100)(step)) for step in (0, 1, 1000)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0], atol=2e-4)


def test_cycles_follow_the_schedule():
    first = {"schedule": "one_cycle", "warmup_fraction": 0.2, "learning_rate": 0.1}
    cycles = {"swa_fraction": 0.5, "swa_cycles": 2, "swa_learning_rate": 0.03}
    config = dataclasses.replace(RECIPES["lenet5_reference"], num_epochs=3, **first, **cycles)
    rates = [float(create_schedule(config, 6)(step)) for step in range(18)]  # two cycles of 4 steps, from step 10
    falls = [0.1 * (1 - i / 8) for i in range(8)]
    assert rates == pytest.approx([0, 0.05, *falls, *[0.03 * (1 - i / 4) for i in range(4)] * 2])
    share = create_averaging_share(dataclasses.replace(config, ema_decay=0.5), 6)
    shares = [float(share(step)) for step in range(1, 19)]
    assert shares[:10] == pytest.approx([1 - min(0.5, step / (step + 10)) for step in range(1, 11)])
    assert shares[10:] == pytest.approx([0, 0, 0, 1 / 2, 0, 0, 0, 1 / 3])
    assert swa_steps(RECIPES["all_cnn"], 196) == (22 * 196, 2 * 196)  # cycles of whole epochs
    assert swa_steps(RECIPES["all_cnn"], 176) == (22 * 176, 2 * 176)  # with 5,000 images held out
    assert swa_steps(RECIPES["lenet5"], 196) == (160 * 196, 8 * 196)
    too_short = dataclasses.replace(config, swa_fraction=0.1)  # 0.9 steps a cycle: none
    assert swa_steps(too_short, 6) == (18, 0)
    assert float(create_schedule(too_short, 6)(17)) == pytest.approx(0.1 / 14)
    assert float(create_averaging_share(too_short, 6)(18)) == 1


def test_the_gradient_is_clipped_before_the_momentum():
    config = dataclasses.replace(RECIPES["lenet5_reference"], gradient_clip=2.0, learning_rate=1.0)
    tx, parameters = create_tx(config, 1), {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    opt_state, gradients = tx.init(parameters), {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    for velocity in (1, 1 + 0.9):
        updates, opt_state = tx.update(gradients, opt_state, parameters)
        expected = [-1.2 * velocity, -1.6 * velocity]
        np.testing.assert_allclose([updates["a"][0], updates["b"][0]], expected, rtol=1e-6)


@pytest.mark.parametrize("model", ["lenet5", pytest.param("all_cnn", marks=pytest.mark.long)])
def test_muon_orthogonalises_all_kernels_but_the_last(model):
    recipe = dataclasses.replace(
        RECIPES[f"{model}_reference"],
        optimizer="muon",
        nesterov=False,
        learning_rate=0.01,
        schedule="constant",
        lr_decay=0.0,
    )
    tx, rng = create_tx(recipe, 1), np.random.default_rng(0)
    params = create_train_state(RECIPES[f"{model}_reference"], 1).params
    gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    with jax.numpy_dtype_promotion("standard"):  # optax takes powers of an integer
        updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(gradients, params)
    last = {"lenet5": "Dense_2", "all_cnn": "Conv_8"}[model]
    for layer, tensors in updates.items():
        np.testing.assert_allclose(np.abs(tensors["bias"]), 0.01, rtol=1e-3)  # Adam's first step
        matrix = np.asarray(tensors["kernel"]).reshape(-1, tensors["kernel"].shape[-1])
        if layer == last:
            np.testing.assert_allclose(np.abs(matrix), 0.01, rtol=1e-3)
        else:
            values = np.linalg.svd(matrix, compute_uv=False) / (0.01 * 0.2 * np.sqrt(max(matrix.shape)))
            assert 0.6 < np.median(values) < values.max() < 1.3  # five Newton–Schulz steps reach 1 roughly


def numpy_keras(gradients, parameter):
    """SGD.get_updates of Keras 2.3.1 (optimizers.py), with decay and Nesterov momentum."""
    velocity = np.zeros_like(parameter)
    for t, gradient in enumerate(gradients):
        rate = 0.01 / (1 + 5e-5 * t)
        velocity = 0.9 * velocity - rate * gradient
        parameter = parameter + 0.9 * velocity - rate * gradient
    return parameter


def numpy_pytorch(gradients, parameter):
    """torch.optim.SGD with momentum and constant rate."""
    buffer = np.zeros_like(parameter)
    for gradient in gradients:
        buffer = 0.9 * buffer + gradient
        parameter = parameter - 1e-4 * buffer
    return parameter


@pytest.mark.parametrize(
    ("recipe", "steps_per_epoch", "original"),
    [("all_cnn_reference", 782, numpy_keras), ("lenet5_reference", 12_500, numpy_pytorch)],
)
def test_the_optimizers_are_the_originals(recipe, steps_per_epoch, original):
    gradients = np.random.default_rng(0).normal(size=(2000, 5)).astype(np.float32)
    tx = create_tx(RECIPES[recipe], steps_per_epoch)

    def step(carry, gradient):
        parameter, opt_state = carry
        updates, opt_state = tx.update(gradient, opt_state, parameter)
        return (optax.apply_updates(parameter, updates), opt_state), None

    start = jnp.ones(5)
    (parameter, _), _ = jax.lax.scan(step, (start, tx.init(start)), gradients)
    expected = original(gradients.astype(np.float64), np.ones(5))
    # The error is 7e-6 in float32. With the rate in the wrong place, optax.sgd(schedule), it would be 1.7e-3.
    np.testing.assert_allclose(parameter, expected, atol=2e-5)


def test_weight_decay_is_l2():
    """Weight decay is part of the gradient, so it enters the momentum."""
    config = dataclasses.replace(RECIPES["lenet5_reference"], weight_decay=0.1, momentum=0.9, learning_rate=0.5)
    tx, parameter = create_tx(config, 1), jnp.array([2.0])
    opt_state = tx.init(parameter)
    for gradient in (0.2, 0.9 * 0.2 + 0.19):
        updates, opt_state = tx.update(jnp.zeros(1), opt_state, parameter)
        np.testing.assert_allclose(updates, [-0.5 * gradient], rtol=1e-6)
        parameter = optax.apply_updates(parameter, updates)


def test_muon_decays_all_parameters_by_the_rate_and_remembers_gradients():
    config = dataclasses.replace(
        RECIPES["lenet5_reference"],
        optimizer="muon",
        learning_rate=0.01,
        weight_decay=0.1,
        momentum=0.3,
        nesterov=False,
    )
    tx, params = create_tx(config, 1), create_train_state(config, 1).params
    with jax.numpy_dtype_promotion("standard"):  # optax takes powers of an integer
        update = jax.jit(tx.update)
        updates, _ = update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        assert_trees_close(updates, jax.tree.map(lambda p: -0.01 * 0.1 * p, params), 1e-6)
        still = jax.tree.map(jnp.zeros_like, params)
        gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
        for share, expected in ((0.29, 1), (0.31, -1)):  # reversed share; momentum keeps 0.3
            first, opt_state = update(gradients, tx.init(still), still)
            second, _ = update(jax.tree.map(lambda g, s=share: -s * g, gradients), opt_state, still)
            product = (first["Dense_0"]["kernel"] * second["Dense_0"]["kernel"]).sum()
            assert np.sign(product) == expected


def test_kernels_are_normalised_beside_whitening_filters():
    settings = {"normalization": "batch", "normalize_kernels": True, "whitening": True}
    config = dataclasses.replace(RECIPES["all_cnn_reference"], **settings)
    tx, params = create_tx(config, 1), create_train_state(config, 1).params
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    kernels = {name: params[name]["kernel"] + updates[name]["kernel"] for name in updates}
    assert not np.asarray(updates["Conv_0"]["kernel"][..., :54]).any()
    assert float(jnp.linalg.norm(kernels["Conv_0"][..., 54:])) == pytest.approx(42**0.5)
    assert float(jnp.linalg.norm(kernels["Conv_1"])) == pytest.approx(96**0.5)


def test_sam_climbs_without_frozen_parameters():
    config = dataclasses.replace(RECIPES["lenet5_reference"], sam_rho=0.5, whitening=True)
    tx, params = create_tx(config, 1), create_train_state(config, 1).params
    gradients = jax.tree.map(jnp.ones_like, params)
    climbed = []

    def update(_):
        grad_fn = lambda params, _: climbed.append(params) or gradients
        tx.update(gradients, tx.init(params), params, grad_fn=grad_fn)
        return climbed[0]

    with jax.numpy_dtype_promotion("standard"):
        seen = jax.vmap(update, axis_name=AXIS)(jnp.zeros(1))
    for layer, moves in (("Conv_0", False), ("Conv_1", True)):
        change = np.abs(seen[layer]["kernel"][0] - params[layer]["kernel"]).max()
        assert (change > 1e-4) == moves, layer
