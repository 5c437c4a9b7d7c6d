"""Mirror symmetry: weights with which a network computes the same for an image and for its mirror image.

In each hidden layer the units in reverse order compute of an image what the units in order compute of its mirror
image, and the last layer weighs both alike: an equivariant network (arXiv:1602.07576) of the architecture as it is,
half of whose weights are free. The gradient made symmetric is that by the free weights: for LeNet-5 the mean of those
for an image and for its mirror image, at the cost of one. All-CNN computes nearly the same for both: its first pool,
of 3 with stride 2, leaves out the last column of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax


def mirror(params: Any, layers: Sequence[str]) -> Any:
    """Parameters p′ with f(p′, x) = f(p, flip(x)): exactly for LeNet-5, and for All-CNN on images of 31×31 pixels.

    Args: params of a network, or their gradients; layers: their names from the first to the last. Convolutions come
    first, and each layer's inputs are the outputs of the one before.
    """
    mirrored, inputs = {}, None  # of the layer: channels of the one before, none for the image's colours
    for name in layers:
        layer = dict(params[name])
        kernel = layer["kernel"]
        outputs = kernel.shape[-1]
        if name != layers[-1]:  # the classes stay
            layer = {part: values[..., ::-1] for part, values in layer.items()}
            kernel = layer["kernel"]
        if inputs is not None:
            kernel = kernel.reshape(*kernel.shape[:-2], -1, inputs, outputs)[..., ::-1, :]
            if kernel.ndim == 3:  # dense; the first one's inputs are rows, columns and channels
                side = round(kernel.shape[0] ** 0.5)
                kernel = kernel.reshape(side, side, inputs, outputs)[:, ::-1]
        if name.startswith("Conv"):
            kernel = kernel[:, ::-1]
        mirrored[name] = layer | {"kernel": kernel.reshape(params[name]["kernel"].shape)}
        inputs = outputs
    return mirrored


def symmetric_part(params: Any, layers: Sequence[str]) -> Any:
    """The mean of parameters, or of their gradients, and their `mirror`."""
    return jax.tree.map(lambda x, mirrored: (x + mirrored) / 2, params, mirror(params, layers))


def symmetric_start(params: Any, layers: Sequence[str]) -> Any:
    """The symmetric part of random initial parameters; kernels keep their variance, LSUV's not their orthogonality.

    Logits become larger, as the last layer adds up pairs of units that are alike.
    """
    return jax.tree.map(lambda x: x * 2**0.5 if x.ndim > 1 else x, symmetric_part(params, layers))


def symmetric_gradients(layers: Sequence[str]) -> optax.GradientTransformation:
    """Makes gradients symmetric, so that symmetric parameters stay so except for rounding."""
    return optax.stateless(lambda updates, _: symmetric_part(updates, layers))
