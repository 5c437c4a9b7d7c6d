"""The networks, as Flax Linen modules: one file each, and one line of MODELS.

Linen and not NNX: both are supported, and a pure `apply` fits one pmapped, donated step without split and merge.
Every network takes float images [N, H, W, 3], scaled as its recipe says, and returns logits [N, num_classes] in float32
(float64 where it computes in float64). `dtype` is the type of the computation. Parameters are float32. `train=True`
turns dropout on. What the rest of the program must know of a network stands on its class:

LAYERS: names of the layers with parameters, from the first to the last.
INPUT_SCALING: how the original program scales pixels.
RESIZABLE: whether it takes images of other sizes than 32×32.
CPU_STEPS_PER_CALL: training steps of one compiled call on a CPU.
"""

from __future__ import annotations

from typing import Any

from cifar_jax.errors import UserError
from cifar_jax.models.all_cnn import AllCNN
from cifar_jax.models.initializers import unit_variance, whitening_kernel
from cifar_jax.models.lenet5 import LeNet5

__all__ = ["MODELS", "AllCNN", "LeNet5", "get_model", "unit_variance", "whitening_kernel"]

MODELS: dict[str, Any] = {"all_cnn": AllCNN, "lenet5": LeNet5}


def get_model(name: str) -> Any:
    """The class of a network. Raises: UserError for an unknown name."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name]
