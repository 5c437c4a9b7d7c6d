"""The Python API. test_docs.py executes the examples of docs/api.md."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest

import cifar_jax
from benchmarks.report.results import ROOT

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
    sys.unraisablehook, threading.excepthook, list(warnings.filters), logging.getLogger().handlers,
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
