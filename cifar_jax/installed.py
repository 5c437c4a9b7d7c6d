"""Imports packages that are not always installed."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_installed(name: str) -> ModuleType:
    """Imports a package. Raises: ImportError if it is not installed, even if the current folder has one of its name."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:  # a folder without __init__.py
        raise ImportError(f"No module named {name!r}")
    return module
