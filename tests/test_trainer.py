import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import assert_trees_close, first_images, train_epoch

from cifar_jax import augment, train_step, trainer
from cifar_jax.batches import epoch_order, pixel_statistics, scale_images
from cifar_jax.parallel import replicate, select_devices
from cifar_jax.train_step import create_train_state, cross_entropy
from cifar_jax.trainer import Evaluator, Trainer

pytestmark = pytest.mark.usefixtures("direct_convolutions", "compiled_once")


def test_few_calls_are_queued(tiny_config, tiny_dataset, monkeypatch):
    """With 32 of them the devices of a CPU could wait for each other."""
    config, data = dataclasses.replace(tiny_config, steps_per_call=1), tiny_dataset
    training = Trainer(config, data.train_images, data.train_labels, jax.devices()[:1])
    waiting, most = [], []

    class Loss:
        def __init__(self):
            waiting.append(self)
            most.append(len(waiting))

        def block_until_ready(self):
            del waiting[: waiting.index(self) + 1]

    monkeypatch.setattr(training, "program", lambda *_: lambda state, history, *_: (state, history, Loss()))
    for step in range(training.steps_per_epoch):
        training.run_steps(training.order(0), step, 1)
    assert max(most) == trainer.MAX_PENDING_CALLS + 1 < training.steps_per_epoch


def test_several_steps_in_one_call(tiny_dataset, plain_config):
    """6 steps in calls of 4 give the same result as 6 calls."""
    (one, history_one), (many, history_many) = (
        train_epoch(dataclasses.replace(plain_config, steps_per_call=count), tiny_dataset) for count in (1, 4)
    )
    assert int(many.step) == 6
    assert_trees_close(many.params, one.params, 2e-5)
    assert_trees_close(history_many, history_one, 1e-5)


def test_constant_bounds_need_one_program_more_for_shorter_calls(tiny_dataset, plain_config, monkeypatch):
    """6 steps in a call of 4 with constant bounds and a call of 2; 4 test batches in a call of 3 and a call of 1."""
    expected, expected_history = train_epoch(plain_config, tiny_dataset)
    monkeypatch.setattr(trainer, "has_constant_bounds", lambda devices: True)
    config, devices = dataclasses.replace(plain_config, steps_per_call=4), jax.devices()[:1]
    training = Trainer(config, tiny_dataset.train_images, tiny_dataset.train_labels, devices)
    compiled = []
    find_program = training.program
    training.program = lambda *call: compiled.append(find_program(*call)) or compiled[-1]
    training.compile(32, training.order(0))
    ahead = len(compiled)
    training.run_epoch(0, 0)
    assert ahead == len(set(map(id, compiled))) == 2  # nothing compiles within an epoch's time
    assert_trees_close(training.state.params, expected.params, 2e-5)
    assert_trees_close(training.history, expected_history, 1e-5)
    images, labels = tiny_dataset.test_images, tiny_dataset.test_labels
    monkeypatch.undo()
    expected = Evaluator(plain_config, training.state, images, labels, devices)(training.state)
    monkeypatch.setattr(trainer, "has_constant_bounds", lambda devices: True)
    config = dataclasses.replace(config, steps_per_call=3)
    tested = Evaluator(config, training.state, images, labels, devices)(training.state)
    assert tested == pytest.approx(expected, rel=1e-5)


def test_the_partial_batch_is_averaged_over_its_own_images(tiny_dataset, plain_config):
    """With 18 images in batches of 16, the second step equals a step on a batch of the 2 remaining images."""
    config, whole = plain_config, first_images(tiny_dataset, 18)
    images, labels = whole.train_images, whole.train_labels
    state, history = train_epoch(config, whole)
    order = np.asarray(epoch_order(config.seed, 0, 18))
    first, rest = order[:16], order[16:]
    only = lambda indices: dataclasses.replace(whole, train_images=images[indices], train_labels=labels[indices])
    middle, _ = train_epoch(config, only(first))
    expected, expected_history = train_epoch(dataclasses.replace(config, batch_size=2), only(rest), state=middle)
    assert_trees_close(state.params, expected.params, 2e-5)
    np.testing.assert_allclose(history["loss"][1], expected_history["loss"][0], rtol=1e-5)


def test_the_partial_batch_is_mixed_with_its_own_images(tiny_dataset, plain_config, monkeypatch):
    """With shares of 0 each image becomes another of its batch, which only reorders the batch."""
    monkeypatch.setattr(augment, "mix", lambda key, images, others, *_: (others, jnp.zeros(len(images))))
    dataset = first_images(tiny_dataset, 18)
    expected, _ = train_epoch(plain_config, dataset)
    mixed, _ = train_epoch(dataclasses.replace(plain_config, mixup_alpha=0.2), dataset)
    assert_trees_close(mixed.params, expected.params, 2e-5)


def test_a_batch_can_be_overfitted(tiny_dataset, plain_config):
    config = dataclasses.replace(plain_config, learning_rate=0.02)
    dataset = first_images(tiny_dataset, 16)
    dataset = dataclasses.replace(
        dataset,
        train_images=np.tile(dataset.train_images, (40, 1, 1, 1)),
        train_labels=np.tile(dataset.train_labels, 40),
    )
    _, history = train_epoch(config, dataset)
    assert history["loss"][0] > 2
    assert history["loss"][-1] < 0.1


def test_seed_decides_everything(tiny_dataset, plain_config):
    losses = [
        np.asarray(train_epoch(dataclasses.replace(plain_config, seed=seed), tiny_dataset)[1]["loss"])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert np.abs(losses[0] - losses[2]).max() > 1e-3


@pytest.mark.parametrize("what", ["dropout", "augmentation"])
def test_randomness_differs_by_step(what, tiny_dataset, tiny_config):
    """With equal images and a rate near 0, only the draws can change the loss."""
    changes = {"dropout_rates": (0.0, 0.0)} if what == "augmentation" else {"crop_padding": 0, "random_flip": False}
    config = dataclasses.replace(tiny_config, batch_size=4, learning_rate=1e-12, **changes)
    images, labels = np.repeat(tiny_dataset.train_images[:1], 12, 0), np.repeat(tiny_dataset.train_labels[:1], 12)
    dataset = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels)
    losses = np.asarray(train_epoch(config, dataset)[1]["loss"])
    assert len(set(losses.tolist())) == 3


def test_dropout_differs_by_device(tiny_dataset, tiny_config):
    """Each device has the same image. With one mask for all, the mean would equal a single device's loss."""
    config = dataclasses.replace(tiny_config, crop_padding=0, random_flip=False)
    losses = []
    for n in (1, 4):
        images, labels = np.repeat(tiny_dataset.train_images[:1], n, 0), np.repeat(tiny_dataset.train_labels[:1], n)
        dataset = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels)
        _, history = train_epoch(dataclasses.replace(config, batch_size=n, num_devices=n), dataset)
        losses.append(float(history["loss"][0]))
    assert abs(losses[0] - losses[1]) > 1e-5


def test_bfloat16_trains_float32_parameters(tiny_dataset, plain_config):
    state, history = train_epoch(dataclasses.replace(plain_config, dtype="bfloat16"), tiny_dataset)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, reference = train_epoch(plain_config, tiny_dataset)
    np.testing.assert_allclose(history["loss"], reference["loss"], rtol=0.05)
    assert np.abs(history["loss"] - reference["loss"]).max() > 0


def test_the_average_follows_the_parameters_and_is_evaluated(tiny_dataset, plain_config):
    config = dataclasses.replace(plain_config, ema_decay=0.5)
    steps = [create_train_state(config, 6)]
    dataset = first_images(tiny_dataset, 16)
    for _ in range(3):
        copied = jax.tree.map(lambda x: x if isinstance(x, int) else jnp.copy(x), steps[-1])
        steps.append(train_epoch(config, dataset, state=copied)[0])
    expected = jax.device_get(steps[0].params)
    for number, state in enumerate(steps[1:], 1):
        decay = min(0.5, number / (number + 10))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), expected, state.params)
    assert_trees_close(steps[-1].ema_params, expected, 1e-5)
    devices = select_devices(config)
    evaluate = Evaluator(config, steps[-1], tiny_dataset.test_images, tiny_dataset.test_labels, devices)
    averaged = replicate(steps[-1].replace(params=steps[-1].ema_params, ema_params=None), devices)
    plain = Evaluator(config, averaged, tiny_dataset.test_images, tiny_dataset.test_labels, devices)
    assert evaluate(steps[-1])["loss"] == pytest.approx(plain(averaged)["loss"], rel=1e-6)
    last = replicate(steps[-1].replace(ema_params=None), devices)
    assert evaluate(steps[-1])["loss"] != plain(last)["loss"]


def test_the_average_and_the_ends_of_cycles_are_averaged(tiny_dataset, plain_config):
    """Cycles are epochs here: the mean is over the first epoch's moving average and the next two epochs' parameters."""
    config = dataclasses.replace(plain_config, ema_decay=0.5, swa_fraction=2 / 3, swa_cycles=2, swa_learning_rate=0.03)
    states = [create_train_state(config, 6)]
    for _ in range(3):
        states.append(train_epoch(config, tiny_dataset, state=jax.tree.map(jnp.copy, states[-1]))[0])
    members = (states[1].ema_params, states[2].params, states[3].params)
    expected = jax.tree.map(lambda *x: sum(map(np.asarray, x)) / 3, *members)
    assert_trees_close(states[3].eval_params, expected, 1e-5)


@pytest.mark.parametrize(("num_devices", "eval_batch_size"), [(1, 7), (4, 7), (4, 100)])  # of 30 images
def test_every_example_is_evaluated_once(num_devices, eval_batch_size, tiny_dataset, plain_config):
    config = dataclasses.replace(plain_config, num_devices=num_devices, eval_batch_size=eval_batch_size)
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
    for count, size in ((1, 7), (4, 12)):  # masks go by the image, not by the device or the batch
        config, devices = dataclasses.replace(tiny_config, eval_batch_size=size), jax.devices()[:count]
        again = Evaluator(
            config, replicate(state, devices), tiny_dataset.test_images, tiny_dataset.test_labels, devices, True
        )
        assert again(replicate(state, devices))["loss"] == pytest.approx(losses[1], rel=1e-5)


def test_the_step_is_traced_once(tiny_dataset, plain_config, monkeypatch):
    traces = []
    original = train_step.cross_entropy
    monkeypatch.setattr(train_step, "cross_entropy", lambda *args: traces.append(1) or original(*args))
    train_epoch(dataclasses.replace(plain_config, learning_rate=0.04), tiny_dataset)  # no other test's program
    assert len(traces) == 1


@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.long), 2])
def test_sam_steps_by_the_gradient_up_the_slope(num_devices, tiny_dataset, plain_config):
    """Compares one step on one batch with the formula of arXiv:2010.01412."""
    config = dataclasses.replace(
        plain_config,
        num_devices=num_devices,
        sam_rho=0.5,
        nesterov=False,
        momentum=0.0,
    )
    dataset = first_images(tiny_dataset, 16)
    labels = jnp.asarray(dataset.train_labels)
    start = create_train_state(config, 1)
    scaled = scale_images(jnp.asarray(dataset.train_images), *pixel_statistics(config.input_scaling, "digits"))
    loss = lambda params: cross_entropy(start.apply_fn({"params": params}, scaled), labels).mean()
    params = jax.tree.map(jnp.copy, start.params)
    gradient = jax.jit(jax.grad(loss))
    slope = gradient(params)
    ascent = jax.tree.map(lambda p, g: p + 0.5 * g / optax.tree.norm(slope), params, slope)
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient(ascent))
    state, _ = train_epoch(config, dataset, state=start)
    assert_trees_close(state.params, expected, 1e-4)
    plain = jax.tree.map(lambda p, g: p - 0.05 * g, params, slope)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain))) > 1e-3


def test_trivial_augment_works_on_the_images_before_they_are_scaled(tiny_dataset, plain_config, monkeypatch):
    """If the operation turns every image white, the loss is the loss of white images."""
    config = dataclasses.replace(plain_config, trivial_augment=True)
    monkeypatch.setattr(augment, "trivial_augment", lambda key, image: jnp.full(image.shape, 255.0))
    losses = train_epoch(config, tiny_dataset)[1]["loss"]
    white = dataclasses.replace(tiny_dataset, train_images=np.full_like(tiny_dataset.train_images, 255))
    expected = train_epoch(dataclasses.replace(config, trivial_augment=False), white)[1]["loss"]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    unchanged = train_epoch(dataclasses.replace(config, trivial_augment=False), tiny_dataset)[1]["loss"]
    assert np.abs(losses - unchanged).max() > 1e-2


def test_alternating_flip_goes_by_the_image_and_the_epoch(tiny_dataset, plain_config, monkeypatch):
    """If all images are mirrored in odd epochs, the losses are those of the unchanged or mirrored images."""
    monkeypatch.setattr(augment, "is_mirrored", lambda _, index, epoch: jnp.full(index.shape, epoch % 2 == 1))
    turned = dataclasses.replace(tiny_dataset, train_images=tiny_dataset.train_images[:, :, ::-1])
    steps = math.ceil(len(tiny_dataset.train_images) / plain_config.batch_size)

    def losses(config, dataset, epoch):
        state = create_train_state(config, steps).replace(step=jnp.int32(epoch * steps))
        return np.asarray(train_epoch(config, dataset, state=state)[1]["loss"])

    as_they_are, mirrored = losses(plain_config, tiny_dataset, 0), losses(plain_config, turned, 0)  # without randomness
    for epoch, expected, other in [(0, as_they_are, mirrored), (1, mirrored, as_they_are), (2, as_they_are, mirrored)]:
        result = losses(dataclasses.replace(plain_config, alternating_flip=True), tiny_dataset, epoch)
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        assert np.abs(result - other).max() > 1e-4


def test_the_loop_trains_on_the_size_that_it_is_made_for(tiny_config, tiny_dataset):
    config, shapes = dataclasses.replace(tiny_config, model="all_cnn", dropout_rates=(0.0,) * 3), []
    trainer = Trainer(config, tiny_dataset.train_images, tiny_dataset.train_labels, select_devices(config))
    apply_fn = lambda variables, images, **_: shapes.append(images.shape) or jnp.zeros((16, 10)) + 0 * images.sum()
    trainer.state = trainer.state.replace(apply_fn=apply_fn)
    trainer.run_steps(trainer.order(0), 0, 1, image_size=24)
    assert set(shapes) == {(16, 24, 24, 3)}
