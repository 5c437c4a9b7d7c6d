"""Exported files compute what the network computes, in their own runtimes."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import keras, needs_frameworks, torch

from cifar_jax import export, export_formats, load_dataset, load_pretrained
from cifar_jax.errors import UserError
from cifar_jax.models.all_cnn import AllCNN
from cifar_jax.onnx_graph import to_onnx
from cifar_jax.pretrained import pretrained_path
from cifar_jax.weights import keras as keras_weights
from cifar_jax.weights import pytorch
from cifar_jax.weights.files import load_weights, save_weights

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


pytestmark = pytest.mark.usefixtures("direct_convolutions", "keras_files_read_here")


@pytest.fixture(autouse=True)
def few_images(monkeypatch, tiny_dataset):
    few = dataclasses.replace(tiny_dataset, test_images=tiny_dataset.test_images[:7])
    monkeypatch.setattr(export, "load_dataset", lambda *_: few)


@functools.cache
def seven_logits(network):
    """Returns a released network's scaled images, the first seven test digits, and its logits."""
    model, variables, preprocess = load_pretrained(network)
    images = np.asarray(preprocess(load_dataset("digits").test_images[:7]))
    return images, np.asarray(jax.jit(model.apply)(variables, images))


def run_file(path, images):
    """Returns the logits of a file in its own runtime, without this package."""
    if path.suffix == ".onnx":
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]
    return np.asarray(jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)(images))


@pytest.mark.parametrize("name", ["net.onnx", "net.stablehlo"])
def test_a_file_gives_the_networks_logits(name, tmp_path, tiny_dataset, run_command):
    """For scaled pixels as for uint8 images, and for any number of them."""
    scaled, expected = seven_logits("lenet5")
    for flags, inputs in ((), scaled), (("--uint8",), tiny_dataset.test_images[:7]):
        path = tmp_path / f"{len(flags)}-{name}"
        status, output, _ = run_command(export.main, path, "--pretrained", "lenet5", *flags)
        assert (status, str(path) in output) == (0, True)
        assert ("0.2435" in output) == (not flags)
        for count in (7, 1):
            assert np.abs(run_file(path, inputs[:count]) - expected[:count]).max() < 1e-4 * np.abs(expected).max()


@needs_frameworks
@pytest.mark.parametrize(
    ("network", "name"),
    [
        *(("lenet5", name) for name in ("net.pth", "net.keras", "net.h5", "net.weights.h5", "net.safetensors")),
        *(("all_cnn", name) for name in ("net.pth", "net.keras", "net.safetensors")),
    ],
)
def test_a_weight_file_gives_the_networks_logits(network, name, tmp_path, run_command):
    """Opened as a reader would open it."""
    images, expected = seven_logits(network)
    status, output, _ = run_command(export.main, tmp_path / name, "--pretrained", network)
    assert (status, "0.2435" in output) == (0, True)
    if name == "net.pth":
        twin = pytorch.create_model(network).eval()
        twin.load_state_dict(torch.load(tmp_path / name, weights_only=True), strict=network == "all_cnn")
        logits = twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).detach().numpy()
    elif name == "net.safetensors":
        weights = load_weights(tmp_path / name)
        logits = weights.create_module().apply({"params": weights.params}, images)
    elif name == "net.weights.h5":
        twin = keras_weights.create_model(network)
        twin.load_weights(tmp_path / name)
        logits = twin.predict_on_batch(images)
    else:
        logits = keras.models.load_model(tmp_path / name).predict_on_batch(images)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@needs_frameworks
def test_a_format_may_be_named(tmp_path, run_command):
    flags = ("--format", "pytorch", "--json")
    status, output, _ = run_command(export.main, tmp_path / "model.bin", "--pretrained", "lenet5", *flags)
    assert (status, json.loads(output)["format"]) == (0, "pytorch")
    assert (tmp_path / "model.bin").read_bytes().startswith(b"PK")
    assert export_formats.choose_format(Path("net.pt"), None)[0] == "pytorch"
    assert export_formats.choose_format(Path("net"), "stablehlo")[0] == "stablehlo"


@needs_frameworks
def test_a_weight_file_keeps_the_final_relu(tmp_path, tiny_dataset):
    """The pretrained original has one. Without it the negative logits would differ."""
    weights = load_weights(pretrained_path("all_cnn"))
    save_weights(tmp_path / "relu.safetensors", dataclasses.replace(weights, final_relu=True))
    source = export.load_source(export.SourceFlags(weights=tmp_path / "relu.safetensors"))
    for name in ("net.keras", "net.pth"):
        assert export.export(source, tmp_path / name)["difference"] < 1e-4


def test_an_onnx_file_describes_itself(tmp_path, run_command):
    assert run_command(export.main, tmp_path / "net.onnx", "--pretrained", "lenet5_reference")[0] == 0
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"])[2:4] == ["bird", "cat"]
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == ([0.5], [0.5])
    assert (session.get_inputs()[0].shape, session.get_outputs()[0].shape) == (["N", 32, 32, 3], ["N", 10])


@pytest.mark.parametrize("final_relu", [False, True])
def test_the_all_cnn_as_onnx(final_relu):
    """Padding, both pools' windows and the average are as in JAX."""
    model, images = AllCNN(final_relu=final_relu), np.random.default_rng(0).normal(size=(3, 19, 18, 3))
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(0, 2 / np.sqrt(leaf.size), leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0), images.astype(np.float32))["params"],
    )
    function = lambda images: model.apply({"params": params}, images)
    graph = to_onnx(function, jnp.float32, images.shape[1:])
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.astype(np.float32)})
    expected = np.asarray(jax.jit(function)(images.astype(np.float32)))
    assert np.abs(expected).max() > 1e-6
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_operation_without_a_rule_is_named():
    with pytest.raises(UserError, match="sin"):
        to_onnx(lambda images: jnp.sin(images).sum((1, 2)), jnp.float32, (32, 32, 3))


@needs_frameworks
@pytest.mark.parametrize(("name", "change"), [("net.onnx", 0.1), ("net.pth", 0.1), ("net.pth", np.float32("nan"))])
def test_a_file_with_other_logits_is_not_written(name, change, tmp_path, run_command, monkeypatch):
    key, _ = export_formats.choose_format(tmp_path / name, None)
    form = export_formats.FORMATS[key]

    def other(*arguments):
        data, run = form.create(*arguments)
        return data, lambda images: run(images) + change

    monkeypatch.setitem(export_formats.FORMATS, key, dataclasses.replace(form, create=other))
    status, _, error = run_command(export.main, tmp_path / name, "--pretrained", "lenet5_reference")
    assert (status, error.count("\n"), "not written" in error) == (2, 1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "missing", "named"),
    [
        ("net.pth --uint8", None, "--uint8"),
        ("net.pth --format keras", None, "ends in .keras"),
        ("net --format keras", None, "end in .keras"),
        ("net", None, ".onnx, .stablehlo, .safetensors"),
        ("there.onnx", None, "exists"),
        ("nowhere/net.onnx", None, "nowhere"),
        ("net.onnx", "onnx", "cifar_jax[export]"),
        ("net.onnx", "onnxruntime", "cifar_jax[export]"),
        ("net.stablehlo", "flatbuffers", "cifar_jax[export]"),
        ("net.pth", "torch", "cifar_jax[parity]"),
        ("net.keras", "keras", "cifar_jax[parity]"),
    ],
)
def test_bad_input_is_one_line_and_status_2(name, missing, named, tmp_path, run_command, monkeypatch):
    (tmp_path / "there.onnx").write_text("mine")
    if missing:
        for module in [module for module in sys.modules if module.split(".")[0] == missing and missing != "torch"]:
            monkeypatch.delitem(sys.modules, module)
        for module in [module for module in sys.modules if module.startswith("jax._src.export.ser")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, missing, None)
    name, *flags = name.split()
    status, output, error = run_command(export.main, tmp_path / name, "--pretrained", "lenet5_reference", *flags)
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert named in error
    assert (tmp_path / "there.onnx").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_exists_is_named_before_anything_is_loaded(tmp_path, run_command):
    (tmp_path / "there.onnx").write_text("mine")
    status, _, error = run_command(export.main, tmp_path / "there.onnx", "--pretrained", "unknown")
    assert (status, "there.onnx exists" in error) == (2, True)


def test_a_network_that_computes_in_bfloat16_is_exported_in_float32(tiny_dataset):
    images = tiny_dataset.test_images[:2]
    for uint8 in (False, True):
        functions = [
            export_formats.create_network(
                export.load_source(export.SourceFlags(pretrained="lenet5_reference"), dtype), uint8
            ).function
            for dtype in ("bfloat16", "float32")
        ]
        np.testing.assert_array_equal(*(jax.jit(function)(images) for function in functions))


def test_a_run_is_exported_with_its_average(tmp_path, tiny_dataset):
    """What is exported is what is evaluated."""
    source = export.load_source(export.SourceFlags(pretrained="lenet5_reference"))
    averaged = jax.tree.map(lambda leaf: 2 * leaf, source.state.params)
    source = dataclasses.replace(source, state=source.state.replace(ema_params=averaged))
    assert export.export(source, tmp_path / "net.onnx")["difference"] < 1e-4
    images = np.asarray(tiny_dataset.test_images[:2] / np.float32(255) * 2 - 1, np.float32)
    expected = np.asarray(source.state.apply_fn({"params": jax.device_get(averaged)}, images))
    np.testing.assert_allclose(run_file(tmp_path / "net.onnx", images), expected, atol=1e-4 * np.abs(expected).max())
