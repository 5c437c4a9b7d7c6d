"""Numbers of the pixel scalings, and conversion of a Keras network's scaling layers to one of these scalings."""

from __future__ import annotations

import numpy as np

from cifar_jax.batches import INPUT_SCALINGS, pixel_statistics
from cifar_jax.datasets import DATASETS
from cifar_jax.errors import UserError
from cifar_jax.weights.params import Layers

Channels = tuple[float, float, float]


def scaling_numbers(input_scaling: str, dataset: str | None = None) -> tuple[Channels, Channels]:
    """Returns (mean, deviation) per channel: a pixel from 0 to 255 becomes (pixel / 255 - mean) / deviation.

    Args: dataset: the one whose statistics 'standardized' uses; None or an unknown name: CIFAR-10.
    """
    mean, std = pixel_statistics(input_scaling, dataset if dataset in DATASETS else "cifar10")
    return tuple(np.broadcast_to(mean, 3).tolist()), tuple(np.broadcast_to(std, 3).tolist())


def describe_scaling(input_scaling: str, dataset: str | None = None) -> str:
    """Returns a formula such as (pixel / 255 - (0.5, 0.5, 0.5)) / (0.5, 0.5, 0.5)."""
    mean, std = scaling_numbers(input_scaling, dataset)
    return f"(pixel / 255 - {mean}) / {std}"


def absorb_scaling(
    layers: Layers, scale: np.ndarray, offset: np.ndarray, first_is_padded: bool, dataset: str | None = None
) -> tuple[Layers, str, str]:
    """Replaces scale · pixel + offset by the nearest `input_scaling`, and changes the first convolution to compensate.

    A factor can always be compensated exactly, an offset only if the first convolution does not pad.
    Args: scale, offset: float64 [3], for pixels from 0 to 255, or from 0 to 1 if 255 · scale exceeds 100.
    Returns: (layers, input_scaling, a note for the user). Raises: UserError if the offset can't be compensated.
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
        if distance > 2e-3:  # the padding's zeros would be another colour
            raise UserError("scales pixels to an unsupported mean before a convolution that pads: use another mean")
    kernel, bias = layers[0]
    rest = np.where(np.abs(rest) > 1e-6, rest, 0)
    bias = bias + np.einsum("hwio,i->o", kernel.astype(np.float64), rest)
    factor = np.where(np.abs(factor - 1) > 1e-6, factor, 1)
    changed = (factor != 1).any() or rest.any()
    first = (kernel * factor[:, None], bias) if changed else layers[0]
    absorbed = ", the rest in the first convolution" if changed else ""
    line = f"its own layers scale pixels {takes}: converted to {name}{absorbed}"
    return [tuple(array.astype(layers[0][0].dtype) for array in first), *layers[1:]], name, line  # type: ignore[list-item]
