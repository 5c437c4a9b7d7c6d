"""Keras' files and architectures: every field that changes the computation is supported or refused.

fixtures/keras_2_* are of a real Keras 2.15 (see fixtures/make_keras_2_files.py).
"""

import copy
import dataclasses
import functools
import gzip
import json
import zipfile
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from frameworks import keras as api
from frameworks import keras_layers as L
from weight_files import random_weights

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.errors import UserError
from cifar_jax.models import MODELS
from cifar_jax.weights import keras
from cifar_jax.weights.files import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("keras_files_read_here", "direct_convolutions")
FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ("keras", "weights.h5", "h5")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@functools.cache
def jitted_apply(model):
    return jax.jit(MODELS[model]().apply)


def logits(weights, scaling=None):
    statistics = pixel_statistics(scaling or weights.input_scaling, weights.dataset or "cifar10")
    images = scale_images(jnp.asarray(IMAGES), *statistics)
    return np.asarray(jitted_apply(weights.model)({"params": weights.params}, images))


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def unpacked(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.decompress((FIXTURES / f"keras_2_{name}.gz").read_bytes()))
    return path


# --- Files of trained Keras 2.15 networks ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["all_cnn", "lenet5", "nested"])
def test_files_of_a_trained_keras_2_network(tmp_path, name, kind):
    """Besides weights they contain metrics/mean/vars/0 and the optimizer's state."""
    expected = np.array(json.loads((FIXTURES / "keras_2_probabilities.json").read_text())[name])
    path = unpacked(tmp_path, f"{name}.{kind}")
    if (name, kind) == ("nested", "weights.h5"):  # only the architecture has the scale of Rescaling
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


# --- Fields of an architecture ---


def lenet5_layers(flatten=None, **conv):
    data_format = {"data_format": conv["data_format"]} if "data_format" in conv else {}
    return [
        *(L.Conv2D(32, 5, activation="relu", **conv), L.MaxPooling2D(2, **data_format)),
        *(L.Conv2D(64, 5, activation="relu", **conv), L.MaxPooling2D(2, **data_format), flatten or L.Flatten()),
        *(L.Dense(200, "relu"), L.Dense(100, "relu"), L.Dense(10)),
    ]


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("flatten", ["plain", "channels_first"])
def test_channels_first(tmp_path, lenet5, kind, flatten, capsys):
    """A plain Flatten keeps channels first. Flatten(channels_first) moves them last."""
    layers = lenet5_layers(
        data_format="channels_first",
        flatten=None if flatten == "plain" else L.Flatten(data_format="channels_first"),
    )
    network = api.Sequential([L.Input((3, 32, 32)), *layers])
    tensors = keras.params_to_keras(lenet5.params)
    if flatten == "plain":
        tensors[4] = tensors[4].reshape(5, 5, 64, 200).transpose(2, 0, 1, 3).reshape(1600, 200)
    network.set_weights(tensors)
    images = np.asarray(scale_images(jnp.asarray(IMAGES), (0.5,), (0.5,))).transpose(0, 3, 1, 2)
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


CHANGES = {  # changes of LeNet-5's architecture: (number of the layer, field, value)
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
    """LeNet-5 in the functional interface, optionally with a branch or with dropout that stays on."""
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
        with pytest.raises(UserError, match="training=True" if change == "dropout" else "single chain"):
            load_weights(tmp_path / f"{change}.keras")


# --- Scaling layers ---

MEAN, STD = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
OTHER_MEAN, OTHER_STD = np.array([0.3, 0.4, 0.5]), np.array([0.2, 0.25, 0.3])
SCALED = {  # layers, for pixels from 0 to 255 unless noted, and the expected reading
    "to 1": (lambda: [L.Rescaling(1 / 255)], 255, "unit", True),
    "to ±1": (lambda: [L.Rescaling(1 / 127.5, -1)], 255, "symmetric", True),
    "rescaled and normalised": (lambda: [L.Rescaling(1 / 255), L.Normalization(mean=MEAN, variance=STD**2)], 255,
                                "standardized", True),
    "normalised from 255": (lambda: [L.Normalization(mean=255 * MEAN, variance=(255 * STD) ** 2)], 255, "standardized",
                            True),
    "normalised from 1": (lambda: [L.Normalization(mean=MEAN, variance=STD**2)], 1, "standardized", True),
    "±1 from 1": (lambda: [L.Rescaling(2.0, -1)], 1, "symmetric", True),
    "twice": (lambda: [L.Rescaling(1 / 255), L.Rescaling(2.0, -1)], 255, "symmetric", True),
    "means only": (lambda: [L.Rescaling(1 / 255, offset=list(-MEAN))], 255, "standardized", False),
    "half": (lambda: [L.Rescaling(0.5 / 255)], 255, "unit", False),
    "other means": (lambda: [L.Rescaling(1 / 255), L.Normalization(mean=OTHER_MEAN, variance=OTHER_STD**2)], 255,
                    "unit", False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "case"),
    [*(("lenet5", case) for case in SCALED), *(("all_cnn", case) for case in ("to ±1", "means only", "other means"))],
)
def test_layers_that_scale_pixels_are_read(tmp_path, case, model, capsys, request):
    """Other scalings go exactly into the first convolution. Before padding that is impossible."""
    layers, unit, scaling, unchanged = SCALED[case]
    weights = request.getfixturevalue(model)
    twin = keras.create_model(model)
    network = api.Sequential([L.Input((32, 32, 3)), *layers(), *twin.layers])
    twin.set_weights(keras.params_to_keras(weights.params))
    network.save(tmp_path / "x.keras")
    if (model, case) == ("all_cnn", "other means"):
        with pytest.raises(UserError, match="convolution that pads"):
            load_weights(tmp_path / "x.keras")
        return
    loaded = load_weights(tmp_path / "x.keras")
    assert loaded.input_scaling == scaling
    assert "scale pixels" in capsys.readouterr().err
    expected = network(IMAGES.astype(np.float32) * (unit / 255), training=False).detach().numpy()
    assert_close(logits(loaded), expected)
    if unchanged:
        jax.tree.map(np.testing.assert_array_equal, loaded.params, weights.params)
    assert load_weights(tmp_path / "x.keras", input_scaling=scaling).input_scaling == scaling
    with pytest.raises(UserError, match="--input-scaling"):
        load_weights(tmp_path / "x.keras", input_scaling="unit" if scaling != "unit" else "symmetric")


@pytest.mark.parametrize("dataset", [None, "cifar10", "cifar100"])
def test_the_numbers_of_the_named_dataset_are_compared(tmp_path, lenet5, dataset):
    """CIFAR-10's statistics are not CIFAR-100's `standardized`: the difference goes into the first convolution."""
    twin = keras.create_model("lenet5")
    normalization = L.Normalization(mean=MEAN, variance=STD**2)
    network = api.Sequential([L.Input((32, 32, 3)), L.Rescaling(1 / 255), normalization, *twin.layers])
    twin.set_weights(keras.params_to_keras(lenet5.params))
    network.save(tmp_path / "x.keras")
    loaded = load_weights(tmp_path / "x.keras", dataset=dataset)
    expected = network(IMAGES.astype(np.float32), training=False).detach().numpy()
    assert_close(logits(loaded), expected)
    same = np.array_equal(loaded.params["Conv_0"]["kernel"], lenet5.params["Conv_0"]["kernel"])
    assert (same, loaded.dataset) == (dataset != "cifar100", dataset)


def test_a_variable_of_the_network_itself_is_one_line(tmp_path):
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        file["vars/0"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match=r"x\.weights\.h5"):
        load_weights(tmp_path / "x.weights.h5")


def test_an_adapted_normalization_in_every_file(tmp_path, lenet5):
    """Mean and variance are among the weights. The network is nested."""
    inner = api.Sequential(lenet5_layers())
    normalization = L.Normalization()
    normalization.adapt(IMAGES.astype(np.float32))
    network = api.Sequential([L.Input((32, 32, 3)), normalization, inner, L.Softmax()])
    inner.set_weights(keras.params_to_keras(lenet5.params))
    expected = network(IMAGES.astype(np.float32), training=False).detach().numpy()
    (tmp_path / "x.json").write_text(network.to_json())
    for kind in KINDS:
        path = tmp_path / f"x.{kind}"
        network.save_weights(path) if kind == "weights.h5" else network.save(path)
        loaded = load_weights(path, architecture=tmp_path / "x.json" if kind == "weights.h5" else None)
        np.testing.assert_allclose(jax.nn.softmax(logits(loaded)), expected, atol=1e-5)


# --- Written files ---


@pytest.mark.parametrize("kind", ["keras", "h5"])
@pytest.mark.parametrize("model", list(keras.TWINS))
def test_keras_opens_what_we_write(tmp_path, kind, model, request):
    """Keras 2.15 opens them too: fixtures/open_in_keras_2.py."""
    weights = request.getfixturevalue(model)
    save_weights(tmp_path / f"x.{kind}", weights)
    network = api.saving.load_model(tmp_path / f"x.{kind}")
    scaled = np.asarray(scale_images(jnp.asarray(IMAGES), *pixel_statistics(weights.input_scaling, "cifar10")))
    assert_close(network(scaled, training=False).detach().numpy(), logits(weights))


@pytest.mark.parametrize(("kind", "by_name"), [*((kind, False) for kind in KINDS), ("h5", True)])  # only for .h5
def test_the_originals_layer_list_takes_our_weights(tmp_path, all_cnn, kind, by_name):
    """The original's ReLUs are separate layers, and its convolutions are named conv2d_1 … conv2d_9."""
    layers = []
    for number, layer in enumerate((x for x in keras.create_model("all_cnn").layers if "conv" in x.name), 1):
        fields = {"name": f"conv2d_{number}", "padding": layer.padding}
        layers += [L.Conv2D(layer.filters, layer.kernel_size, **fields), L.Activation("relu")]
        layers += [L.Dropout(0.2)] if number == 1 else []
        layers += [L.MaxPooling2D(3, 2), L.Dropout(0.5)] if number in (3, 6) else []
    network = api.Sequential([L.Input((32, 32, 3)), *layers[:-1], L.GlobalAveragePooling2D(), L.Activation("softmax")])
    save_weights(tmp_path / f"x.{kind}", all_cnn)
    network.load_weights(tmp_path / f"x.{kind}", **({"by_name": True} if by_name else {}))
    for ours, theirs in zip(keras.params_to_keras(all_cnn.params), network.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["safetensors", *KINDS])
def test_our_files_say_how_pixels_are_scaled(tmp_path, kind, capsys):
    weights = random_weights("lenet5")
    names = tuple("abcdefghij")
    weights = dataclasses.replace(weights, input_scaling="standardized", dataset="cifar100", class_names=names)
    save_weights(tmp_path / f"x.{kind}", weights)
    loaded = load_weights(tmp_path / f"x.{kind}")
    assert (loaded.input_scaling, loaded.dataset, loaded.class_names) == ("standardized", "cifar100", names)
    assert capsys.readouterr().err == ""


def test_the_numbers_of_a_scaling(tmp_path, lenet5):
    weights = dataclasses.replace(lenet5, input_scaling="standardized")
    save_weights(tmp_path / "x.safetensors", weights)
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["mean"]) == [0.4914, 0.4822, 0.4465]
    assert json.loads(metadata["std"]) == [0.2470, 0.2435, 0.2616]
    data = (tmp_path / "x.safetensors").read_bytes().replace(b"0.4914", b"0.4915")
    (tmp_path / "y.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="its mean and std are not those of standardized pixels"):
        load_weights(tmp_path / "y.safetensors")
