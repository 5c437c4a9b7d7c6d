"""cifar_jax: two published CIFAR-10 classifiers, an All-CNN and a LeNet-5 variant, in JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_jax.configs.base import Config
    from cifar_jax.datasets import load_dataset
    from cifar_jax.models.all_cnn import AllCNN
    from cifar_jax.models.lenet5 import LeNet5
    from cifar_jax.pretrained import load_pretrained, pretrained_names
    from cifar_jax.train import train_and_evaluate

__version__ = "0.1.0"
__all__ = [
    "AllCNN",
    "Config",
    "LeNet5",
    "__version__",
    "load_dataset",
    "load_pretrained",
    "pretrained_names",
    "train_and_evaluate",
]

_MODULES = {
    "AllCNN": "models.all_cnn",
    "Config": "configs.base",
    "LeNet5": "models.lenet5",
    "load_dataset": "datasets",
    "load_pretrained": "pretrained",
    "pretrained_names": "pretrained",
    "train_and_evaluate": "train",
}


def __getattr__(name: str) -> Any:
    """Imports a name's module, and with it JAX, on first use: a command imports this package before it handles Ctrl-C.

    The functions `predict`, `evaluate`, `export` and `report` are in the modules of the same names.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
