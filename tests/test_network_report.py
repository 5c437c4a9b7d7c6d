"""The report of a trained network: its numbers, its files, and the page in a browser."""

import base64
import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from cifar_jax import report, sources
from cifar_jax.errors import UserError
from cifar_jax.pretrained import pretrained_path
from cifar_jax.report import analysis, command, corruptions, figures, sections
from cifar_jax.report.analysis import Predictions
from cifar_jax.sources import SourceFlags, load_source
from cifar_jax.weights.files import load_weights

pytestmark = pytest.mark.usefixtures("direct_convolutions")


@pytest.fixture
def tiny_cifar10(monkeypatch, tiny_dataset):
    monkeypatch.setattr(command, "load_dataset", lambda *_: tiny_dataset)
    monkeypatch.setattr(sources, "BATCH_SIZE", 30)
    monkeypatch.setattr(sections, "GRID", 4)
    return tiny_dataset


@pytest.fixture
def no_pictures(monkeypatch):
    """A report draws none: for the tests of its other parts, since they take most of its time."""
    for name in [name for name in vars(figures) if name.startswith("draw_")]:
        monkeypatch.setattr(figures, name, lambda *_, **__: b"")


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


# --- Numbers ---


def predictions(*rows):
    """From (label, probabilities) each."""
    return Predictions(np.log([row for _, row in rows]), np.array([label for label, _ in rows]))


def test_the_interval_is_wilsons():
    """Two rows of table I in Newcombe 1998 (Statistics in Medicine 17, method 3)."""
    assert analysis.wilson_interval(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert analysis.wilson_interval(0, 20) == (pytest.approx(0, abs=1e-12), pytest.approx(0.1611, abs=5e-5))


def test_the_calibration_error_by_hand():
    """Two images with confidence 0.9, one of them right, and one with 0.6 that is right."""
    tested = predictions((0, (0.9, 0.1)), (1, (0.9, 0.1)), (1, (0.4, 0.6)))
    assert [count for *_, count in analysis.reliability(tested)] == [1, 2]
    assert analysis.calibration_error(tested) == pytest.approx((2 * abs(0.9 - 0.5) + abs(0.6 - 1)) / 3)
    assert analysis.calibration_error(predictions((0, (1 - 1e-12, 1e-12)))) == pytest.approx(0, abs=1e-9)


def test_the_temperature_of_logits_that_are_too_large():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 5))
    labels = np.array([rng.choice(5, p=row / row.sum()) for row in np.exp(logits)])
    overconfident = Predictions(3 * logits, labels)
    temperature = analysis.fit_temperature(overconfident)
    assert temperature == pytest.approx(3, rel=0.05)
    scaled = analysis.with_temperature(overconfident, temperature)
    assert scaled.accuracy == overconfident.accuracy
    assert analysis.calibration_error(scaled) < 0.3 * analysis.calibration_error(overconfident)


def test_precision_recall_and_confusion_by_hand():
    tested = Predictions(np.array([[2.0, 1, 0], [1, 2, 0], [0, 2, 0]]), np.array([0, 0, 1]))
    first, second, third = analysis.per_class(tested)
    assert (first["precision"], first["recall"], first["images"]) == (1, 0.5, 2)
    assert (second["precision"], second["recall"]) == (0.5, 1)
    assert (third["precision"], third["recall"], third["images"]) == (0, 0, 0)
    assert analysis.confusion(tested).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


# --- Disturbed images ---


@pytest.mark.parametrize("name", corruptions.DISTURBANCES)
def test_disturbances_grow_and_are_repeatable(name, images):
    results = [corruptions.disturbed(name, images, severity) for severity in corruptions.SEVERITIES]
    assert {(result.shape, result.dtype) for result in results} == {(images.shape, np.dtype(np.uint8))}
    np.testing.assert_array_equal(results[2], corruptions.disturbed(name, images, 3))
    distances = [np.abs(result.astype(float) - images).mean() for result in results]
    assert distances[0] > 1
    if name != "shift":  # noise pixels are as far from each other at any distance
        assert distances == sorted(distances)


def test_a_shift_moves_the_whole_image(images):
    flat = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (40, 32, 32, 3))
    moved = corruptions.disturbed("shift", flat, 1)[:, 10, 10, 0].astype(int) - flat[:, 10, 10, 0]
    assert set(moved) == {-16, 0, 16}


def test_sets_in_both_layouts(images, tmp_path):
    labels = np.arange(6)
    np.save(tmp_path / "v6_data.npy", images)
    np.save(tmp_path / "v6_labels.npy", labels)
    ((name, found, found_labels),) = corruptions.read_sets(corruptions.find_sets(tmp_path))
    assert name == "v6"
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(found_labels, labels)
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "fog.npy", images[:5])
    np.save(tmp_path / "c" / "labels.npy", labels[:5])
    sets = list(corruptions.read_sets(corruptions.find_sets(tmp_path / "c")))
    assert [name for name, *_ in sets] == [f"fog, severity {severity}" for severity in range(1, 6)]
    np.testing.assert_array_equal(sets[3][1], images[3:4])


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ((), ""),
        (("floats", "labels"), "floats.npy"),
        (("alone",), "labels.npy"),
        (("new_data", "new_labels"), "0 to 9"),
    ],
)
def test_sets_that_cant_be_read(files, named, tmp_path):
    arrays = {"floats": np.zeros((5, 32, 32, 3), np.float32), "labels": np.zeros(5, int), "new_labels": np.full(5, 10)}
    for name in files:
        np.save(tmp_path / f"{name}.npy", arrays.get(name, np.zeros((5, 32, 32, 3), np.uint8)))
    with pytest.raises(UserError, match=f"{tmp_path}.*{named}"):
        corruptions.find_sets(tmp_path)  # before anything is measured


# --- Files ---


def test_a_report_is_one_page_with_its_numbers(tmp_path, tiny_cifar10, run_command):
    np.save(tmp_path / "v6_data.npy", tiny_cifar10.test_images[:5])
    np.save(tmp_path / "v6_labels.npy", tiny_cifar10.test_labels[:5])
    out = tmp_path / "new" / "report"
    arguments = ("--out", out, "--pretrained", "lenet5_reference", "--disturbed-images", 6, "--sets", tmp_path)
    status, output, error = run_command(report.main, *arguments)
    assert (status, error) == (0, "")
    assert str(out / "report.html") in output

    numbers, text = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    source = load_source(SourceFlags(pretrained="lenet5_reference"))
    scaled = np.asarray(tiny_cifar10.test_images / np.float32(255) * 2 - 1, np.float32)
    logits = np.asarray(source.state.apply_fn({"params": jax.device_get(source.state.params)}, scaled))
    assert numbers["test_accuracy"] == (logits.argmax(1) == tiny_cifar10.test_labels).mean()
    assert numbers["interval_95"][0] < numbers["test_accuracy"] < numbers["interval_95"][1]
    assert set(numbers["disturbed"]) >= {*corruptions.DISTURBANCES, "num_examples"}
    assert numbers["sets"]["v6"]["num_examples"] == 5
    temperature = numbers["temperature"]
    assert temperature["value"] == load_weights(pretrained_path("lenet5_reference")).temperature
    assert f"{temperature['calibration_error']:.2%}" in text

    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', text)
    assert len(pictures) == text.count("<img") == len(list(out.glob("*.png"))) == 7
    assert {base64.b64decode(data) for data, _ in pictures} == {path.read_bytes() for path in out.glob("*.png")}
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)  # nothing is loaded from elsewhere
    assert f"{numbers['test_accuracy']:.2%}" in text


def test_a_network_without_a_temperature(tmp_path, tiny_cifar10, no_pictures, monkeypatch):
    source = dataclasses.replace(load_source(SourceFlags(pretrained="lenet5_reference")), temperature=None)
    monkeypatch.setattr(command, "load_dataset", lambda *_: tiny_cifar10)
    assert "temperature" not in command.report(command.Arguments(tmp_path, disturbed_images=0), source)


def test_a_run_with_held_out_images_gets_a_temperature(tmp_path, tiny_cifar10, no_pictures, monkeypatch):
    """Fitted on them and not on the test set."""
    source = load_source(SourceFlags(pretrained="lenet5_reference"))
    config = dataclasses.replace(source.config, holdout=40)
    source = dataclasses.replace(source, config=config, origin={"workdir": str(tmp_path)})
    logits, _ = command.create_functions(source)
    predicted = logits(tiny_cifar10.train_images).argmax(1).astype(np.int32)
    labels = np.where(np.arange(90) % 5, predicted, tiny_cifar10.train_labels)  # mostly right, as after a training
    labelled = dataclasses.replace(tiny_cifar10, train_labels=labels)
    monkeypatch.setattr(command, "load_dataset", lambda *_: labelled)
    held_out = Predictions(logits(labelled.train_images[50:]), labels[50:])
    assert 0.1 < analysis.fit_temperature(held_out) < 10  # not at a bound
    numbers = command.report(command.Arguments(tmp_path, disturbed_images=0), source)
    assert numbers["temperature"]["value"] == pytest.approx(analysis.fit_temperature(held_out), rel=1e-4)
    assert "disturbed" not in numbers
    assert not (tmp_path / "disturbed.png").exists()


def test_importance_is_where_the_logit_changes(images):
    """Of a network that looks at one pixel alone."""
    source = load_source(SourceFlags(pretrained="lenet5_reference"))
    one_pixel = lambda variables, images: images[:, 3:4, 5, :1].reshape(-1, 1) * jax.numpy.ones((1, 10))
    source = dataclasses.replace(source, state=source.state.replace(apply_fn=one_pixel))
    _, importance = command.create_functions(source)
    heat = importance(images)
    assert np.argwhere(heat).tolist() == [[number, 3, 5] for number in range(6)]


def test_bad_input_is_one_line_and_status_2(tmp_path, tiny_cifar10, no_pictures, run_command):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    few = ("--pretrained", "lenet5_reference", "--disturbed-images", 0)
    for arguments, text in {
        (): "--out",
        ("--out", tmp_path / "file", *few): "--out ",
        ("--out", tmp_path / "file" / "below", *few): "--out ",
        ("--out", tmp_path / "x", "--disturbed-images", -1): "--disturbed-images -1",
        ("--out", tmp_path / "x", "--pretrained", "resnet"): "'resnet'",
        ("--out", tmp_path / "x", *few, "--sets", tmp_path / "empty"): "empty",
    }.items():
        status, output, error = run_command(report.main, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1), arguments
        assert text in error
    assert not (tmp_path / "x").exists()


BROWSER = """
import json, os, sys
os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
from PySide6.QtCore import QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

application, messages = QApplication(["browser"]), []

class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        messages.append(message)

def finish(answer):
    print(json.dumps([json.loads(answer), messages]))
    application.quit()

script = '''JSON.stringify([document.documentElement.scrollWidth, innerWidth, document.images.length,
    [...document.images].filter(image => !image.alt || !image.naturalWidth).length])'''
view = QWebEngineView()
view.setPage(page := Page(view))
view.resize(int(sys.argv[2]), 900)
page.loadFinished.connect(lambda _: page.runJavaScript(script, finish))
view.load(QUrl.fromLocalFile(sys.argv[1]))
view.show()
application.exec()
"""


@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_in_chromium(width, tmp_path, tiny_cifar10, run_command):
    """No error in the console, no horizontal scroll, and every picture is there and has a text."""
    pytest.importorskip("PySide6.QtWebEngineWidgets", reason="needs Chromium: pip install PySide6==6.8.1")
    few = ("--pretrained", "lenet5_reference", "--disturbed-images", 6)
    assert run_command(report.main, "--out", tmp_path, *few)[0] == 0
    words = [sys.executable, "-c", BROWSER, tmp_path / "report.html", str(width)]
    output = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    (content, window, pictures, incomplete), messages = json.loads(output.splitlines()[-1])
    assert (window, pictures, incomplete, messages) == (width, 7, 0, [])
    assert content <= window
