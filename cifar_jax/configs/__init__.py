"""The recipes by name."""

from cifar_jax.configs import all_cnn, all_cnn_fast, all_cnn_reference, lenet5, lenet5_reference, quickstart
from cifar_jax.configs.base import Config

_MODULES = (lenet5, lenet5_reference, all_cnn, all_cnn_fast, all_cnn_reference, quickstart)
RECIPES: dict[str, Config] = {module.__name__.rpartition(".")[2]: module.CONFIG for module in _MODULES}
DESCRIPTIONS: dict[str, str] = {name: (m.__doc__ or "").splitlines()[0] for name, m in zip(RECIPES, _MODULES)}
