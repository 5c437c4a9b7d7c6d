"""The command cifar_jax.train with a recipe "tiny", which compiles in a second, for tests that start processes.

Environment: TINY_SEED: seed of its random images and labels; TINY_FAILS: a system error instead of them, if "yes".
"""

import os
import sys

from cifar_jax.cluster import silence_xla

silence_xla(sys.argv)

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cifar_jax import models, ops
from cifar_jax.datasets import DATASETS, Dataset


class Tiny(nn.Module):
    """A convolution, a dropout and a dense layer."""

    LAYERS: ClassVar[tuple[str, ...]] = ("Conv_0", "Dense_0")
    INPUT_SCALING: ClassVar[str] = "symmetric"
    RESIZABLE: ClassVar[bool] = True
    CPU_STEPS_PER_CALL: ClassVar[int] = 2

    num_classes: int = 10
    dropout_rates: tuple[float, ...] = (0.2,)
    initializer: str = "original"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False):
        x = ops.Conv(4, 5, "VALID", nn.initializers.he_normal())(ops.max_pool(images, window=4, stride=4))
        x = ops.Dropout(self.dropout_rates[0])(nn.relu(x), train=train)
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


def load_tiny(name, data_dir):
    if os.environ.get("TINY_FAILS") == "yes":
        raise PermissionError(13, "Permission denied", "data")
    rng = np.random.default_rng(int(os.environ.get("TINY_SEED", "0")))
    images = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 50, dtype=np.int32)
    return Dataset(images[:42], labels[:42], images[42:], labels[42:], DATASETS["cifar10"], "random images")


def main():
    models.MODELS["tiny"] = Tiny  # before the flags' types are made
    from cifar_jax import plots, train, training
    from cifar_jax.configs import RECIPES
    from cifar_jax.configs.base import Config
    from cifar_jax.ops import winograd

    create_config = partial(Config, dataset="cifar10", model="tiny", dropout_rates=(0.2,), input_scaling="symmetric")
    RECIPES["tiny"] = create_config(workdir="run", batch_size=8, num_epochs=2, learning_rate=0.05)
    training.load_dataset = load_tiny
    plots.plot_run = lambda workdir: None
    winograd.pays = lambda *_: False  # the teacher compiles faster
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
