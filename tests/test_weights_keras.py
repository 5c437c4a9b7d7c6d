"""Keras' files and architectures: every field that changes what is computed is followed or refused.

fixtures/keras_2_* are of a real Keras 2.15 (see fixtures/make_keras_2_files.py).
"""

import copy
import gzip
import json
import zipfile
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax.batches import scale_images
from cifar_jax.errors import UserError
from cifar_jax.models import MODELS
from cifar_jax.weights import keras
from cifar_jax.weights.files import Weights, load_weights, save_weights
from cifar_jax.weights.params import expected_shapes

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("keras", "weights.h5", "h5")
api = keras.import_keras()
L = api.layers
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


def random_weights(model, **fields):
    rng = np.random.default_rng(2)
    tensor = lambda shape: rng.normal(0, 0.1, shape).astype(np.float32)
    params = {name: {"kernel": tensor(kernel), "bias": tensor(bias)} for name, kernel, bias in expected_shapes(model)}
    return Weights(model, params, MODELS[model].INPUT_SCALING, **fields)


@pytest.fixture(scope="module")
def lenet5():
    return random_weights("lenet5")


@pytest.fixture(scope="module")
def all_cnn():
    return random_weights("all_cnn")


def logits(weights, scaling=None):
    images = scale_images(jnp.asarray(IMAGES), scaling or weights.input_scaling)
    return np.asarray(jax.jit(weights.create_module().apply)({"params": weights.params}, images))


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def unpacked(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.decompress((FIXTURES / f"keras_2_{name}.gz").read_bytes()))
    return path


# --- files of a trained Keras 2.15 network ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["all_cnn", "lenet5", "nested"])
def test_files_of_a_trained_keras_2_network(tmp_path, name, kind):
    """Beside the weights they hold metrics/mean/vars/0 and the optimizer's state."""
    expected = np.array(json.loads((FIXTURES / "keras_2_probabilities.json").read_text())[name])
    path = unpacked(tmp_path, f"{name}.{kind}")
    if (name, kind) == ("nested", "weights.h5"):  # how its Rescaling scales only the architecture says
        with pytest.raises(UserError, match="--architecture"):
            load_weights(path)
        with zipfile.ZipFile(unpacked(tmp_path, "nested.keras")) as archive:
            (tmp_path / "nested.json").write_bytes(archive.read("config.json"))
        weights = load_weights(path, architecture=tmp_path / "nested.json")
    else:
        weights = load_weights(path)
    assert weights.model == name.replace("nested", "lenet5")
    ours = jax.nn.softmax(logits(weights, None if name == "nested" else "unit"))
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(ours, expected, atol=6e-6)


def test_files_saved_on_windows(tmp_path, all_cnn):
    """Keras 2 joined the names of groups with the system's separator."""
    save_weights(tmp_path / "x.weights.h5", all_cnn)
    with h5py.File(tmp_path / "x.weights.h5") as file, h5py.File(tmp_path / "y.weights.h5", "w") as other:
        for name, group in file["layers"].items():
            for number, tensor in group["vars"].items():
                other[f"layers\\{name}/vars/{number}"] = tensor[()]
                other[f"metrics\\mean{name}/vars/{number}"] = np.zeros(())
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "y.weights.h5").params, all_cnn.params)


# --- fields of an architecture ---


def lenet5_layers(pool=L.MaxPooling2D, flatten=L.Flatten, **conv):
    data_format = {"data_format": conv["data_format"]} if "data_format" in conv else {}
    return [
        *(L.Conv2D(32, 5, activation="relu", **conv), pool(2, **data_format)),
        *(L.Conv2D(64, 5, activation="relu", **conv), pool(2, **data_format), flatten()),
        *(L.Dense(200, "relu"), L.Dense(100, "relu"), L.Dense(10)),
    ]


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("flatten", ["plain", "channels_first"])
def test_channels_first(tmp_path, lenet5, kind, flatten, capsys):
    """A plain Flatten leaves channels first, Flatten(channels_first) moves them last."""
    layers = lenet5_layers(
        data_format="channels_first",
        flatten=L.Flatten if flatten == "plain" else lambda: L.Flatten(data_format="channels_first"),
    )
    network = api.Sequential([L.Input((3, 32, 32)), *layers])
    tensors = keras.params_to_keras(lenet5.params)
    if flatten == "plain":
        tensors[4] = tensors[4].reshape(5, 5, 64, 200).transpose(2, 0, 1, 3).reshape(1600, 200)
    network.set_weights(tensors)
    images = np.asarray(scale_images(jnp.asarray(IMAGES), "symmetric")).transpose(0, 3, 1, 2)
    assert_close(logits(lenet5), network(images, training=False).detach().numpy())
    network.save(tmp_path / f"x.{kind}")
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / f"x.{kind}").params, lenet5.params)
    assert ("reordered" in capsys.readouterr().err) == (flatten == "plain")


@pytest.mark.parametrize("full_model", [True, False])
def test_theanos_kernels_are_turned_by_180_degrees(tmp_path, lenet5, full_model, capsys):
    save_weights(tmp_path / "x.h5", lenet5)
    with h5py.File(tmp_path / "x.h5", "a") as file:
        root = file["model_weights"]
        for name in ("conv2d_1", "conv2d_2"):
            kernel = root[name][name]["kernel:0"]
            kernel[:] = kernel[()][::-1, ::-1]
        for group in (file, root):
            group.attrs["backend"] = b"theano"
        if not full_model:
            with h5py.File(tmp_path / "w.h5", "w") as other:
                for name in root:
                    file.copy(root[name], other, name)
                other.attrs.update(root.attrs)
    loaded = load_weights(tmp_path / ("x.h5" if full_model else "w.h5"))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lenet5.params)
    assert "Theano" in capsys.readouterr().err


CHANGES = {  # of the architecture of LeNet-5: (layer's number, field, value)
    "padding": (1, "padding", "same"),
    "dilation_rate": (1, "dilation_rate", [2, 2]),
    "strides": (1, "strides", [2, 2]),
    "groups": (1, "groups", 2),
    "use_bias of a convolution": (1, "use_bias", False),
    "use_bias of a dense layer": (8, "use_bias", False),
    "data_format of one": (4, "data_format", "channels_first"),
    "data_format of the flatten": (7, "data_format", "channels_first"),
    "data_format of a pool": (3, "data_format", "channels_first"),
    "pool_size": (3, "pool_size", [3, 3]),
    "strides of a pool": (3, "strides", [1, 1]),
    "padding of a pool": (3, "padding", "same"),
    "leaky": (1, "activation", {"class_name": "LeakyReLU", "config": {"negative_slope": 0.3}}),
    "capped": (1, "activation", {"class_name": "ReLU", "config": {"max_value": 6.0}}),
    "sloped": (1, "activation", {"class_name": "ReLU", "config": {"negative_slope": [0.1]}}),
    "thresholded": (1, "activation", {"class_name": "ReLU", "config": {"threshold": 0.1}}),
    "own activation": (1, "activation", {"class_name": "function", "config": "mine", "registered_name": "mine"}),
    "dtype": (1, "dtype", {"class_name": "QuantizedDTypePolicy", "config": {"name": "int8_from_float32"}}),
    "a field of the future": (1, "circular", True),
    "filters": (1, "filters", 64),
    "units": (8, "units", 100),
    "shape": (0, "batch_input_shape", [None, 64, 64, 3]),
    "ragged": (0, "ragged", True),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_field_that_changes_what_is_computed_is_refused(tmp_path, lenet5, change):
    number, field, value = CHANGES[change]
    architecture = copy.deepcopy(keras.architecture("lenet5"))
    save_weights(tmp_path / "x.safetensors", lenet5)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(architecture))
    load_weights(tmp_path / "x.safetensors", architecture=path)
    architecture["config"]["layers"][number]["config"][field] = value
    path.write_text(json.dumps(architecture))
    with pytest.raises(UserError, match=f"^{path}: "):
        load_weights(tmp_path / "x.safetensors", architecture=path)


@pytest.mark.parametrize(
    "layer",
    [
        {"class_name": "BatchNormalization", "config": {}},
        {"class_name": "Lambda", "config": {}},
        {"class_name": "Permute", "config": {"dims": [3, 1, 2]}},
        {"class_name": "RandomCrop", "config": {"height": 28, "width": 28}},
        {"class_name": "Conv2D", "module": "mine", "registered_name": "mine>Conv2D", "config": {"filters": 3}},
        {"class_name": "Softmax", "config": {"axis": 2}},
        {"class_name": "Rescaling", "config": {"scale": 2.0}},
        {"class_name": "Activation", "config": {"activation": "sigmoid"}},
    ],
)
def test_a_layer_that_changes_what_is_computed_is_refused(tmp_path, lenet5, layer):
    save_weights(tmp_path / "x.safetensors", lenet5)
    path = tmp_path / "x.json"
    for place in (2, 11):
        architecture = keras.architecture("lenet5")
        architecture["config"]["layers"].insert(place, layer)
        path.write_text(json.dumps(architecture))
        with pytest.raises(UserError, match=f"^{path}: "):
            load_weights(tmp_path / "x.safetensors", architecture=path)


def test_what_changes_nothing_is_accepted(tmp_path, lenet5):
    architecture = keras.architecture("lenet5")
    layers = architecture["config"]["layers"]
    for kind in ("GaussianNoise", "RandomFlip", "SpatialDropout2D", "ActivityRegularization"):
        layers.insert(1, {"class_name": kind, "config": {"whatever": 1}})
    layers.append({"class_name": "Activation", "config": {"activation": "softmax"}})
    layers[5]["config"] |= {"activation": {"class_name": "ReLU", "config": {"max_value": None, "threshold": 0.0}}}
    layers[5]["config"] |= {"kernel_regularizer": {"class_name": "L2"}, "groups": 1, "quantization_config": None}
    (tmp_path / "x.json").write_text(json.dumps(architecture))
    save_weights(tmp_path / "x.safetensors", lenet5)
    load_weights(tmp_path / "x.safetensors", architecture=tmp_path / "x.json")


def test_half_precision_is_said(tmp_path, lenet5, capsys):
    architecture = keras.architecture("lenet5")
    save_weights(tmp_path / "x.h5", lenet5)
    architecture["config"]["layers"][1]["config"]["dtype"] = "mixed_float16"
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file.attrs["model_config"] = json.dumps(architecture)
    load_weights(tmp_path / "x.h5")
    assert "mixed_float16" in capsys.readouterr().err


def functional(change):
    """LeNet-5 by the functional interface, with a branch or a dropout that stays on if asked for."""
    x = first = L.Input((32, 32, 3))
    layers = lenet5_layers()
    for layer in layers[:2]:
        x = layer(x)
    if change == "dropout":
        x = L.Dropout(0.5)(x, training=True)
    for layer in layers[2:-2]:
        x = layer(x)
    if change == "twice":
        x = L.Dense(200, "relu")(x)
        dense = L.Dense(200, "relu")
        x = dense(dense(x))
    last = layers[-1](layers[-2](x))
    return api.Model(first, last)


def test_functional_networks(tmp_path, lenet5):
    network = functional(None)
    network.set_weights(keras.params_to_keras(lenet5.params))
    for kind in KINDS[::2]:
        network.save(tmp_path / f"x.{kind}")
        jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / f"x.{kind}").params, lenet5.params)
    for change in ("dropout", "twice"):
        functional(change).save(tmp_path / f"{change}.keras")
        with pytest.raises(UserError, match="training=True" if change == "dropout" else "no chain"):
            load_weights(tmp_path / f"{change}.keras")
