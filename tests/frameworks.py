"""PyTorch and Keras for the tests that need them. Where they are not installed, a test that uses one is skipped.

Tests take `torch`, `keras` and `keras_layers` from here. The package and the benchmarks import the frameworks by
`import_torch` and `import_keras`, which conftest replaces by those of this module where the frameworks are absent.
"""

import importlib.util
import sys

import pytest

from cifar_jax.weights import keras as keras_weights
from cifar_jax.weights import pytorch as pytorch_weights

REASON = "needs PyTorch and Keras: pip install -e '.[parity]'"
ABSENT = not all(importlib.util.find_spec(name) for name in ("torch", "keras"))

needs_frameworks = pytest.mark.skipif(ABSENT, reason=REASON)


class OnUse:
    """A module that is imported when something of it is used."""

    def __init__(self, load):
        self._load = load

    def __getattr__(self, name):
        return getattr(self._load(), name)


def _or_skip(load, name):
    def call():
        if ABSENT and name not in sys.modules:  # a test of its absence puts None there
            pytest.skip(REASON)
        return load()

    return call


import_torch = _or_skip(pytorch_weights.import_torch, "torch")
import_keras = _or_skip(keras_weights.import_keras, "keras")
torch, keras, keras_layers = OnUse(import_torch), OnUse(import_keras), OnUse(lambda: import_keras().layers)


def skip_without_frameworks(patch):
    """Makes the package's own imports of a framework skip the test."""
    patch.setattr(pytorch_weights, "import_torch", import_torch)
    patch.setattr(keras_weights, "import_keras", import_keras)
