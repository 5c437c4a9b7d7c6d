import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from cifar_jax import calibration, convert, export, predict
from cifar_jax.errors import UserError
from cifar_jax.report.analysis import Predictions, cross_entropy, with_temperature
from cifar_jax.sources import SourceFlags, load_source
from cifar_jax.train import train_and_evaluate
from cifar_jax.weights.files import load_weights
from cifar_jax.weights.metadata import read_metadata, write_metadata

pytestmark = pytest.mark.usefixtures("direct_convolutions", "no_figures")


@pytest.fixture
def data(monkeypatch, tiny_dataset):
    """What the commands load. A test may replace its value."""
    holder = {"dataset": tiny_dataset}
    monkeypatch.setattr(calibration, "load_dataset", lambda *_: holder["dataset"])
    monkeypatch.setattr(export, "load_dataset", lambda *_: tiny_dataset)
    return holder


@pytest.fixture
def run(plain_config, tiny_dataset, compiled_once, capsys):
    """The folder of a run with 30 held-out images."""
    config = dataclasses.replace(plain_config, num_epochs=1, holdout=30)
    train_and_evaluate(config, tiny_dataset)
    capsys.readouterr()
    return Path(config.workdir)


def test_a_run_with_held_out_images_predicts_calibrated(run, data, tiny_dataset, tmp_path, run_command):
    """The file's temperature has the lowest loss on them, and predict divides the logits by it."""
    status, output, error = run_command(convert.main, run, tmp_path / "net.safetensors")
    weights = load_weights(tmp_path / "net.safetensors")
    assert (status, error, f"{weights.temperature:.4f}" in output) == (0, "", True)
    source = load_source(SourceFlags(workdir=run))
    held_out = Predictions(source.create_predictor()(tiny_dataset.train_images[-30:]), tiny_dataset.train_labels[-30:])
    loss = lambda factor: cross_entropy(with_temperature(held_out, factor * weights.temperature))
    assert weights.temperature != 1
    assert loss(1) < min(loss(0.9), loss(1.1))
    PIL.Image.fromarray(np.asarray(tiny_dataset.test_images[0])).save(tmp_path / "a.png")
    logits = source.create_predictor()(tiny_dataset.test_images[:1])[0]
    for flags, divisor in ((), weights.temperature), (("--no-calibration",), 1):
        arguments = ("--weights", tmp_path / "net.safetensors", "--json", "--top", 10, *flags, tmp_path / "a.png")
        told = json.loads(run_command(predict.main, *arguments)[1])[0]["probabilities"]
        expected = jax.nn.softmax(np.float32(logits / divisor))
        np.testing.assert_allclose([told[digit] for digit in "0123456789"], expected, rtol=1e-4)


def test_other_files_keep_it_or_say_that_they_cant(run, data, tmp_path, run_command):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    status, output, _ = run_command(export.main, tmp_path / "net.onnx", "--workdir", run)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    temperature = float(session.get_modelmeta().custom_metadata_map["temperature"])
    assert (status, f"{temperature:.4f}" in output) == (0, True)
    assert run_command(convert.main, run, tmp_path / "net.h5")[0] == 0
    assert load_weights(tmp_path / "net.h5").temperature == temperature
    pytest.importorskip("torch")
    assert "does not store the temperature" in run_command(convert.main, run, tmp_path / "net.pth")[1]


def test_other_data_gives_no_temperature(run, data, tiny_dataset, tmp_path, run_command):
    """In another order, the last images are not those that were held out."""
    data["dataset"] = dataclasses.replace(tiny_dataset, train_labels=tiny_dataset.train_labels[::-1].copy())
    status, output, error = run_command(convert.main, run, tmp_path / "net.safetensors")
    assert (status, error.count("\n"), "no temperature is stored" in error) == (0, 1, True)
    assert "temperature" not in output
    assert load_weights(tmp_path / "net.safetensors").temperature is None


def test_other_data_are_seen_for_a_run_in_the_home_folder(run, data, tiny_dataset, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    data["dataset"] = dataclasses.replace(tiny_dataset, train_labels=tiny_dataset.train_labels[::-1].copy())
    source = load_source(SourceFlags(workdir=Path("~", run.name)))
    assert calibration.calibrate(source).temperature is None


def test_a_run_on_all_images_has_none(plain_config, tiny_dataset, compiled_once, tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(calibration, "load_dataset", lambda *_: pytest.fail("the test set chooses nothing"))
    train_and_evaluate(dataclasses.replace(plain_config, num_epochs=1), tiny_dataset)
    assert run_command(convert.main, plain_config.workdir, tmp_path / "net.safetensors")[0] == 0
    assert load_weights(tmp_path / "net.safetensors").temperature is None


@pytest.mark.parametrize("value", ["0", "-1.5", "NaN", "Infinity", "true", '"warm"', "["])
def test_a_file_with_another_temperature_is_refused(value):
    metadata = write_metadata("lenet5", False, "unit", 10, temperature=1.25)
    assert read_metadata(metadata, 10)["temperature"] == 1.25
    with pytest.raises(UserError, match="temperature"):
        read_metadata(metadata | {"temperature": value}, 10)
