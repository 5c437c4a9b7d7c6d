"""Our own file: Flax params as LAYER/kernel and LAYER/bias, with metadata that say all that a network needs.

Metadata (text): format 'cifar_jax', model, input_scaling, mean, std (three numbers each, of the channels), final_relu,
num_classes, and where they are known dataset and class_names. Older files lack mean, std and what follows final_relu.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from cifar_jax.errors import UserError
from cifar_jax.weights.params import Params, layers_from_params

MAX_BYTES = 2**27
NAME = re.compile(r"\w+/(kernel|bias)")


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors by name, and the metadata. Raises: UserError for a file that is damaged or far too large."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"has more than {MAX_BYTES // 2**20} MiB, much more than any of these networks")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"damaged or not a safetensors file ({error})") from error


def own_params(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> tuple[Params, str]:
    """(params, the network's name) of our own file. Raises: UserError for other tensors."""
    wrong = [name for name in tensors if not NAME.fullmatch(name)]
    if wrong:
        raise UserError(f"tensor {wrong[0]} is none of these networks'")
    params = traverse_util.unflatten_dict(dict(tensors), sep="/")
    return params, layers_from_params(params, metadata.get("model"))[1]


def class_names(metadata: Mapping[str, str], num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes, if the file has them. Raises: UserError if they are not one name a class."""
    if "class_names" not in metadata:
        return None
    try:
        names = json.loads(metadata["class_names"])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise UserError(f"its class_names are not the names of {num_classes} classes")
    return tuple(names)


def write_safetensors(params: Params, metadata: Mapping[str, Any]) -> bytes:
    """Metadata that are no text become JSON."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    return safetensors.numpy.save(traverse_util.flatten_dict(params, sep="/"), {"format": "cifar_jax"} | texts)
