"""How pixels are scaled for a network, in numbers, and the scaling layers of a Keras network as one of these ways."""

from __future__ import annotations

import numpy as np

from cifar_jax.batches import INPUT_SCALINGS, pixel_statistics
from cifar_jax.datasets import DATASETS
from cifar_jax.errors import UserError
from cifar_jax.weights.params import Layers

Channels = tuple[float, float, float]


def scaling_numbers(input_scaling: str, dataset: str | None = None) -> tuple[Channels, Channels]:
    """(mean, deviation) by channel: a pixel from 0 to 255 becomes (pixel / 255 - mean) / deviation.

    Args: dataset: whose statistics 'standardized' means; unknown or None: CIFAR-10's.
    """
    mean, std = pixel_statistics(input_scaling, dataset if dataset in DATASETS else "cifar10")
    return tuple(np.broadcast_to(mean, 3).tolist()), tuple(np.broadcast_to(std, 3).tolist())


def describe_scaling(input_scaling: str, dataset: str | None = None) -> str:
    """Such as (pixel / 255 - (0.5, 0.5, 0.5)) / (0.5, 0.5, 0.5)."""
    mean, std = scaling_numbers(input_scaling, dataset)
    return f"(pixel / 255 - {mean}) / {std}"


def absorb_scaling(
    layers: Layers, scale: np.ndarray, offset: np.ndarray, first_is_padded: bool, dataset: str | None = None
) -> tuple[Layers, str, str]:
    """Layers and an `input_scaling` with which they compute what the given ones do of scale · pixel + offset.

    What differs from one of our scalings goes into the first convolution: a factor is exact, and so is an offset if the
    convolution does not pad. Args: scale and offset by channel, of pixels from 0 to 255; of pixels from 0 to 1 if they
    would become larger than 100 otherwise. Returns: also a line about it.
    Raises: UserError if that is not possible.
    """
    unit = 1 if np.abs(scale).max() * 255 <= 100 else 255  # the network's own layers take pixels from 0 to 1
    takes = "from 0 to 255" if unit == 1 else "from 0 to 1"
    scale = scale / unit
    ways = []
    for name in INPUT_SCALINGS:
        mean, std = (np.array(values) for values in scaling_numbers(name, dataset))
        factor, rest = 255 * scale * std, 255 * scale * mean + offset  # scale · pixel + offset = factor · scaled + rest
        ways.append((float(np.abs(rest).max()), name, factor, rest))
    if not first_is_padded and min(way[0] for way in ways) > 1e-6:
        _, name, factor, rest = ways[0]
    else:
        distance, name, factor, rest = min(ways, key=lambda way: way[0])
        if distance > 2e-3:  # zeros beside the image would be another colour
            raise UserError("scales pixels to other means than ours, before a convolution that pads: it can't be read")
    kernel, bias = layers[0]
    rest = np.where(np.abs(rest) > 1e-6, rest, 0)
    bias = bias + np.einsum("hwio,i->o", kernel.astype(np.float64), rest)
    factor = np.where(np.abs(factor - 1) > 1e-6, factor, 1)
    changed = (factor != 1).any() or rest.any()
    first = (kernel * factor[:, None], bias) if changed else layers[0]
    absorbed = ", the rest in the first convolution" if changed else ""
    line = f"its own layers scale pixels {takes}: read as {name}{absorbed}"
    return [tuple(array.astype(layers[0][0].dtype) for array in first), *layers[1:]], name, line  # type: ignore[list-item]
