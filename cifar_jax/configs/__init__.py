"""Registry of recipes. Each module of this folder except base.py is a recipe."""

from __future__ import annotations

import importlib
import pkgutil

from cifar_jax.configs.base import Config

RECIPES: dict[str, Config] = {}
DESCRIPTIONS: dict[str, str] = {}
FAULTY: dict[str, str] = {}  # recipes that can't be used: the name, and a line that says why


def load_recipe(name: str) -> None:
    """Puts a module of this folder into RECIPES, or into FAULTY."""
    try:
        module = importlib.import_module(f"{__name__}.{name}")
        if not isinstance(module.CONFIG, Config):
            raise TypeError("CONFIG is not a Config")
    except Exception as error:  # whatever it is, the other recipes go on
        FAULTY[name] = f"cifar_jax/configs/{name}.py: {error}"
    else:
        RECIPES[name] = module.CONFIG
        DESCRIPTIONS[name] = (module.__doc__ or "").strip().partition("\n")[0]


for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        load_recipe(_module.name)
