import dataclasses
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small_runs import assert_trees_close, first_images, latest_state, stop_at, untimed_rows

from cifar_jax import convert, evaluate, train_step
from cifar_jax import trainer as trainer_module
from cifar_jax.batches import pixel_statistics, scale_images, take_batch
from cifar_jax.metrics import read_metrics
from cifar_jax.models import MODELS, LeNet5
from cifar_jax.normalization import EPSILON, Moments, add_scales, apply_normalized, fold, merge
from cifar_jax.outcomes import Interrupted
from cifar_jax.parallel import AXIS, replicate, select_devices
from cifar_jax.sources import load_run
from cifar_jax.symmetry import mirror
from cifar_jax.train import train_and_evaluate
from cifar_jax.train_step import create_train_state, create_train_step, cross_entropy
from cifar_jax.trainer import Trainer
from cifar_jax.weights.files import load_weights

pytestmark = pytest.mark.usefixtures("direct_convolutions", "compiled_once", "no_figures")


def random_network(name, dtype):
    """Returns (model, params) of a normalised network with random scales and biases."""
    model, rng = MODELS[name](dtype=dtype), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    draws = {
        "kernel": lambda shape: rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape),
        "bias": lambda shape: rng.normal(0, 0.3, shape),
        "scale": lambda shape: rng.uniform(0.5, 1.5, shape),
    }
    parts = lambda name: ("kernel", "bias", "scale") if name in model.LAYERS[:-1] else ("kernel", "bias")
    draw = lambda layer, part: jnp.asarray(draws[part](layer["bias" if part == "scale" else part].shape), dtype)
    return model, {name: {part: draw(layer, part) for part in parts(name)} for name, layer in shapes.items()}


def random_images(name, dtype, seed):
    side = 16 if MODELS[name].RESIZABLE else 32
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 1, (6, side, side, 3)), dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "share", "symmetric"),
    [
        ("all_cnn", "float32", 1e-5, False),
        ("lenet5", "float64", 1e-12, True),
        pytest.param("all_cnn", "float64", 1e-12, True, marks=pytest.mark.long),
        pytest.param("lenet5", "float32", 1e-5, False, marks=pytest.mark.long),
    ],
)
def test_the_folded_network_is_the_normalised_one(name, dtype, share, symmetric):
    """With fixed statistics, on other images than those of the statistics."""
    with jax.enable_x64(dtype == "float64"):
        model, params = random_network(name, jnp.dtype(dtype))
        _, statistics = apply_normalized(model, params, random_images(name, dtype, 1), symmetric=symmetric)
        images = random_images(name, dtype, 2)
        expected, used = apply_normalized(model, params, images, statistics, symmetric)
        folded = fold(params, statistics)
        actual = model.apply({"params": folded}, images)
        assert actual.dtype == jnp.dtype(dtype)
        assert np.abs(actual - expected).max() <= share * np.abs(expected).max()
        own, _ = apply_normalized(model, params, images, symmetric=symmetric)
        assert np.abs(own - expected).max() > 0.01 * np.abs(expected).max()
    assert used is not statistics
    assert {part for layer in folded.values() for part in layer} == {"kernel", "bias"}
    hidden = model.LAYERS[:-1]
    assert set(statistics) == set(hidden)
    for name in hidden:
        reversed_too = all(np.array_equal(values, values[::-1]) for values in statistics[name])
        assert reversed_too == symmetric


def test_lenet5_normalised_written_out():
    """Each hidden layer: product, normalisation by the batch, scale, shift, ReLU. The last layer is unchanged."""
    model, params = random_network("lenet5", jnp.float32)
    images = random_images("lenet5", jnp.float32, 1)

    def normalise(x, layer):
        axes = tuple(range(x.ndim - 1))
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        row = lambda values: values.reshape((1,) * len(axes) + (-1,))
        return nn.relu((x - mean) / jnp.sqrt(variance + 1e-5) * row(layer["scale"]) + row(layer["bias"]))

    x = images
    for name in ("Conv_0", "Conv_1"):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, params[name]["kernel"], (1, 1), "VALID", dimension_numbers=numbers)
        x = nn.max_pool(normalise(x, params[name]), (2, 2), (2, 2))
    x = x.reshape(len(x), -1)
    for name in ("Dense_0", "Dense_1"):
        x = normalise(x @ params[name]["kernel"], params[name])
    expected = x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"].reshape(1, -1)
    actual, _ = apply_normalized(model, params, images)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_scales_and_biases_are_summed_in_float32(name):
    """In bfloat16 a sum of ones stands still at 256. The gradients of scales and biases are sums over all pixels."""
    model = MODELS[name](dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(lambda images: add_scales(model, model.init(jax.random.key(0), images)["params"]), images)
    gradient = jax.grad(lambda params, images: apply_normalized(model, params, images)[0].sum())
    program = str(jax.make_jaxpr(gradient)(params, images))
    assert re.findall(r"\w+:f32\S+ = reduce_sum", program)
    assert re.findall(r"\w+:bf16\S+ = reduce_sum", program) == []


def test_the_start_is_a_scale_of_one_for_each_hidden_layer():
    model = LeNet5()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    for name, layer in add_scales(model, params).items():
        assert ("scale" in layer) == (name != "Dense_2")
        if "scale" in layer:
            np.testing.assert_array_equal(layer["scale"], np.ones_like(layer["bias"]))


def test_merged_moments_are_those_of_all():
    values = np.random.default_rng(0).normal(3, 2, (5, 40, 7)).astype(np.float32)
    parts = [{"a": Moments(jnp.asarray(part.mean(0)), jnp.asarray(part.var(0)))} for part in values]
    merged = merge(parts)["a"]
    together = values.reshape(-1, 7).astype(np.float64)
    np.testing.assert_allclose(merged.mean, together.mean(0), rtol=1e-5)
    np.testing.assert_allclose(merged.variance, together.var(0), rtol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_trainer_folds_statistics_of_the_same_images(num_devices, plain_config, tiny_dataset, monkeypatch):
    """Statistics of the averaged parameters on the first 88 of 90 images, in parts of 8, divided over the devices."""
    monkeypatch.setattr(trainer_module, "FOLD_IMAGES", 88)
    monkeypatch.setattr(trainer_module, "FOLD_BATCH", 8 // num_devices)
    config = dataclasses.replace(plain_config, normalization="batch", ema_decay=0.9, num_devices=num_devices)
    config = dataclasses.replace(config, eval_batch_size=1)  # makes no difference
    trainer = Trainer(config, tiny_dataset.train_images, tiny_dataset.train_labels, select_devices(config))
    averaged = jax.tree.map(lambda x: 1.25 * x, trainer.state.params)
    trainer.state = trainer.state.replace(ema_params=averaged)
    trainer.fold()
    images = scale_images(jnp.asarray(tiny_dataset.train_images[:88]), *pixel_statistics("symmetric", "digits"))
    params, size = jax.device_get(averaged), 8 // num_devices
    statistics = jax.jit(lambda images: apply_normalized(LeNet5(), params, images)[1])
    expected = fold(params, merge([statistics(images[i : i + size]) for i in range(0, 88, size)]))
    assert_trees_close(trainer.state.eval_params, expected, 1e-4)
    first = statistics(images)["Conv_0"]  # the first layer does not depend on the parts
    factor = params["Conv_0"]["scale"] / np.sqrt(first.variance + EPSILON)
    kernel = params["Conv_0"]["kernel"] * np.asarray(factor).reshape(1, 1, 1, -1)
    assert_trees_close(trainer.state.eval_params["Conv_0"]["kernel"], kernel, 1e-4)


# --- Training ---


def test_a_partial_batch_is_filled_with_other_images():
    images, labels = np.zeros((18, 32, 32, 3), np.uint8), np.arange(18, dtype=np.int32)
    order = np.random.default_rng(0).permutation(18).astype(np.int32)
    batch = take_batch(*map(jnp.asarray, (images, labels, order)), jnp.int32(16), 16, wrap=True)
    np.testing.assert_array_equal(batch["index"], [*order[16:], *order[:14]])
    np.testing.assert_array_equal(batch["mask"], [1, 1] + [0] * 14)
    batch = take_batch(*map(jnp.asarray, (images, labels, order)), jnp.int32(16), 16)
    np.testing.assert_array_equal(batch["index"], [order[16], *[order[17]] * 15])


def test_the_loss_of_a_partial_batch(plain_config, tiny_dataset):
    """The loss is the mean over 2 images, normalised together with the order's first 14."""
    config = dataclasses.replace(plain_config, normalization="batch")
    dataset = first_images(tiny_dataset, 18)
    trainer = Trainer(config, dataset.train_images, dataset.train_labels, select_devices(config))
    order = trainer.order(0)
    trainer.run_steps(order, 0, 1)
    params = jax.device_get(trainer.state.params)
    loss = float(trainer.run_steps(order, 1, 1))
    taken = [*np.asarray(order)[16:], *np.asarray(order)[:14]]
    images = scale_images(jnp.asarray(dataset.train_images[taken]), *pixel_statistics("symmetric", "digits"))
    logits, _ = jax.jit(lambda images: apply_normalized(LeNet5(dropout_rates=(0.0, 0.0)), params, images))(images)
    losses = cross_entropy(logits, jnp.asarray(dataset.train_labels[taken]))
    assert loss == pytest.approx(float(losses[:2].mean()), rel=1e-4)


def test_it_learns_where_it_is_asked_for_alone(plain_config, tiny_dataset, monkeypatch):
    """Without normalisation neither the state nor the step has any part of it."""

    def trace(config):
        state = create_train_state(config, 6)
        batch = {"image": tiny_dataset.train_images[:16], "label": tiny_dataset.train_labels[:16]}
        batch |= {"mask": np.ones(16, np.float32), "index": np.arange(16, dtype=np.int32), "epoch": np.int32(0)}
        batch = jax.tree.map(lambda x: x[None], batch)
        step = jax.vmap(create_train_step(config), (None, 0), axis_name=AXIS)
        return jax.tree_util.tree_leaves_with_path(state), str(jax.make_jaxpr(step)(state, batch))

    leaves, jaxpr = trace(dataclasses.replace(plain_config, normalization="batch"))
    assert sum("scale" in jax.tree_util.keystr(path) for path, _ in leaves) == 2 * 4  # scales and their momenta
    assert "rsqrt" in jaxpr
    monkeypatch.setattr(train_step, "apply_normalized", None)
    monkeypatch.setattr(train_step, "add_scales", None)
    leaves, jaxpr = trace(plain_config)
    assert not any("scale" in jax.tree_util.keystr(path) for path, _ in leaves)
    assert not any("folded" in jax.tree_util.keystr(path) for path, _ in leaves)
    assert "rsqrt" not in jaxpr


def test_a_symmetric_run_stays_so(plain_config, tiny_dataset):
    config = dataclasses.replace(plain_config, normalization="batch", mirror_symmetry=True, num_epochs=1)
    trainer = Trainer(config, tiny_dataset.train_images, tiny_dataset.train_labels, select_devices(config))
    trainer.run_epoch(0, 0)
    trainer.fold()
    for params in (trainer.state.params, trainer.state.eval_params):
        params = jax.device_get(params)
        assert_trees_close(jax.device_get(mirror(params, LeNet5.LAYERS)), params, 1e-4)


def test_a_run_resumes_and_is_released_as_the_plain_network(plain_config, tiny_dataset, run_command, tmp_path, capsys,
                                                             use_tiny_dataset):  # fmt: skip
    config = dataclasses.replace(plain_config, normalization="batch", ema_decay=0.9, num_epochs=2)
    summary = train_and_evaluate(config, tiny_dataset)
    assert summary["num_parameters"] == 395_006
    resumed = dataclasses.replace(config, workdir=f"{config.workdir}-resumed")
    with pytest.raises(Interrupted):
        train_and_evaluate(resumed, tiny_dataset, stop_at(4 + 11 + 4))
    train_and_evaluate(resumed, tiny_dataset)
    assert untimed_rows(resumed) == untimed_rows(config)
    for ours, expected in zip(latest_state(resumed), latest_state(config), strict=True):
        np.testing.assert_array_equal(ours, expected)

    devices = select_devices(config)
    _, state, _ = load_run(Path(config.workdir), "latest")
    trainer = Trainer(config, tiny_dataset.train_images, tiny_dataset.train_labels, devices)
    trainer.state = replicate(jax.device_get(state), devices).replace(folded_params=None)
    trainer.fold()
    assert_trees_close(jax.device_get(state.eval_params), jax.device_get(trainer.state.eval_params), 1e-5)

    capsys.readouterr()
    accuracy = pytest.approx(read_metrics(Path(config.workdir))[-1].test_accuracy)
    status, output, _ = run_command(evaluate.main, "--workdir", config.workdir, "--json")
    assert (status, json.loads(output)["test_accuracy"]) == (0, accuracy)
    file = tmp_path / "released.safetensors"
    assert run_command(convert.main, config.workdir, file)[0] == 0
    weights = load_weights(file)
    assert sum(leaf.size for leaf in jax.tree.leaves(weights.params)) == 395_006
    assert {part for layer in weights.params.values() for part in layer} == {"kernel", "bias"}
    status, output, _ = run_command(evaluate.main, "--weights", file, "--dataset", "digits", "--json")
    assert (status, json.loads(output)["test_accuracy"]) == (0, accuracy)
