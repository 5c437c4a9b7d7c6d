"""The networks, as Flax Linen modules. A network is one file and one line of MODELS.

Every network takes scaled float images [N, H, W, 3] and returns logits [N, num_classes] in float32 (float64 if it
computes in float64). `dtype` is the computation type. Parameters are float32. `train=True` turns dropout on. Class
attributes tell the rest of the program about a network:

LAYERS: names of the layers with parameters, from the first to the last.
INPUT_SCALING: how the original program scales pixels.
RESIZABLE: whether it accepts image sizes other than 32×32.
CPU_STEPS_PER_CALL: training steps per compiled call on a CPU.

The package uses Linen instead of NNX because a pure `apply` fits one pmapped step with donated buffers.
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
    """Returns a network's class. Raises: UserError for an unknown name."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name]
