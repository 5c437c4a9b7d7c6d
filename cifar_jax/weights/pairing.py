"""Assigns a foreign file's tensors to a network's layers by name, shape or position.

Different shapes identify layers. Layers of equal shape are sorted by the numbers in their names if the names differ
only in numbers (conv2, conv3; features.0, features.10), else by position if the file has the network's order. A file in
which neither decides is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from cifar_jax.errors import UserError
from cifar_jax.models import MODELS
from cifar_jax.weights.params import Named, Shape, check_tensors, expected_shapes

# "stated": the file states the network's order. "hint": the order of a dict. "none": alphabetical, as in HDF5.
Order = Literal["stated", "hint", "none"]
KERNEL = re.compile(r"(?:^|[./])(?:weight|kernel(?::0)?|vars/0)$")
BIAS = re.compile(r"(?:^|[./])(?:bias(?::0)?|vars/1)$")


@dataclasses.dataclass
class _Layer:
    name: str
    kernel: Named | None = None
    bias: Named | None = None


@dataclasses.dataclass(frozen=True)
class Paired:
    """`tensors`: kernel, bias, kernel, … in the network's order. `reordered`: the file has another order."""

    model: str
    tensors: list[Named]
    reordered: bool


def pair_tensors(
    tensors: Sequence[Named],
    model: str | None,
    foreign_shape: Callable[[Shape], Shape] = lambda shape: shape,
    order: Order = "hint",
    known_names: Callable[[str], Sequence[Sequence[str]]] = lambda model: (),
) -> Paired:
    """Sorts (name, tensor) pairs in a network's order.

    Args: model: None: found by the shapes; foreign_shape: converts a Flax kernel's shape to the file's framework;
    known_names: returns lists of layer names that a network's files may have, each in the network's order.
    Raises: UserError naming a tensor that is missing, surplus, misshapen, not floating-point, not finite or ambiguous.
    """
    layers, rest = _grouped(tensors)
    model, num_classes = _find_model(layers, len(tensors), model, foreign_shape)
    expected = [(foreign_shape(kernel), bias) for _, kernel, bias in expected_shapes(model, num_classes)]
    kernels = [kernel for kernel, _ in expected]
    positions = _positions(layers, kernels, order, known_names(model))
    if positions is not None:
        chosen: list[_Layer | None] = [layers[i] for i in positions]
    else:
        chosen = [*layers] if order == "stated" else _closest(layers, kernels)
    chosen += [None] * (len(expected) - len(chosen))
    flat: list[Named] = []
    for layer, shapes in zip(chosen, expected):
        for tensor, shape in zip((layer.kernel, layer.bias) if layer else (None, None), shapes):
            if tensor is None:
                after = f" after {flat[-1][0]}" if flat else ""
                raise UserError(f"a tensor of shape {shape} is missing{after}")
            check_tensors([tensor], [shape])
            flat.append(tensor)
    surplus = [x for layer in chosen[len(expected) :] if layer for x in (layer.kernel, layer.bias) if x] + rest
    check_tensors(flat + surplus, [shape for pair in expected for shape in pair])
    reordered = positions is not None and positions != list(range(len(expected)))
    return Paired(model, flat, reordered)


def _grouped(tensors: Sequence[Named]) -> tuple[list[_Layer], list[Named]]:
    """Returns layers in the file's order, and other tensors. Unnamed tensors alternate between kernel and bias."""
    if all(re.fullmatch(r"number \d+", name) for name, _ in tensors):
        turns = [tensors[i : i + 2] for i in range(0, len(tensors), 2)]
        return [_Layer(str(i), *pair) for i, pair in enumerate(turns)], []
    layers: dict[str, _Layer] = {}
    rest: list[Named] = []
    for name, tensor in tensors:
        for role, pattern in (("kernel", KERNEL), ("bias", BIAS)):
            if match := pattern.search(name):
                layer = layers.setdefault(name[: match.start()], _Layer(name[: match.start()]))
                if getattr(layer, role) is not None:
                    raise UserError(f"tensor {name} occurs twice")
                setattr(layer, role, (name, tensor))
                break
        else:
            rest.append((name, tensor))
    return list(layers.values()), rest


def _kernel_shape(layer: _Layer) -> Shape | None:
    return None if layer.kernel is None else tuple(layer.kernel[1].shape)


def _find_model(
    layers: Sequence[_Layer], num_tensors: int, model: str | None, foreign_shape: Callable[[Shape], Shape]
) -> tuple[str, int]:
    """Returns (network, number of classes): the network with these kernel shapes, else with this many tensors."""
    shapes = Counter(map(_kernel_shape, layers))
    sizes = dict.fromkeys(len(layer.bias[1]) for layer in reversed(layers) if layer.bias and layer.bias[1].ndim == 1)
    fits: dict[str, int] = {}
    for name in MODELS if model is None else [model]:
        for size in sizes:
            if size and Counter(foreign_shape(kernel) for _, kernel, _ in expected_shapes(name, size)) == shapes:
                fits.setdefault(name, size)
    if len(fits) > 1:
        raise UserError(f"fits {' and '.join(fits)}: choose one with --model")
    if fits:
        return next(iter(fits.items()))
    counts = {2 * len(MODELS[name].LAYERS): name for name in MODELS}
    if model is None and num_tensors not in counts:
        having = " or ".join(f"{count} ({name})" for count, name in counts.items())
        raise UserError(f"has {num_tensors} tensors, must have {having}")
    name = model or counts[num_tensors]
    kernels = [_kernel_shape(layer) for layer in layers]
    of_last = [size for size in sizes if foreign_shape(expected_shapes(name, size)[-1][1]) in kernels]
    return name, of_last[0] if of_last else 10


def _positions(
    layers: Sequence[_Layer], expected: Sequence[Shape], order: Order, known: Sequence[Sequence[str]]
) -> list[int] | None:
    """Returns the position in `layers` of each layer of the network; None if the shapes differ."""
    shapes = [_kernel_shape(layer) for layer in layers]
    if order == "stated":
        return list(range(len(layers))) if shapes == list(expected) else None
    if Counter(shapes) != Counter(expected):
        return None
    names = _without_prefix([layer.name for layer in layers])
    for table in known:
        if sorted(names) == sorted(table):
            return [names.index(name) for name in table]
    places: dict[Shape, list[int]] = {}
    for shape in dict.fromkeys(expected):
        same = [i for i, other in enumerate(shapes) if other == shape]
        forms = {re.sub(r"\d+", "#", _numbered(names[i])) for i in same}
        if len(forms) == 1:
            same.sort(key=lambda i: [int(number) for number in re.findall(r"\d+", _numbered(names[i]))])
        elif len(same) > 1 and (order == "none" or shapes != list(expected)):
            both = " and ".join(layers[i].name for i in same[:2])
            raise UserError(
                f"{both} have the same shape, and neither names nor order tell which comes first: number the names"
            )
        places[shape] = same
    return [places[shape].pop(0) for shape in expected]


def _numbered(name: str) -> str:
    """Adds the 0 that Keras omits: conv2d, conv2d_1 → conv2d_0, conv2d_1."""
    return re.sub(r"(^|/)(conv2d|dense|sequential|functional)(?=/|$)", r"\1\2_0", name)


def _without_prefix(names: list[str]) -> list[str]:
    """Removes common leading parts of names: module.conv1, module.conv2 → conv1, conv2."""
    while len(names) > 1 and len({name.partition(".")[0] for name in names}) == 1 and all("." in x for x in names):
        names = [name.partition(".")[2] for name in names]
    return names


def _closest(layers: Sequence[_Layer], expected: Sequence[Shape]) -> list[_Layer | None]:
    """Returns layers roughly in the network's order, then surplus ones, for an error message about a mismatch.

    Layers with a fitting kernel come first into place. Others fill the gaps. None marks a missing layer.
    """
    left = list(layers)
    chosen: list[_Layer | None] = []
    for shape in expected:
        chosen.append(next((layer for layer in left if _kernel_shape(layer) == shape), None))
        if chosen[-1]:
            left.remove(chosen[-1])
    filled = [layer or (left.pop(0) if left else None) for layer in chosen]
    return [*filled, *left]
