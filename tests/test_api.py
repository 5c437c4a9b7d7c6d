"""The Python API. test_docs.py executes the examples of docs/api.md."""

import dataclasses
import importlib
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import stop_at

import cifar_jax
from benchmarks.report.results import ROOT
from cifar_jax.checkpoint import Progress
from cifar_jax.configs import RECIPES
from cifar_jax.datasets import DATASETS, check_dataset
from cifar_jax.errors import UserError
from cifar_jax.evaluate import evaluate
from cifar_jax.outcomes import FailedTraining, Interrupted
from cifar_jax.predict import predict
from cifar_jax.sources import SourceFlags, load_source

PAGE = (ROOT / "docs/api.md").read_text()
SIGNATURES = re.findall(r"^## \w+\n\n`([\w.]+)\((.*)\)`$", PAGE, re.MULTILINE)


def test_every_public_name_has_a_section():
    documented = {name.removeprefix("cifar_jax.") for name, _ in SIGNATURES}
    assert set(cifar_jax.__all__) - {"__version__"} <= documented


@pytest.mark.parametrize(("name", "arguments"), SIGNATURES)
def test_a_sections_arguments_are_the_functions(name, arguments):
    module, _, attribute = name.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters.values()
    actual = [parameter for parameter in parameters if parameter.name not in ("self", "parent", "name_")]
    told = re.findall(r"(\w+)(?:=([^,(]+|\([^)]*\)))?(?:, |$)", arguments.removesuffix(", …"))
    if name in ("cifar_jax.AllCNN", "cifar_jax.LeNet5"):
        actual = [parameter for parameter in actual if parameter.name != "name"]
    assert [word for word, _ in told] == [parameter.name for parameter in actual][: len(told)]
    if not arguments.endswith("…"):
        assert len(told) == len(actual)
    for (_, default), parameter in zip(told, actual):
        if default not in ("…", "float32"):
            assert default == ("" if parameter.default is parameter.empty else repr(parameter.default))


@pytest.mark.slow
def test_importing_and_calling_changes_nothing_in_the_process():
    """Neither signals, hooks, variables nor JAX's configuration."""
    code = """
import logging, os, signal, sys, threading, warnings
import jax, matplotlib
numbers = sorted(signal.valid_signals())
state = lambda: [
    [signal.getsignal(number) for number in numbers], dict(os.environ), dict(jax.config.values), sys.excepthook,
    sys.unraisablehook, threading.excepthook, list(warnings.filters), list(logging.getLogger().handlers),
    logging.getLogger("absl").level, os.getcwd(), sys.stdout, sys.stderr, matplotlib.rcParams.copy(),
]
import flax.linen, optax, orbax.checkpoint, scipy.ndimage, sklearn.datasets, tqdm, tyro  # which may change them
before = state()
import cifar_jax
for name in cifar_jax.__all__:
    getattr(cifar_jax, name)
import cifar_jax.convert, cifar_jax.evaluate, cifar_jax.export, cifar_jax.predict, cifar_jax.report.command
digits = cifar_jax.load_dataset("digits")
model, variables, preprocess = cifar_jax.load_pretrained("lenet5_reference")
model.apply(variables, preprocess(digits.test_images[:1]))
for number, (old, new) in enumerate(zip(before, state())):
    assert old == new, (number, old, new)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_reading_weights_starts_no_device():
    """A program that uses them in PyTorch shares the GPU, and its data loaders fork."""
    code = """
from cifar_jax.pretrained import load_pretrained, pretrained_path
from cifar_jax.weights.files import load_weights
from jax._src import xla_bridge
load_weights(pretrained_path("lenet5"))
load_pretrained("all_cnn")
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "error", [Interrupted(Progress(2, 3, 0.5), 9), FailedTraining("it diverged", RECIPES["quickstart"])]
)
def test_a_runs_end_reaches_another_process(error):
    """As from a ProcessPoolExecutor."""
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


@pytest.mark.usefixtures("direct_convolutions")
def test_preprocess_can_be_sent_and_takes_no_images():
    model, variables, preprocess = cifar_jax.load_pretrained("lenet5")
    preprocess = pickle.loads(pickle.dumps(preprocess))
    assert model.apply(variables, preprocess(np.zeros((0, 32, 32, 3), np.uint8))).shape == (0, 10)


@pytest.mark.usefixtures("direct_convolutions")
def test_predict_takes_uint8_and_compiles_once():
    source = load_source(SourceFlags(pretrained="lenet5"))
    with pytest.raises(UserError, match="must be uint8"):
        predict(source, np.zeros((1, 32, 32, 3), np.float32))
    assert predict(source, np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 10)
    for _ in range(2):
        predict(source, np.zeros((1, 32, 32, 3), np.uint8))
    assert source._compiled._cache_size() == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_images": np.zeros((8, 32, 32, 3), np.float32)}, r"train_images float32 \[8, 32, 32, 3\]"),
        ({"test_images": np.zeros((4, 64, 64, 3), np.uint8)}, "test_images uint8"),
        ({"test_images": np.zeros((0, 32, 32, 3), np.uint8), "test_labels": np.zeros(0, int)}, "no test images"),
        ({"train_labels": np.zeros((8, 1), np.uint8)}, r"train_labels uint8 \[8, 1\]: .* \[8\]"),
        ({"test_labels": np.zeros(4, np.float32)}, "test_labels float32"),
        ({"train_labels": list(range(8))}, "train_labels list: must be a NumPy array"),
        ({"train_images": [np.zeros((32, 32, 3), np.uint8)] * 8}, "train_images list:"),
        ({"train_labels": np.arange(8) - 1}, "train_labels are from -1 to 6: must be from 0 to 9"),
        ({"info": dataclasses.replace(DATASETS["digits"], class_names=("a", "b"))}, "info differs"),
        ({"info": DATASETS["cifar100"]}, "set it to cifar100"),
    ],
)
def test_a_programs_own_dataset_is_checked(changes, told):
    images, labels = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8)
    dataset = cifar_jax.datasets.Dataset(images, labels, images[:4], labels[:4], DATASETS["digits"], "mine")
    check_dataset(dataset, "digits", holdout=0)
    untested = dataclasses.replace(dataset, test_images=images[:0], test_labels=labels[:0])
    check_dataset(untested, "digits", holdout=2)
    with pytest.raises(UserError, match=told):
        cifar_jax.train_and_evaluate(RECIPES["quickstart"], dataclasses.replace(dataset, **changes))


@pytest.mark.usefixtures("no_figures")
def test_a_run_under_the_calling_programs_mesh(tiny_config, tiny_dataset):
    config = dataclasses.replace(tiny_config, num_epochs=2)
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        with pytest.raises(Interrupted):
            cifar_jax.train_and_evaluate(config, tiny_dataset, stop_at(6))
        summary = cifar_jax.train_and_evaluate(config, tiny_dataset)
        result = evaluate(load_source(SourceFlags(workdir=Path(config.workdir))))
    assert summary["epochs"] == result["epoch"] == 2
