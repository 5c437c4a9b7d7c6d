"""Metadata of cifar_jax's files: strings by name, in .safetensors' metadata or in an attribute of Keras files.

The names are format ('cifar_jax'), model, final_relu ('True' or 'False'), input_scaling, mean and std (JSON, one number
per channel: a pixel becomes (pixel / 255 - mean) / std), num_classes and, if known, dataset, class_names (JSON) and
temperature (logits / temperature give calibrated probabilities). Older files lack mean, std and all later names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cifar_jax.batches import INPUT_SCALINGS
from cifar_jax.errors import UserError
from cifar_jax.models import get_model
from cifar_jax.weights.scaling import scaling_numbers

FORMAT = "cifar_jax"


def write_metadata(
    model: str,
    final_relu: bool,
    input_scaling: str,
    num_classes: int,
    dataset: str | None = None,
    class_names: Sequence[str] | None = None,
    temperature: float | None = None,
) -> dict[str, str]:
    """Returns the metadata described above."""
    mean, std = scaling_numbers(input_scaling, dataset)
    metadata = {"format": FORMAT, "model": model, "final_relu": str(final_relu), "input_scaling": input_scaling}
    metadata |= {"mean": json.dumps(mean), "std": json.dumps(std), "num_classes": str(num_classes)}
    metadata |= {} if dataset is None else {"dataset": dataset}
    metadata |= {} if temperature is None else {"temperature": repr(float(temperature))}
    return metadata | ({} if class_names is None else {"class_names": json.dumps(class_names, ensure_ascii=False)})


def read_metadata(metadata: Mapping[str, str], num_classes: int) -> dict[str, Any]:
    """Returns {'input_scaling', 'final_relu', 'dataset', 'class_names', 'temperature'}; None if it is not stored.

    Raises: UserError for invalid values.
    """
    get_model(str(metadata.get("model")))
    scaling, dataset = metadata.get("input_scaling"), metadata.get("dataset")
    if scaling not in (None, *INPUT_SCALINGS):
        raise UserError(f"its metadata contain an unknown input_scaling {scaling!r}")
    if scaling is not None and "mean" in metadata:
        found, expected = (_parsed(metadata, name) for name in ("mean", "std")), scaling_numbers(scaling, dataset)
        if not all(_numbers(value, wanted) for value, wanted in zip(found, expected)):
            of = f"{scaling} pixels of {dataset or 'cifar10'}"
            raise UserError(f"its mean and std are not those of {of}: {expected[0]} and {expected[1]}")
    names = _parsed(metadata, "class_names")
    is_names = isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names)
    if names is not None and not is_names:
        raise UserError(f"its class_names are not a list of {num_classes} names")
    temperature = _parsed(metadata, "temperature")
    if temperature is not None and not (type(temperature) in (int, float) and 0 < temperature < math.inf):
        raise UserError("its temperature is not a number above 0")
    return {
        "input_scaling": scaling,
        "final_relu": {"True": True, "False": False}.get(str(metadata.get("final_relu"))),
        "dataset": dataset,
        "class_names": tuple(names) if names is not None else None,
        "temperature": temperature,
    }


def _parsed(metadata: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(metadata[name]) if name in metadata else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"its metadata contain a {name} that is not valid JSON") from error


def _numbers(value: Any, expected: Sequence[float]) -> bool:
    is_list = isinstance(value, list) and len(value) == len(expected) and all(type(x) in (int, float) for x in value)
    return is_list and bool(np.allclose(value, expected, rtol=0, atol=1e-6))
