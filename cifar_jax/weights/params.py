"""The form that weights take between frameworks: an ordered list of (kernel, bias) in Flax's layout.

Kernels are HWIO or [inputs, outputs] with inputs flattened from NHWC, biases [outputs], all numpy arrays of floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.models import MODELS

Layers = list[tuple[np.ndarray, np.ndarray]]
Params = dict[str, dict[str, Any]]


@functools.cache
def expected_shapes(model: str) -> tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]:
    """(layer's name in Flax, kernel's shape, bias' shape) in the order of the network. `model` is a key of MODELS."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(MODELS[model]().init, jax.random.key(0), images)["params"]
    # Sorted they are in order, Conv_0 … Conv_8, Dense_0 …: convolutions come first in both networks.
    return tuple((name, params[name]["kernel"].shape, params[name]["bias"].shape) for name in sorted(params))


def guess_model(num_tensors: int) -> str:
    """The network that has so many tensors. Raises UserError if none has."""
    counts = {2 * len(expected_shapes(model)): model for model in MODELS}
    if num_tensors not in counts:
        having = " or ".join(f"{count} ({model})" for count, model in counts.items())
        raise UserError(f"{num_tensors} tensors, where there must be {having}")
    return counts[num_tensors]


def check_tensors(tensors: Sequence[tuple[str, np.ndarray]], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises UserError naming the first of the (name, tensor) that is missing, too many, misshapen, or not finite."""
    for (name, tensor), shape in zip(tensors, shapes):
        if tuple(tensor.shape) != tuple(shape):
            raise UserError(f"tensor {name} has shape {tuple(tensor.shape)}, must have {tuple(shape)}")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise UserError(f"tensor {name} has type {tensor.dtype}, must be of floating point")
        with np.errstate(over="ignore"):
            finite = np.isfinite(tensor.astype(np.float32, copy=False)).all()
        if not finite:
            raise UserError(f"tensor {name} has values that are not finite in float32")
    if len(tensors) > len(shapes):
        raise UserError(f"tensor {tensors[len(shapes)][0]} is one too many: there must be {len(shapes)}")
    if len(tensors) < len(shapes):
        after = f" after {tensors[-1][0]}" if tensors else ""
        raise UserError(f"a tensor of shape {tuple(shapes[len(tensors)])} is missing{after}")


def params_from_tensors(
    tensors: Sequence[tuple[str, np.ndarray]],
    model: str | None,
    foreign_shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape,
    to_flax: Callable[[np.ndarray], np.ndarray] = lambda kernel: kernel,
) -> Params:
    """Flax params, float32 (or float64), from the (name, tensor), kernels and biases by turns, of another framework.

    Args: model: None guesses it; foreign_shape, of a kernel there; to_flax turns it round. Raises: as check_tensors.
    """
    layers = expected_shapes(model or guess_model(len(tensors)))
    check_tensors(tensors, [shape for _, kernel, bias in layers for shape in (foreign_shape(kernel), bias)])
    as_float = lambda array: np.ascontiguousarray(array, np.float64 if array.dtype == np.float64 else np.float32)
    arrays = iter([array for _, array in tensors])
    return {name: {"kernel": as_float(to_flax(next(arrays))), "bias": as_float(next(arrays))} for name, *_ in layers}


def layers_from_params(params: Mapping[str, Any]) -> tuple[Layers, str]:
    """The layers of Flax params in the network's order, and the network's name. Raises UserError for other params."""
    model = guess_model(len(jax.tree.leaves(params)))
    shapes = expected_shapes(model)
    missing = [name for name, _, _ in shapes if not {"kernel", "bias"} <= set(params.get(name, ()))]
    if missing:
        raise UserError(f"tensors of {missing[0]} are missing")
    layers = [(np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])) for name, _, _ in shapes]
    for (name, *pair), arrays in zip(shapes, layers):
        check_tensors([(f"{name}/kernel", arrays[0]), (f"{name}/bias", arrays[1])], pair)
    return layers, model
