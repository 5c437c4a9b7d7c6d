"""Registry of recipes. Each module of this folder except base.py is a recipe."""

from __future__ import annotations

import importlib
import pkgutil

from cifar_jax.configs.base import Config

_NAMES = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]
_MODULES = {name: importlib.import_module(f"{__name__}.{name}") for name in _NAMES}
RECIPES: dict[str, Config] = {name: module.CONFIG for name, module in _MODULES.items()}
DESCRIPTIONS: dict[str, str] = {name: (module.__doc__ or "").splitlines()[0] for name, module in _MODULES.items()}
