"""Imports a Keras file's tensors and architecture as one of the networks."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.weights.keras import TWINS, twin_layers
from cifar_jax.weights.keras_files import KerasFile
from cifar_jax.weights.keras_json import check_steps, read_architecture, shape_steps, twin_steps
from cifar_jax.weights.keras_layers import Architecture, normalize
from cifar_jax.weights.metadata import read_metadata
from cifar_jax.weights.pairing import pair_tensors
from cifar_jax.weights.params import (
    Named,
    Params,
    expected_shapes,
    has_final_relu,
    num_classes_of,
    params_from_layers,
    reorder_flatten,
)
from cifar_jax.weights.scaling import absorb_scaling

MAX_JSON = 2**23


@dataclasses.dataclass(frozen=True)
class Found:
    """What a weight file contains. None: not stored. `scales`: its own layers scale pixels; `notes`: for the user."""

    model: str
    params: Params
    input_scaling: str | None = None
    final_relu: bool | None = None
    dataset: str | None = None
    class_names: tuple[str, ...] | None = None
    temperature: float | None = None
    scales: bool = False
    notes: tuple[str, ...] = ()


def load_architecture(path: Path) -> Architecture:
    """Reads an architecture file written with model.to_json(). Raises: UserError naming the file."""
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_JSON):
            raise UserError("not a Keras architecture: not a regular file, or too large")
        return read_architecture(json.loads(path.read_text()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a Keras architecture ({error})") from error


def import_keras_file(file: KerasFile, model: str | None, declared: Architecture | None, dataset: str | None) -> Found:
    """Converts a Keras file to params of a network.

    Args: model: None: found by the tensors' shapes; declared: the user's architecture, which replaces the file's;
    dataset: the one whose statistics a Normalization layer may have; None: CIFAR-10.
    Raises: UserError if the tensors or the architecture fit no network.
    """
    notes: list[str] = []
    own = read_architecture(file.config) if file.config is not None else None
    architecture = declared or own
    tensors, statistics = _without_statistics(file.tensors)
    if architecture and file.order == "none":
        tensors, ordered = _in_order(tensors, architecture.paths)
    else:
        ordered = file.order == "stated"
    paired = pair_tensors(tensors, model, order="stated" if ordered else "none")
    kernels, biases = ([array for _, array in paired.tensors[start::2]] for start in (0, 1))
    if file.flipped:  # Theano convolves, the others correlate
        kernels = [kernel[::-1, ::-1] if kernel.ndim == 4 else kernel for kernel in kernels]
        notes.append("written by the Theano backend: convolution kernels were rotated by 180°")
    layers = list(zip(kernels, biases))
    scaling = None
    if architecture:
        if architecture.flatten == "CHW":
            layers = reorder_flatten(layers, to_channels_last=True)
            notes.append("features are flattened with channels first: the next kernel's inputs were reordered")
        if architecture.dtype != "float32":
            notes.append(f"computes in {architecture.dtype} in Keras and in float32 here")
    elif statistics:
        raise UserError("has a Normalization layer: name its architecture with --architecture")
    if architecture and architecture.scales:
        if architecture.normalization:
            _add_statistics(architecture, statistics)
        padded = architecture.first_is_padded
        layers, scaling, line = absorb_scaling(layers, architecture.scale, architecture.offset, padded, dataset)
        notes.append(line)
    params = params_from_layers(layers, paired.model)
    final_relu = check_architecture(own, params, paired.model) if own and not declared else None
    if own and paired.model not in TWINS:
        notes.append(f"{paired.model} has no twin in Keras: only the kernels of the architecture were checked")
    said = read_metadata(file.metadata, num_classes_of(params, paired.model)) if file.metadata else {}
    said |= {"input_scaling": scaling or said.get("input_scaling")}
    said |= {"final_relu": final_relu if own else said.get("final_relu")}
    return Found(paired.model, params, scales=scaling is not None, notes=tuple(notes), **said)


def check_architecture(architecture: Architecture, params: Params, model: str) -> bool:
    """Returns whether the architecture has a ReLU after its last layer with weights.

    Raises: UserError if it differs from the network in anything else.
    """
    steps, num_classes = architecture.steps, num_classes_of(params, model)
    if model not in TWINS:
        layers = [match[0] for step in steps if (match := re.match(r"convolution of \(.*?\) to \d+|dense \d+", step))]
        check_steps(layers, shape_steps(expected_shapes(model, num_classes)), model)
        return False
    if has_final_relu(model) and steps == twin_steps(twin_layers(model, final_relu=True, num_classes=num_classes)):
        return True
    check_steps(steps, twin_steps(twin_layers(model, num_classes=num_classes)), model)
    return False


def _without_statistics(tensors: list[Named]) -> tuple[list[Named], dict[str, np.ndarray]]:
    """Separates the tensors of a Normalization layer, found by name or number, from the others."""
    rest, statistics = [], {}
    for name, tensor in tensors:
        *path, last = name.split("/")
        if last.split(":")[0] in ("mean", "variance", "count"):
            statistics[last.split(":")[0]] = tensor
        elif path[1:] and path[-1] == "vars" and path[-2].startswith("normalization"):
            statistics[{"0": "mean", "1": "variance"}.get(last, "count")] = tensor
        else:
            rest.append((name, tensor))
    return rest, statistics


def _add_statistics(architecture: Architecture, statistics: dict[str, np.ndarray]) -> None:
    try:
        mean, variance = (np.asarray(statistics[name], np.float64).reshape(-1) for name in ("mean", "variance"))
        normalize(architecture, mean, variance)
    except (KeyError, ValueError) as error:
        raise UserError(f"its Normalization layer has no mean and variance per channel ({error})") from error


def _in_order(tensors: list[Named], paths: list[str]) -> tuple[list[Named], bool]:
    """Sorts tensors in the architecture's order. Returns: (tensors, whether sorting was possible)."""
    clean = lambda name: name.replace("_layer_checkpoint_dependencies/", "layers/")
    by_path: dict[str, list[Named]] = {}
    for name, tensor in tensors:
        by_path.setdefault(clean(name).rpartition("/vars/")[0], []).append((name, tensor))
    if set(by_path) != set(paths):
        return tensors, False
    return [tensor for path in paths for tensor in by_path[path]], True
