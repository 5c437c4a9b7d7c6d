import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import assert_trees_close

from benchmarks.report.results import MEASURED, percent
from cifar_jax import evaluate, load_pretrained, pretrained_names
from cifar_jax.errors import UserError
from cifar_jax.pretrained import pretrained_path
from cifar_jax.weights.scaling import scaling_numbers


def card(name):
    return pretrained_path(name).with_suffix(".md").read_text()


def test_what_is_released():
    assert pretrained_names() == ["all_cnn", "lenet5", "lenet5_reference"]


def test_the_all_cnn_classifies(cifar10):
    """460 of the first 500 predictions are right, as measured before. All images would take a minute on a CPU."""
    model, variables, preprocess = load_pretrained("all_cnn")
    logits = jax.jit(model.apply)(variables, preprocess(cifar10.test_images[:500]))
    assert (logits.argmax(-1) == cifar10.test_labels[:500]).sum() == 460  # no two largest logits are within 0.02


@pytest.mark.parametrize("name", pretrained_names())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_released_network_gives_logits(name, dtype, tiny_dataset):
    model, variables, preprocess = load_pretrained(name, dtype)
    apply, images = jax.jit(model.apply), preprocess(tiny_dataset.test_images)
    logits = apply(variables, images)
    assert logits.shape == (30, 10)
    assert logits.dtype == jnp.float32
    one_by_one = jnp.concatenate([apply(variables, images[i : i + 1]) for i in range(30)])
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


@pytest.mark.parametrize("name", [name for name in pretrained_names() if name.startswith("lenet5")])
def test_evaluate_reproduces_the_cards_accuracy(name, cifar10, monkeypatch, run_command):
    """Exact to the digit. Only LeNet-5, because All-CNN takes a minute on a CPU."""
    monkeypatch.setattr(evaluate, "load_dataset", lambda name, data_dir: cifar10)
    _, output, _ = run_command(evaluate.main, "--pretrained", name)
    accuracy = re.search(r"Test accuracy, float32 \| (\d\d\.\d\d) %", card(name))[1]
    assert f"accuracy {accuracy}% of 10,000 images" in output


def test_an_unknown_name_is_one_line(run_command):
    with pytest.raises(UserError, match="choose one of"):
        load_pretrained("resnet")
    for flags in (("--pretrained", "../models"), ("--pretrained", "lenet5", "--weights", "a.pth")):
        status, _, errors = run_command(evaluate.main, *flags)
        assert status == 2
        assert errors.count("\n") == 1
