"""Networks unknown to weights/, other numbers of classes, and unknown network names."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import keras as keras_api
from frameworks import torch
from weight_files import random_weights

from cifar_jax.errors import UserError
from cifar_jax.models import MODELS
from cifar_jax.weights import keras, pytorch
from cifar_jax.weights.files import Weights, load_weights, save_weights
from cifar_jax.weights.params import expected_shapes, layers_from_params

pytestmark = pytest.mark.usefixtures("keras_files_read_here")


class Eleven(nn.Module):
    """Eleven convolutions, all except the first and last of the same shape. Conv_10 sorts before Conv_2."""

    LAYERS: ClassVar[tuple[str, ...]] = tuple(f"Conv_{i}" for i in range(11))
    INPUT_SCALING: ClassVar[str] = "symmetric"
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images
        for _ in range(10):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Conv(self.num_classes, (1, 1))(x).mean((1, 2))


@functools.cache
def eleven_params(num_classes):
    params = jax.jit(Eleven(num_classes=num_classes).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.01), params)


@pytest.fixture(params=[10, 100])
def eleven(monkeypatch, request):
    monkeypatch.setitem(MODELS, "eleven", Eleven)
    return Weights("eleven", eleven_params(request.param), "symmetric")


def assert_same(left, right):
    assert set(left) == set(right)
    jax.tree.map(np.testing.assert_array_equal, dict(left), dict(right))


def ordered(params):
    return [np.asarray(params[name][part]) for name in Eleven.LAYERS for part in ("kernel", "bias")]


def test_it_returns_from_our_own_file(tmp_path, eleven):
    save_weights(tmp_path / "x.safetensors", eleven)
    loaded = load_weights(tmp_path / "x.safetensors")
    assert_same(loaded.params, eleven.params)
    assert (loaded.model, loaded.num_classes, loaded.input_scaling) == ("eleven", eleven.num_classes, "symmetric")


def test_it_is_read_from_a_pytorch_module(tmp_path, eleven):
    layers = [nn for i in range(10) for nn in (torch.nn.Conv2d(8 if i else 3, 8, 3, padding=1), torch.nn.ReLU())]
    network = torch.nn.Sequential(*layers, torch.nn.Conv2d(8, eleven.num_classes, 1))
    convolutions = [layer for layer in network if isinstance(layer, torch.nn.Conv2d)]
    for layer, name in zip(convolutions, Eleven.LAYERS):
        layer.weight.data = torch.tensor(eleven.params[name]["kernel"].transpose(3, 2, 0, 1))
        layer.bias.data = torch.tensor(eleven.params[name]["bias"])
    state_dict = network.state_dict()
    for content in (state_dict, {name: state_dict[name] for name in sorted(state_dict)}):  # 10 before 2
        torch.save(content, tmp_path / "x.pth")
        assert_same(load_weights(tmp_path / "x.pth").params, eleven.params)
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    ours = np.asarray(jax.jit(eleven.create_module().apply)({"params": eleven.params}, images))
    with torch.no_grad():
        theirs = network(torch.tensor(images).permute(0, 3, 1, 2)).mean((2, 3)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(ours).max())


def test_it_is_read_from_keras(tmp_path, eleven):
    assert_same(keras.params_from_keras(ordered(eleven.params)), eleven.params)
    layers = keras_api.layers
    convolutions = [layers.Conv2D(8, 3, padding="same", activation="relu") for _ in range(10)]
    last = [layers.Conv2D(eleven.num_classes, 1), layers.GlobalAveragePooling2D()]
    network = keras_api.Sequential([layers.Input((32, 32, 3)), *convolutions, *last])
    network.set_weights(ordered(eleven.params))
    network.save_weights(tmp_path / "x.weights.h5")
    network.save(tmp_path / "x.keras")
    for name in ("x.weights.h5", "x.keras"):
        assert_same(load_weights(tmp_path / name).params, eleven.params)


@pytest.mark.parametrize("kind", ["pth", "h5", "keras", "weights.h5"])
def test_without_a_twin_it_is_not_written_for_other_frameworks(tmp_path, eleven, kind):
    with pytest.raises(UserError, match="eleven has no twin"):
        save_weights(tmp_path / f"x.{kind}", eleven)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["safetensors", "pth", "h5", "weights.h5", "keras"])
@pytest.mark.parametrize("model", list(pytorch.TWINS))
def test_a_hundred_classes(tmp_path, kind, model):
    weights = random_weights(model, 100)
    save_weights(tmp_path / f"x.{kind}", weights)
    loaded = load_weights(tmp_path / f"x.{kind}")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, weights.params)
    assert (loaded.model, loaded.num_classes) == (model, 100)
    images = jnp.zeros((1, 32, 32, 3))
    assert jax.eval_shape(loaded.create_module().apply, {"params": weights.params}, images).shape == (1, 100)


def test_the_names_of_the_classes_travel(tmp_path):
    fields = {"dataset": "cifar100", "class_names": ("apple", "bear", "cœur")}
    weights = random_weights("lenet5", 3, **fields)
    save_weights(tmp_path / "x.safetensors", weights)
    loaded = load_weights(tmp_path / "x.safetensors")
    assert (loaded.dataset, loaded.class_names) == ("cifar100", ("apple", "bear", "cœur"))


@pytest.mark.parametrize(
    "call",
    [
        lambda: pytorch.create_model("resnet"),
        lambda: keras.create_model("resnet"),
        lambda: expected_shapes("resnet"),
        lambda: layers_from_params({}, "resnet"),
        lambda: pytorch.params_from_pytorch({}, "resnet"),
        lambda: keras.params_from_keras([], "resnet"),
        lambda: load_weights("unread.pth", model="resnet"),
    ],
)
def test_an_unknown_network_is_an_error(call):
    with pytest.raises(UserError, match=r"unknown model 'resnet': choose one of all_cnn, lenet5"):
        call()
