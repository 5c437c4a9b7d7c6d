import dataclasses
import hashlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import assert_trees_close

from benchmarks.report.results import MEASURED, percent
from cifar_jax import evaluate, load_dataset, load_pretrained, pretrained_names
from cifar_jax.datasets import DATASETS, tfds
from cifar_jax.errors import UserError
from cifar_jax.pretrained import pretrained_path
from cifar_jax.weights.files import load_weights
from cifar_jax.weights.scaling import scaling_numbers


@pytest.fixture(scope="module")
def real_images(cifar10_dir):
    """The real CIFAR-10 without its training images, which take a quarter of a minute to decode."""
    info = DATASETS["cifar10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds, "SPLITS", ("test",))
        arrays = tfds.read(info, Path(cifar10_dir, info.tfds))
    labels = arrays["test_labels"].astype(np.int32)
    return dataclasses.replace(load_dataset("digits"), test_images=arrays["test_images"], test_labels=labels, info=info)


def card(name):
    return pretrained_path(name).with_suffix(".md").read_text()


def test_what_is_released():
    assert pretrained_names() == ["all_cnn", "lenet5", "lenet5_reference"]


@pytest.mark.parametrize(("name", "count", "right"), [("all_cnn", 100, 90), ("lenet5_reference", 300, 217)])
def test_a_released_network_classifies(name, count, right, real_images):
    """As many of the first predictions are right as measured before. All images would take a minute on a CPU."""
    model, variables, preprocess = load_pretrained(name)
    logits = jax.jit(model.apply)(variables, preprocess(real_images.test_images[:count]))
    # No two largest logits are within 0.001.
    assert (logits.argmax(-1) == real_images.test_labels[:count]).sum() == right


@pytest.mark.usefixtures("direct_convolutions")
@pytest.mark.parametrize("name", pretrained_names())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_released_network_gives_logits(name, dtype, tiny_dataset):
    model, variables, preprocess = load_pretrained(name, dtype)
    apply, images = jax.jit(model.apply), preprocess(tiny_dataset.test_images[:8])
    logits = apply(variables, images)
    assert logits.shape == (8, 10)
    assert logits.dtype == jnp.float32
    one_by_one = jnp.concatenate([apply(variables, images[i : i + 1]) for i in range(8)])
    assert_trees_close(logits, one_by_one, 1e-2 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 32, 32, 3), np.float32), np.zeros((2, 32, 32, 3), np.int8), np.zeros((32, 32, 3), np.uint8)]
)
def test_other_images_are_refused(images):
    """Images that are scaled twice would give logits, but only chance accuracy."""
    _, _, preprocess = load_pretrained("lenet5_reference")
    with pytest.raises(UserError, match=r"must be uint8 \[N, 32, 32, 3\]"):
        preprocess(images)


@pytest.mark.parametrize("name", pretrained_names())
def test_every_card_says_what_it_must(name):
    text = card(name)
    for word in ("Recipe", "Command", "Seed", "Data", "Hardware", "Date", "Limits"):
        assert f"| {word} |" in text
    mirror = "float32, averaged with the mirror image"
    for kind, title in {"float32": "float32", "bfloat16": "bfloat16", "flip_tta": mirror}.items():
        measured = MEASURED.load(f"pretrained_{name}_{kind}")["test_accuracy"]
        assert f"| Test accuracy, {title} | {percent(measured)} % |" in text
    measured = MEASURED.load(f"pretrained_{name}_report")
    assert f"| Expected calibration error, float32 | {percent(measured['calibration_error'])} % |" in text
    temperature = load_weights(pretrained_path(name)).temperature
    assert (temperature is None) == ("Probabilities are not calibrated" in text)
    if temperature is not None:
        assert temperature == MEASURED.load(f"temperature_{name}")["temperature"] == measured["temperature"]["value"]
        assert f"| Temperature | {temperature:.3f}: " in text
        error = percent(measured["temperature"]["calibration_error"])
        assert f"| Expected calibration error, float32, with the temperature | {error} % |" in text


TENSORS = {  # SHA-256 of the bytes after the header
    "all_cnn": "eeeae6c5a45f702437a8c927f906d5a91409216133d2b5de272c421ae38f7120",
    "lenet5": "4310a09145360fb57d564870642fe4167b07e5d5c63804c19dede47e628718cf",
    "lenet5_reference": "0d008cbc64d96a745ab63c0ba9b1455e25433076fe8d94fdeb9a4c15324caae3",
}


@pytest.mark.parametrize("name", pretrained_names())
def test_a_released_file_says_how_pixels_are_scaled(name):
    """Metadata and model card give the numbers of the scaling. The tensors are those of the release."""
    data = pretrained_path(name).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert hashlib.sha256(data[start:]).hexdigest() == TENSORS[name]
    metadata = json.loads(data[8:start])["__metadata__"]
    mean, std = (json.loads(metadata[key]) for key in ("mean", "std"))
    assert metadata["dataset"] == "cifar10"
    assert (mean, std) == tuple(map(list, scaling_numbers(metadata["input_scaling"], "cifar10")))
    for numbers in (mean, std):
        text = ", ".join(f"{number:.4f}" if number != 0.5 else "0.5" for number in numbers)
        assert f"({text})" in card(name)


def test_evaluate_reproduces_the_cards_accuracy(real_images, monkeypatch, run_command):
    """Exact to the digit. Of LeNet-5, because All-CNN takes a minute on a CPU."""
    monkeypatch.setattr(evaluate, "load_dataset", lambda name, data_dir: real_images)
    _, output, _ = run_command(evaluate.main, "--pretrained", "lenet5")
    accuracy = re.search(r"Test accuracy, float32 \| (\d\d\.\d\d) %", card("lenet5"))[1]
    assert f"accuracy {accuracy}% of 10,000 images" in output


def test_an_unknown_name_is_one_line(run_command):
    with pytest.raises(UserError, match="choose one of"):
        load_pretrained("resnet")
    for flags in (("--pretrained", "../models"), ("--pretrained", "lenet5", "--weights", "a.pth")):
        status, _, errors = run_command(evaluate.main, *flags)
        assert status == 2
        assert errors.count("\n") == 1
