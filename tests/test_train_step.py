import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_jax import host, optimizer, parallel, train_step
from cifar_jax.batches import epoch_order, scale_images
from cifar_jax.configs import RECIPES
from cifar_jax.errors import UserError
from cifar_jax.evaluate import Evaluator
from cifar_jax.optimizer import create_schedule, create_tx
from cifar_jax.parallel import replicate, select_devices
from cifar_jax.train_step import create_history, create_train_state, create_train_steps, cross_entropy

pytestmark = pytest.mark.usefixtures("direct_convolutions")


def train_epoch(config, dataset, steps_per_call=1, state=None):
    """One epoch from a fresh state: (state, history)."""
    devices = select_devices(config)
    steps = math.ceil(len(dataset.train_labels) / config.batch_size)
    state = replicate(create_train_state(config, steps) if state is None else state, devices)
    history = replicate(create_history(steps), devices)
    order = replicate(epoch_order(config.seed, 0, len(dataset.train_labels)), devices)
    data = replicate((dataset.train_images, dataset.train_labels), devices)
    arguments = (*data, order, np.int32(0), np.int32(0))
    train_steps = create_train_steps(config, devices, steps_per_call)(state, history, *arguments)
    for start in range(0, steps, steps_per_call):
        count = np.int32(min(steps_per_call, steps - start))
        state, history, _ = train_steps(state, history, *data, order, np.int32(start), count)
    return state, history


def assert_trees_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, **tolerance)


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


def test_the_gradient_is_clipped_before_the_momentum():
    config = dataclasses.replace(RECIPES["lenet5_reference"], gradient_clip=2.0, learning_rate=1.0)
    tx, parameters = create_tx(config, 1), {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    opt_state, gradients = tx.init(parameters), {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    for velocity in (1, 1 + 0.9):
        updates, opt_state = tx.update(gradients, opt_state, parameters)
        expected = [-1.2 * velocity, -1.6 * velocity]
        np.testing.assert_allclose([updates["a"][0], updates["b"][0]], expected, rtol=1e-6)


@pytest.mark.parametrize("model", ["lenet5", "all_cnn"])
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
            assert 0.6 < np.median(values) < values.max() < 1.3  # five steps of Newton and Schulz reach 1 only about


def numpy_keras(gradients, parameter):
    """Keras 2.3.1, optimizers.py, SGD.get_updates with decay and Nesterov."""
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
    # float32 reaches 7e-6 here; with the rate in the wrong place, optax.sgd(schedule), Keras' would be off by 1.7e-3.
    np.testing.assert_allclose(parameter, expected, atol=2e-5)


def test_weight_decay_is_l2():
    """A part of the gradient, so the momentum takes it up."""
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
        assert_trees_close(updates, jax.tree.map(lambda p: -0.01 * 0.1 * p, params), atol=1e-9)
        still = jax.tree.map(jnp.zeros_like, params)
        gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
        for share, expected in ((0.29, 1), (0.31, -1)):  # of the gradient before, backwards: 0.3 of it is remembered
            first, opt_state = update(gradients, tx.init(still), still)
            second, _ = update(jax.tree.map(lambda g, s=share: -s * g, gradients), opt_state, still)
            product = (first["Dense_0"]["kernel"] * second["Dense_0"]["kernel"]).sum()
            assert np.sign(product) == expected


def test_cross_entropy():
    logits, labels = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])), jnp.array([0, 1])
    np.testing.assert_allclose(cross_entropy(logits, labels), -np.log([0.7, 0.1]), rtol=1e-5)
    # Smoothing by 0.3 over three classes: the label keeps 0.8, the others get 0.1 each.
    targets, logs = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), np.asarray(logits)
    np.testing.assert_allclose(cross_entropy(logits, labels, 0.3), -(targets * logs).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("recipe", ["lenet5_reference", "all_cnn_reference"])
def test_four_devices_train_like_one(recipe, tiny_dataset):
    """Same global batches, augmentation on, dropout off, the last batch partial (and empty on some devices)."""
    config = RECIPES[recipe]
    config = dataclasses.replace(config, dropout_rates=(0.0,) * len(config.dropout_rates), learning_rate=0.01)
    # Noise: the digits' even background would leave the maximum of every pool to rounding.
    images = np.random.default_rng(0).integers(0, 256, (18, 32, 32, 3), dtype=np.uint8)
    dataset = dataclasses.replace(tiny_dataset, train_images=images, train_labels=tiny_dataset.train_labels[:18])
    config = dataclasses.replace(config, batch_size=8)
    (one, history_one), (four, history_four) = (
        train_epoch(dataclasses.replace(config, num_devices=n), dataset) for n in (1, 4)
    )
    assert int(one.step) == 3
    assert_trees_close(four.params, one.params, atol=1e-5)  # near-ties of ReLU and maximum; 1e-3 without pmean
    np.testing.assert_allclose(history_four["loss"], history_one["loss"], rtol=1e-5)
    np.testing.assert_array_equal(history_four["count"], [8, 8, 2])
    np.testing.assert_array_equal(history_four["correct"], history_one["correct"])


def test_replicas_agree(tiny_dataset, tiny_config):
    """A forgotten pmean would leave the devices with different parameters inside one array, silently."""
    state, _ = train_epoch(dataclasses.replace(tiny_config, num_devices=4), tiny_dataset)
    for leaf in jax.tree.leaves(state.params) + jax.tree.leaves(state.opt_state):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 4
        for shard in shards[1:]:
            np.testing.assert_array_equal(shard, shards[0])


def test_several_steps_in_one_call(tiny_dataset, tiny_config):
    """6 steps in calls of 4 are the same training as 6 calls."""
    (one, history_one), (many, history_many) = (train_epoch(tiny_config, tiny_dataset, k) for k in (1, 4))
    assert int(many.step) == 6
    assert_trees_close(many.params, one.params, atol=2e-6)
    assert_trees_close(history_many, history_one, rtol=1e-5)


def test_the_partial_batch_is_averaged_over_its_own_images(tiny_dataset, tiny_config):
    """18 images in batches of 16: the second step equals one with a batch of just those 2 images."""
    config = dataclasses.replace(tiny_config, dropout_rates=(0.0, 0.0), crop_padding=0, random_flip=False)
    images, labels = tiny_dataset.train_images[:18], tiny_dataset.train_labels[:18]
    whole = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels)
    state, history = train_epoch(config, whole)
    order = np.asarray(epoch_order(config.seed, 0, 18))
    first, rest = order[:16], order[16:]
    only = lambda indices: dataclasses.replace(whole, train_images=images[indices], train_labels=labels[indices])
    middle, _ = train_epoch(config, only(first))
    expected, expected_history = train_epoch(dataclasses.replace(config, batch_size=2), only(rest), state=middle)
    assert_trees_close(state.params, expected.params, atol=2e-6)
    np.testing.assert_allclose(history["loss"][1], expected_history["loss"][0], rtol=1e-5)


def test_the_partial_batch_is_mixed_with_its_own_images(tiny_dataset, tiny_config, monkeypatch):
    """With shares of 0 each image is another of its batch: the same batch, in another order."""
    monkeypatch.setattr(train_step, "mix", lambda key, images, others, *_: (others, jnp.zeros(len(images))))
    config = dataclasses.replace(tiny_config, dropout_rates=(0.0, 0.0), crop_padding=0, random_flip=False)
    images, labels = tiny_dataset.train_images[:18], tiny_dataset.train_labels[:18]
    dataset = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels)
    expected, _ = train_epoch(config, dataset)
    mixed, _ = train_epoch(dataclasses.replace(config, mixup_alpha=0.2), dataset)
    assert_trees_close(mixed.params, expected.params, atol=2e-6)


def test_a_batch_can_be_overfitted(tiny_dataset, tiny_config):
    config = dataclasses.replace(
        tiny_config, dropout_rates=(0.0, 0.0), crop_padding=0, random_flip=False, learning_rate=0.02
    )
    dataset = dataclasses.replace(
        tiny_dataset, train_images=tiny_dataset.train_images[:16], train_labels=tiny_dataset.train_labels[:16]
    )
    dataset = dataclasses.replace(
        dataset,
        train_images=np.tile(dataset.train_images, (40, 1, 1, 1)),
        train_labels=np.tile(dataset.train_labels, 40),
    )
    _, history = train_epoch(config, dataset)
    assert history["loss"][0] > 2
    assert history["loss"][-1] < 0.1


def test_seed_decides_everything(tiny_dataset, tiny_config):
    losses = [
        np.asarray(train_epoch(dataclasses.replace(tiny_config, seed=seed), tiny_dataset)[1]["loss"])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert np.abs(losses[0] - losses[2]).max() > 1e-3


@pytest.mark.parametrize("what", ["dropout", "augmentation"])
def test_randomness_differs_by_step(what, tiny_dataset, tiny_config):
    """The same images at a rate of almost nothing: only the draws can change the loss."""
    changes = {"dropout_rates": (0.0, 0.0)} if what == "augmentation" else {"crop_padding": 0, "random_flip": False}
    config = dataclasses.replace(tiny_config, batch_size=4, learning_rate=1e-12, **changes)
    images, labels = np.repeat(tiny_dataset.train_images[:1], 12, 0), np.repeat(tiny_dataset.train_labels[:1], 12)
    dataset = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels)
    losses = np.asarray(train_epoch(config, dataset)[1]["loss"])
    assert len(set(losses.tolist())) == 3


def test_dropout_differs_by_device(tiny_dataset, tiny_config):
    """The same image once on each device: with one mask for all, the mean would be the one device's loss."""
    config = dataclasses.replace(tiny_config, crop_padding=0, random_flip=False)
    losses = []
    for n in (1, 4):
        images, labels = np.repeat(tiny_dataset.train_images[:1], n, 0), np.repeat(tiny_dataset.train_labels[:1], n)
        dataset = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels)
        _, history = train_epoch(dataclasses.replace(config, batch_size=n, num_devices=n), dataset)
        losses.append(float(history["loss"][0]))
    assert abs(losses[0] - losses[1]) > 1e-5


def test_bfloat16_trains_float32_parameters(tiny_dataset, tiny_config):
    state, history = train_epoch(dataclasses.replace(tiny_config, dtype="bfloat16"), tiny_dataset)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, reference = train_epoch(tiny_config, tiny_dataset)
    np.testing.assert_allclose(history["loss"], reference["loss"], rtol=0.05)
    assert np.abs(history["loss"] - reference["loss"]).max() > 0


def test_the_average_follows_the_parameters_and_is_evaluated(tiny_dataset, tiny_config):
    config = dataclasses.replace(tiny_config, ema_decay=0.5)
    steps = [create_train_state(config, 6)]
    data = (tiny_dataset.train_images[:16], tiny_dataset.train_labels[:16])
    dataset = dataclasses.replace(tiny_dataset, train_images=data[0], train_labels=data[1])
    for _ in range(3):
        copied = jax.tree.map(lambda x: x if isinstance(x, int) else jnp.copy(x), steps[-1])
        steps.append(train_epoch(config, dataset, state=copied)[0])
    expected = jax.device_get(steps[0].params)
    for number, state in enumerate(steps[1:], 1):
        decay = min(0.5, number / (number + 10))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), expected, state.params)
    assert_trees_close(steps[-1].ema_params, expected, atol=1e-6)
    devices = select_devices(config)
    evaluate = Evaluator(config, steps[-1], tiny_dataset.test_images, tiny_dataset.test_labels, devices)
    averaged = replicate(steps[-1].replace(params=steps[-1].ema_params, ema_params=None), devices)
    plain = Evaluator(config, averaged, tiny_dataset.test_images, tiny_dataset.test_labels, devices)
    assert evaluate(steps[-1])["loss"] == pytest.approx(plain(averaged)["loss"], rel=1e-6)
    last = replicate(steps[-1].replace(ema_params=None), devices)
    assert evaluate(steps[-1])["loss"] != plain(last)["loss"]


def test_cycles_follow_the_schedule():
    first = {"schedule": "one_cycle", "warmup_fraction": 0.2, "learning_rate": 0.1}
    cycles = {"swa_fraction": 0.5, "swa_cycles": 2, "swa_learning_rate": 0.03}
    config = dataclasses.replace(RECIPES["lenet5_reference"], num_epochs=3, **first, **cycles)
    rates = [float(create_schedule(config, 6)(step)) for step in range(18)]  # two cycles of 4 steps, from step 10
    falls = [0.1 * (1 - i / 8) for i in range(8)]
    assert rates == pytest.approx([0, 0.05, *falls, *[0.03 * (1 - i / 4) for i in range(4)] * 2])
    share = optimizer.create_averaging_share(dataclasses.replace(config, ema_decay=0.5), 6)
    shares = [float(share(step)) for step in range(1, 19)]
    assert shares[:10] == pytest.approx([1 - min(0.5, step / (step + 10)) for step in range(1, 11)])
    assert shares[10:] == pytest.approx([0, 0, 0, 1 / 2, 0, 0, 0, 1 / 3])
    assert optimizer.swa_steps(RECIPES["all_cnn_fast"], 196) == (22 * 196, 2 * 196)  # whole epochs
    assert optimizer.swa_steps(RECIPES["all_cnn_fast"], 176) == (22 * 176, 2 * 176)  # with 5,000 images held out
    assert optimizer.swa_steps(RECIPES["lenet5"], 196) == (160 * 196, 8 * 196)
    too_short = dataclasses.replace(config, swa_fraction=0.1)  # 0.9 steps a cycle: none
    assert optimizer.swa_steps(too_short, 6) == (18, 0)
    assert float(create_schedule(too_short, 6)(17)) == pytest.approx(0.1 / 14)
    assert float(optimizer.create_averaging_share(too_short, 6)(18)) == 1


def test_the_average_and_the_ends_of_cycles_are_averaged(tiny_dataset, tiny_config):
    """Here cycles are epochs: after the first epoch's moving average come the parameters after the second and third."""
    config = dataclasses.replace(tiny_config, ema_decay=0.5, swa_fraction=2 / 3, swa_cycles=2, swa_learning_rate=0.03)
    states = [create_train_state(config, 6)]
    for _ in range(3):
        states.append(train_epoch(config, tiny_dataset, state=jax.tree.map(jnp.copy, states[-1]))[0])
    members = (states[1].ema_params, states[2].params, states[3].params)
    expected = jax.tree.map(lambda *x: sum(map(np.asarray, x)) / 3, *members)
    assert_trees_close(states[3].eval_params, expected, atol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("eval_batch_size", [7, 30, 100])
def test_every_example_is_evaluated_once(num_devices, eval_batch_size, tiny_dataset, tiny_config):
    config = dataclasses.replace(tiny_config, num_devices=num_devices, eval_batch_size=eval_batch_size)
    devices = select_devices(config)
    state = replicate(create_train_state(config, 6), devices)
    metrics = Evaluator(config, state, tiny_dataset.test_images, tiny_dataset.test_labels, devices)(state)
    images = tiny_dataset.test_images / np.float32(255) * 2 - 1
    logits = np.asarray(state.apply_fn({"params": jax.device_get(state.params)}, images), np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    loss = -np.log(probabilities[np.arange(30), tiny_dataset.test_labels]).mean()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["accuracy"] == (logits.argmax(-1) == tiny_dataset.test_labels).mean()


def test_evaluation_with_dropout(tiny_dataset, tiny_config):
    devices = select_devices(tiny_config)
    state = replicate(create_train_state(tiny_config, 6), devices)
    losses = [
        Evaluator(tiny_config, state, tiny_dataset.test_images, tiny_dataset.test_labels, devices, dropout)(state)[
            "loss"
        ]
        for dropout in (False, True, True)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


def test_the_step_is_traced_once(tiny_dataset, tiny_config, monkeypatch):
    traces = []
    original = train_step.cross_entropy
    monkeypatch.setattr(train_step, "cross_entropy", lambda *args: traces.append(1) or original(*args))
    train_epoch(tiny_config, tiny_dataset)
    assert len(traces) == 1


def test_select_devices(tiny_config):
    with pytest.raises(UserError, match=r"--num-devices 5: this machine has 4"):
        select_devices(dataclasses.replace(tiny_config, num_devices=5))
    with pytest.raises(UserError, match=r"multiple of 4, or --num-devices 3"):
        select_devices(dataclasses.replace(tiny_config, batch_size=15, num_devices=4))


def test_freed_memory_is_kept_where_the_library_can(monkeypatch):
    calls = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: library)
    host.keep_memory()
    assert calls == [(-4, 0), (-1, -1), (-2, 2**28)]  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: object())
    host.keep_memory()


@pytest.mark.parametrize(("batch_size", "num_devices", "limited"), [(256, 1, True), (512, 1, False), (512, 2, True)])
def test_temporary_arrays_come_in_blocks_that_are_kept(tiny_config, batch_size, num_devices, limited):
    """On the CPU alone, and only where no array is larger: XLA would warn of it."""
    options = host.compiler_options(tiny_config, batch_size, jax.local_devices()[:num_devices])
    assert options == ({"xla_multiheap_size_constraint_per_heap": 60 * 2**20} if limited else {})
    assert not host.compiler_options(tiny_config, batch_size, [types.SimpleNamespace(platform="gpu")] * num_devices)


@pytest.mark.parametrize(("batch_size", "count"), [(4, 1), (16, 1), (31, 1), (32, 2), (50, 2), (64, 4), (129, 3)])
def test_cpu_cores_share_large_batches_alone(tiny_config, batch_size, count):
    config = dataclasses.replace(tiny_config, batch_size=batch_size, num_devices=None)
    assert len(select_devices(config)) == count


def test_steps_a_call():
    """A loop makes All-CNN's convolutions on the CPU several times slower; elsewhere it saves the dispatch."""
    cpu, gpu = ([types.SimpleNamespace(platform=platform)] for platform in ("cpu", "gpu"))
    assert [parallel.default_steps_per_call(model, cpu) for model in ("all_cnn", "lenet5")] == [1, 16]
    assert parallel.default_steps_per_call("all_cnn", gpu) == 1000


def test_every_core_becomes_a_device_unless_the_user_says_otherwise(monkeypatch):
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *arguments: updates.append(arguments))
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    host.use_cpu_cores()
    assert updates == [("jax_num_cpu_devices", 3)]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    host.use_cpu_cores()
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    host.use_cpu_cores()
    assert len(updates) == 1


def test_an_accelerators_devices_are_all_used(monkeypatch, tiny_config):
    devices = [types.SimpleNamespace(platform="gpu")] * 4
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert select_devices(dataclasses.replace(tiny_config, num_devices=None)) == devices
    with pytest.raises(UserError, match=r"multiple of 4, or --num-devices 3"):
        select_devices(dataclasses.replace(tiny_config, batch_size=15, num_devices=None))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_sam_steps_by_the_gradient_up_the_slope(num_devices, tiny_dataset, tiny_config):
    """One step on one batch against the formula of arXiv:2010.01412, written out."""
    config = dataclasses.replace(
        tiny_config,
        num_devices=num_devices,
        sam_rho=0.5,
        dropout_rates=(0.0, 0.0),
        crop_padding=0,
        random_flip=False,
        nesterov=False,
        momentum=0.0,
    )
    images, labels = tiny_dataset.train_images[:16], tiny_dataset.train_labels[:16]
    dataset = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels)
    start = create_train_state(config, 1)
    scaled = scale_images(jnp.asarray(images), config.input_scaling)
    loss = lambda params: cross_entropy(start.apply_fn({"params": params}, scaled), jnp.asarray(labels)).mean()
    params = jax.tree.map(jnp.copy, start.params)
    gradient = jax.jit(jax.grad(loss))
    slope = gradient(params)
    ascent = jax.tree.map(lambda p, g: p + 0.5 * g / optax.tree.norm(slope), params, slope)
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient(ascent))
    state, _ = train_epoch(config, dataset, state=start)
    assert_trees_close(state.params, expected, atol=1e-5)
    plain = jax.tree.map(lambda p, g: p - 0.05 * g, params, slope)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain))) > 1e-3


def test_trivial_augment_works_on_the_images_before_they_are_scaled(tiny_dataset, tiny_config, monkeypatch):
    """With the operation replaced by one that turns every image white, the loss is that of white images."""
    config = dataclasses.replace(tiny_config, trivial_augment=True, dropout_rates=(0.0, 0.0), crop_padding=0)
    monkeypatch.setattr(train_step, "trivial_augment", lambda key, image: jnp.full(image.shape, 255.0))
    losses = train_epoch(config, tiny_dataset)[1]["loss"]
    white = dataclasses.replace(tiny_dataset, train_images=np.full_like(tiny_dataset.train_images, 255))
    expected = train_epoch(dataclasses.replace(config, trivial_augment=False), white)[1]["loss"]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    unchanged = train_epoch(dataclasses.replace(config, trivial_augment=False), tiny_dataset)[1]["loss"]
    assert np.abs(losses - unchanged).max() > 1e-2


def test_lsuv_scales_by_the_images_of_the_recipe(tiny_dataset, tiny_config):
    config = dataclasses.replace(tiny_config, initializer="lsuv", input_scaling="unit", ema_decay=0.9)
    state = create_train_state(config, 1, tiny_dataset.train_images)
    images = jnp.asarray(tiny_dataset.train_images, jnp.float32) / 255
    assert float(state.apply_fn({"params": state.params}, images).std()) == pytest.approx(1, rel=1e-4)
    assert_trees_close(state.ema_params, state.params)


def test_alternating_flip_goes_by_the_image_and_the_epoch(tiny_dataset, tiny_config, monkeypatch):
    """With one rule for all, mirrored in odd epochs, the losses are those of the images as they are, or mirrored."""
    monkeypatch.setattr(train_step, "is_mirrored", lambda _, index, epoch: jnp.full(index.shape, epoch % 2 == 1))
    plain = dataclasses.replace(tiny_config, random_flip=False, dropout_rates=(0.0, 0.0), crop_padding=0)
    turned = dataclasses.replace(tiny_dataset, train_images=tiny_dataset.train_images[:, :, ::-1])
    steps = math.ceil(len(tiny_dataset.train_images) / plain.batch_size)

    def losses(config, dataset, epoch):
        state = create_train_state(config, steps).replace(step=jnp.int32(epoch * steps))
        return np.asarray(train_epoch(config, dataset, state=state)[1]["loss"])

    as_they_are, mirrored = losses(plain, tiny_dataset, 0), losses(plain, turned, 0)  # nothing in them is random
    for epoch, expected, other in [(0, as_they_are, mirrored), (1, mirrored, as_they_are), (2, as_they_are, mirrored)]:
        result = losses(dataclasses.replace(plain, alternating_flip=True), tiny_dataset, epoch)
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        assert np.abs(result - other).max() > 1e-4


def test_a_platform_that_is_not_there(monkeypatch):
    def absent():
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", absent)
    monkeypatch.setattr(train_step, "keep_memory", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="unset JAX_PLATFORMS=cuda"):
        host.prepare_cpu()


def first_step(config, dataset, logits, mask=None, image_size=32, epoch=0, index=None):
    """A train_step and an eval_step on a whole dataset, with a network that answers `logits` whatever it is given.

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
    on_one_device = lambda step: jax.vmap(step, (None, 0), axis_name=parallel.AXIS)
    batch = jax.tree.map(lambda x: x[None], batch)
    _, metrics = on_one_device(train_step.create_train_step(config, image_size))(state, batch)
    jax.effects_barrier()
    (images,) = {array.tobytes(): array for array in seen}.values()  # the loss and its gradient are of the same
    evaluated = on_one_device(train_step.create_eval_step(config))(state, batch)
    return images, *({name: value[0] for name, value in result.items()} for result in (metrics, evaluated))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture
def plain_config(tiny_config):
    """Of 4 images in [0, 1], without anything random."""
    return dataclasses.replace(
        tiny_config, batch_size=4, input_scaling="unit", dropout_rates=(0.0, 0.0), crop_padding=0, random_flip=False
    )


def squares(tiny_dataset, *values):
    """A dataset of images of one colour each, with the labels 0, 1, …"""
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
    """Each of four images, of 0, 50, 150 and 250, with the one at its place from the end."""
    config = dataclasses.replace(plain_config, **{kind: 1.0})
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    images, trained, _ = first_step(config, squares(tiny_dataset, 0, 50, 150, 250), logits)
    own, other = np.array([0, 50, 150, 250]) / 255, np.array([250, 150, 50, 0]) / 255
    share = (images.mean((1, 2, 3)) - other) / (own - other)
    assert ((share > 0.001) & (share < 0.999)).any()
    is_even = np.ptp(images, axis=(1, 2, 3)) < 1e-5
    np.testing.assert_array_equal(is_even, kind == "mixup_alpha" or (share < 1e-5) | (share > 1 - 1e-5))
    logs, labels = log_softmax(logits), np.arange(4)
    expected = -(share * logs[labels, labels] + (1 - share) * logs[labels, 3 - labels]).mean()
    assert float(trained["loss"]) == pytest.approx(expected, rel=1e-4)


def test_smaller_images_are_antialiased(plain_config, tiny_dataset):
    """Lines of 0 and 255 in turn become grey; single pixels, taken as they are, would be black or white."""
    lines = np.zeros((1, 32, 32, 3), np.uint8)
    lines[:, ::2] = 255
    dataset = dataclasses.replace(squares(tiny_dataset, 0), train_images=lines)
    images, *_ = first_step(plain_config, dataset, np.zeros((1, 10), np.float32), image_size=16)
    assert images.shape == (1, 16, 16, 3)
    np.testing.assert_allclose(images[:, 1:-1], 0.5, atol=1e-5)


def test_the_loop_trains_on_the_size_that_it_is_made_for(tiny_config, tiny_dataset):
    config = dataclasses.replace(tiny_config, model="all_cnn", dropout_rates=(0.0,) * 3)
    state, shapes = create_train_state(config, 6), []
    apply_fn = lambda variables, images, **_: shapes.append(images.shape) or jnp.zeros((16, 10)) + 0 * images.sum()
    devices = select_devices(config)
    order = np.arange(90, dtype=np.int32)
    state, history, data = replicate(
        (state.replace(apply_fn=apply_fn), create_history(6), (tiny_dataset.train_images, tiny_dataset.train_labels)),
        devices,
    )
    create_train_steps(config, devices, 1, 24)(state, history, *data, order, np.int32(0), np.int32(0))
    assert set(shapes) == {(16, 24, 24, 3)}


def test_each_image_is_seen_both_ways_in_two_epochs(plain_config, tiny_dataset):
    """By its place in the dataset, not in the batch, and not by its label."""
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
