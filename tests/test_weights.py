import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import torch

from cifar_jax.errors import UserError
from cifar_jax.models import MODELS
from cifar_jax.weights import keras as interop_keras
from cifar_jax.weights import pytorch as interop_pytorch
from cifar_jax.weights.params import expected_shapes, layers_from_params


@pytest.fixture(scope="module", params=list(interop_pytorch.TWINS))
def network(request):
    """Returns (model's name, params with nonzero biases, images, Flax logits)."""
    name = request.param
    rng = np.random.default_rng(0)
    params = {
        layer: {"kernel": rng.normal(0, 0.05, kernel), "bias": rng.normal(0, 0.05, bias)}
        for layer, kernel, bias in expected_shapes(name)
    }
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    images = rng.random((4, 32, 32, 3), np.float32)
    return name, params, images, np.asarray(jax.jit(MODELS[name]().apply)({"params": params}, images))


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_pytorch_computes_the_same_and_weights_return(network):
    name, params, images, logits = network
    reference = interop_pytorch.create_model(name).eval()
    interop_pytorch.load_params(reference, params)
    with torch.no_grad():
        theirs = reference(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(theirs, logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
    assert_same(interop_pytorch.params_from_pytorch(reference.state_dict()), params)


def test_keras_computes_the_same_and_weights_return(network):
    name, params, images, logits = network
    reference = interop_keras.create_model(name)
    reference.set_weights(interop_keras.params_to_keras(params))
    theirs = reference(images, training=False).detach().numpy()
    np.testing.assert_allclose(theirs, logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
    assert_same(interop_keras.params_from_keras(reference), params)
    assert_same(interop_keras.params_from_keras(reference.get_weights()), params)


@pytest.mark.usefixtures("direct_convolutions")
def test_final_relu_in_every_framework():
    rng = np.random.default_rng(0)
    images = rng.random((2, 32, 32, 3), np.float32)
    network = MODELS["all_cnn"](final_relu=True)
    params = jax.jit(network.init)(jax.random.key(3), images[:1])["params"]
    ours = np.asarray(jax.jit(network.apply)({"params": params}, images))
    assert np.abs(ours - np.asarray(jax.jit(MODELS["all_cnn"]().apply)({"params": params}, images))).max() > 1e-3
    reference = interop_pytorch.create_model("all_cnn", final_relu=True).eval()
    interop_pytorch.load_params(reference, params)
    with torch.no_grad():
        np.testing.assert_allclose(reference(torch.tensor(images).permute(0, 3, 1, 2)), ours, atol=1e-6)
    keras_reference = interop_keras.create_model("all_cnn", final_relu=True)
    keras_reference.set_weights(interop_keras.params_to_keras(params))
    np.testing.assert_allclose(keras_reference(images, training=False).detach(), ours, atol=1e-6)


@pytest.mark.parametrize("create", [interop_pytorch.create_model, interop_keras.create_model])
def test_the_references_drop_out_where_the_originals_do(create):
    rate = lambda layer: layer.p if hasattr(layer, "p") else layer.rate
    for name, expected in {"all_cnn": [0.2, 0.5, 0.5], "lenet5": [0.2, 0.2]}.items():
        network = create(name)
        layers = network.children() if isinstance(network, torch.nn.Sequential) else network.layers
        assert [rate(layer) for layer in layers if "Dropout" in type(layer).__name__] == expected


def test_the_notebooks_duplicate_key_is_passed_over_but_checked():
    network = interop_pytorch.create_model("lenet5")
    state_dict = {"xav": network.fullyc1.weight, **network.state_dict()}
    assert_same(
        interop_pytorch.params_from_pytorch(state_dict), interop_pytorch.params_from_pytorch(network.state_dict())
    )
    with pytest.raises(UserError, match="xav"):
        interop_pytorch.params_from_pytorch(state_dict | {"xav": torch.zeros(200, 1600)})


def test_bfloat16_tensors_become_float32():
    network = interop_pytorch.create_model("lenet5")
    params = interop_pytorch.params_from_pytorch(network.to(torch.bfloat16).state_dict())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(params["Conv_0"]["bias"], network.convLayer1.bias.detach().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d | {"convLayer2.weight": torch.zeros(64, 32, 3, 3)},
            "convLayer2.weight has shape .64, 32, 3, 3., must have",
        ),
        (lambda d: {k: v for k, v in d.items() if k != "fullyc3.bias"}, "9 tensors, must have"),
        (lambda d: d | {"more.weight": torch.zeros(1)}, "11 tensors, must have 18 .all_cnn. or 10 .lenet5."),
        (
            lambda d: d | {"convLayer1.bias": torch.full((32,), torch.nan)},
            "convLayer1.bias has values that are not",
        ),
        (lambda d: d | {"convLayer1.bias": torch.zeros(32, dtype=torch.int64)}, "convLayer1.bias has type int64"),
    ],
)
def test_wrong_tensors_are_named(change, message):
    state_dict = interop_pytorch.create_model("lenet5").state_dict()
    with pytest.raises(UserError, match=message):
        interop_pytorch.params_from_pytorch(change(state_dict))


def test_missing_and_surplus_tensors_are_named_when_the_model_is_known():
    state_dict = interop_pytorch.create_model("lenet5").state_dict()
    with pytest.raises(UserError, match=r"more is surplus: .* 10"):
        interop_pytorch.params_from_pytorch(state_dict | {"more": torch.zeros(1)}, "lenet5")
    del state_dict["fullyc3.bias"]
    with pytest.raises(UserError, match=r"a tensor of shape \(10,\) is missing after fullyc3.weight"):
        interop_pytorch.params_from_pytorch(state_dict, "lenet5")


def test_layers_are_in_the_networks_order():
    assert [name for name, _, _ in expected_shapes("lenet5")] == ["Conv_0", "Conv_1", "Dense_0", "Dense_1", "Dense_2"]
    assert [name for name, _, _ in expected_shapes("all_cnn")] == [f"Conv_{i}" for i in range(9)]
    params = jax.jit(MODELS["lenet5"]().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    layers, model = layers_from_params(params)
    assert model == "lenet5"
    assert [kernel.shape[-1] for kernel, _ in layers] == [32, 64, 200, 100, 10]
    with pytest.raises(UserError, match="Dense_2 are missing"):
        layers_from_params({**{k: v for k, v in params.items() if k != "Dense_2"}, "Other": params["Dense_2"]})


def test_keras_with_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    for backend, advice in (
        ("torch", "pip install 'cifar_jax"),
        ("tensorflow", "KERAS_BACKEND is tensorflow: set it to torch"),
    ):
        monkeypatch.setenv("KERAS_BACKEND", backend)
        with pytest.raises(UserError, match=advice):
            interop_keras.import_keras()
