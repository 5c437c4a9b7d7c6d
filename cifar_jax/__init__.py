"""cifar_jax: two published CIFAR-10 classifiers, an All-CNN and a LeNet-5 variant, in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_jax.pretrained import load_pretrained, pretrained_names

__version__ = "0.1.0"
__all__ = ["__version__", "load_pretrained", "pretrained_names"]


def __getattr__(name: str) -> Any:
    """Imports pretrained.py, and with it JAX, on first use: a command imports this package before it handles Ctrl-C."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cifar_jax import pretrained

    return getattr(pretrained, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
