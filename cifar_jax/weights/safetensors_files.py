"""cifar_jax's own format: Flax params as LAYER/kernel and LAYER/bias, with metadata (see metadata.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from cifar_jax.errors import UserError
from cifar_jax.weights.params import Params, layers_from_params

MAX_BYTES = 2**27
NAME = re.compile(r"\w+/(kernel|bias)")


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads ({name: tensor}, metadata). Raises: UserError if the file is damaged or far too large."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"has more than {MAX_BYTES // 2**20} MiB, much more than any supported network")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"damaged or not a safetensors file ({error})") from error
    wide = lambda tensor: tensor.astype(np.float32) if tensor.dtype.name == "bfloat16" else tensor
    return {name: wide(tensor) for name, tensor in tensors.items()}, metadata


def own_params(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> tuple[Params, str]:
    """Converts the tensors of cifar_jax's format to (params, network name). Raises: UserError for other tensors."""
    wrong = [name for name in tensors if not NAME.fullmatch(name)]
    if wrong:
        raise UserError(f"tensor {wrong[0]} belongs to no supported network")
    params = traverse_util.unflatten_dict(dict(tensors), sep="/")
    return params, layers_from_params(params, metadata.get("model"))[1]


def write_safetensors(params: Params, metadata: Mapping[str, str]) -> bytes:
    return safetensors.numpy.save(traverse_util.flatten_dict(params, sep="/"), dict(metadata))
