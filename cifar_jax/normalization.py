"""Batch normalisation during training, folded into kernels and biases for evaluation. The network stays unchanged.

During training each hidden layer's output is normalised by its mean and variance over the device's part of the batch,
multiplied by a `scale`, learnt or 1, and shifted by the layer's `bias`, before the ReLU (arXiv:1502.03167). For tests
`fold` puts fixed statistics into the plain network's parameters: kernel·scale/σ and bias - mean·scale/σ. This is exact
with zero padding too, because the normalisation follows the convolution.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EPSILON = 1e-5


class Moments(NamedTuple):
    """Mean and variance per channel of a layer's output without its bias, float32 [channels] each."""

    mean: jax.Array
    variance: jax.Array


Statistics = dict[str, Moments]


def add_scales(model: Any, params: Any) -> Any:
    """Returns the normalised network's parameters: `params` and a `scale` of ones for each hidden layer."""
    hidden = {name: {**params[name], "scale": jnp.ones_like(params[name]["bias"])} for name in model.LAYERS[:-1]}
    return {**params, **hidden}


def _moments(outputs: jax.Array, symmetric: bool) -> Moments:
    """Computes moments over all axes except the last, in float32 (float64 for float64 outputs)."""
    outputs = outputs.astype(np.promote_types(outputs.dtype, np.float32))
    axes = tuple(range(outputs.ndim - 1))
    mean = outputs.mean(axes)
    if symmetric:  # the units in reverse order see the mirror image
        mean = (mean + mean[::-1]) / 2
    centred = outputs - mean.reshape((1,) * len(axes) + (-1,))
    variance = (centred * centred).mean(axes)
    return Moments(mean, (variance + variance[::-1]) / 2 if symmetric else variance)


def apply_normalized(
    model: Any,
    params: Any,
    images: jax.Array,
    statistics: Statistics | None = None,
    symmetric: bool = False,
    **options: Any,
) -> tuple[jax.Array, Statistics]:
    """Runs the normalised network. Returns: (logits [N, num_classes], statistics of the hidden layers).

    Args: model: a network of models.MODELS; params: from `add_scales`; images: scaled, float32 [N, H, W, 3];
    statistics: to normalise by; None: the batch's own; symmetric: make statistics symmetric, for mirror-symmetric
    parameters (see symmetry.py); options: keyword arguments of model.apply (train, rngs).
    """
    found: Statistics = {}
    # The layers run without their biases, which are added after the normalisation.
    plain = {
        name: {"kernel": layer["kernel"], "bias": jnp.zeros_like(layer["bias"]) if "scale" in layer else layer["bias"]}
        for name, layer in params.items()
    }

    def normalize(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = next_call(*args, **kwargs)
        name = context.module.name
        if context.method_name != "__call__" or name not in model.LAYERS[:-1]:
            return outputs
        found[name] = _moments(outputs, symmetric) if statistics is None else statistics[name]
        mean, variance = found[name]
        factor = params[name]["scale"] * lax.rsqrt(variance + EPSILON)
        shape = (1,) * (outputs.ndim - 1) + (-1,)
        shift = params[name]["bias"] - mean * factor
        # Not in bfloat16, in which the gradients of factor and shift would be summed: see ops.Conv.
        exact = outputs.astype(np.promote_types(outputs.dtype, np.float32))
        return (exact * factor.reshape(shape) + shift.reshape(shape)).astype(outputs.dtype)

    with nn.intercept_methods(normalize):
        logits = model.apply({"params": plain}, images, **options)
    return logits, found


def merge(parts: list[Statistics]) -> Statistics:
    """Combines the statistics of several batches of equal size."""

    def pooled(*moments: Moments) -> Moments:
        means = jnp.stack([part.mean for part in moments])
        variances = jnp.stack([part.variance for part in moments])
        return Moments(means.mean(0), variances.mean(0) + means.var(0))

    return {name: pooled(*(part[name] for part in parts)) for name in parts[0]}


def fold(params: Any, statistics: Statistics) -> Any:
    """Returns parameters with which the plain network equals the normalised network with these statistics.

    Args: params: from `add_scales`. Returns: kernels and biases without `scale`.
    """
    folded = {}
    for name, layer in params.items():
        kernel, bias = layer["kernel"], layer["bias"]
        if name in statistics:
            mean, variance = statistics[name]
            factor = layer["scale"] / jnp.sqrt(variance + EPSILON)
            kernel = kernel * factor.reshape((1,) * (kernel.ndim - 1) + (-1,))
            bias = bias - mean * factor
        folded[name] = {"kernel": kernel, "bias": bias}
    return folded
