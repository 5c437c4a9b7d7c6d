"""Mirror symmetry: weights for which an image and its mirror image get the same logits.

In each hidden layer, reversing the order of the units has the effect of mirroring the image, and the last layer weighs
both orders alike. This is an equivariant network (arXiv:1602.07576) with an unchanged architecture and half of its
weights free. The symmetric part of the gradient is the gradient with respect to the free weights. For LeNet-5 it equals
the mean of the gradients for an image and its mirror image, at the cost of one. For All-CNN the logits are only nearly
the same, because its first pool (3×3, stride 2) skips the last of 32 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax


def mirror(params: Any, layers: Sequence[str]) -> Any:
    """Returns parameters p′ with f(p′, x) = f(p, flip(x)). Exact for LeNet-5, and for All-CNN on 31×31 pixels.

    Args: params: parameters of a network, or their gradients; layers: layer names from the first to the last, with
    convolutions first, in a chain.
    """
    mirrored, inputs = {}, None  # output channels of the previous layer; None for the image's colours
    for name in layers:
        layer = dict(params[name])
        kernel = layer["kernel"]
        outputs = kernel.shape[-1]
        if name != layers[-1]:  # the classes keep their order
            layer = {part: values[..., ::-1] for part, values in layer.items()}
            kernel = layer["kernel"]
        if inputs is not None:
            kernel = kernel.reshape(*kernel.shape[:-2], -1, inputs, outputs)[..., ::-1, :]
            if kernel.ndim == 3:  # dense: the first dense layer's inputs are rows, columns and channels
                side = round(kernel.shape[0] ** 0.5)
                kernel = kernel.reshape(side, side, inputs, outputs)[:, ::-1]
        if name.startswith("Conv"):
            kernel = kernel[:, ::-1]
        mirrored[name] = layer | {"kernel": kernel.reshape(params[name]["kernel"].shape)}
        inputs = outputs
    return mirrored


def symmetric_part(params: Any, layers: Sequence[str]) -> Any:
    """Returns the mean of parameters (or gradients) and their `mirror`."""
    return jax.tree.map(lambda x, mirrored: (x + mirrored) / 2, params, mirror(params, layers))


def symmetric_start(params: Any, layers: Sequence[str]) -> Any:
    """Makes random initial parameters symmetric. Kernels keep their variance but lose the orthogonality of LSUV.

    Logits become larger, because the last layer adds up pairs of equal units.
    """
    return jax.tree.map(lambda x: x * 2**0.5 if x.ndim > 1 else x, symmetric_part(params, layers))


def symmetric_gradients(layers: Sequence[str]) -> optax.GradientTransformation:
    """Makes gradients symmetric. Symmetric parameters then stay symmetric up to rounding."""
    return optax.stateless(lambda updates, _: symmetric_part(updates, layers))
