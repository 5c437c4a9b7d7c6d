"""What a Keras architecture computes: a chain of layers, which may lie in networks inside the network."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from cifar_jax.errors import UserError
from cifar_jax.weights.keras import Layer, snake_case
from cifar_jax.weights.keras_layers import Architecture, read_layer
from cifar_jax.weights.params import Shapes


def read_architecture(config: Any) -> Architecture:
    """Reads the JSON object of a Sequential, or of a Functional that is a chain.

    Raises: UserError for anything else, a layer that no network here has, or a field that can't be followed.
    """
    result = Architecture()
    try:
        _network(config, result, "")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"not a Keras architecture ({type(error).__name__} {str(error)[:100]})") from error
    if result.steps and result.steps[-1] in ("softmax", "log_softmax"):
        result.steps.pop()
    return result


def twin_steps(layers: list[Layer]) -> list[str]:
    """The steps of a twin of keras.py."""
    defaults = {"activation": "linear", "use_bias": True}
    parts = [{"class_name": kind, "config": defaults | fields if kind in ("Conv2D", "Dense") else fields}
             for kind, fields in layers]  # fmt: skip
    return read_architecture({"class_name": "Sequential", "config": parts}).steps


def shape_steps(shapes: Shapes) -> list[str]:
    """What is known of a network without a twin: its layers with weights."""
    return [f"convolution of {k[:2]} to {k[3]}" if len(k) == 4 else f"dense {k[1]}" for _, k, _ in shapes]


def check_steps(steps: list[str], expected: list[str], model: str) -> None:
    """Raises: UserError naming the first step that differs."""
    for found, wanted in itertools.zip_longest(steps, expected, fillvalue="the end"):
        if found != wanted:
            raise UserError(f"its layers are not those of {model}: there is {found} where there must be {wanted}")


def _network(config: Any, result: Architecture, path: str) -> None:
    kind, fields = config.get("class_name", "Sequential"), config["config"]
    layers = fields if isinstance(fields, list) else fields["layers"]
    if kind not in ("Sequential", "Functional", "Model"):
        raise UserError(f"its class {str(kind)[:50]} is none of these networks': save a Sequential or Functional model")
    if kind != "Sequential":
        _check_chain(layers, fields)
    counts: dict[str, int] = {}
    for layer in layers:
        name = snake_case(layer["class_name"])
        number = counts[name] = counts.get(name, -1) + 1
        place = f"{path}layers/{name}_{number}" if number else f"{path}layers/{name}"
        if layer["class_name"] in ("Sequential", "Functional", "Model"):
            _network(layer, result, f"{place}/")
        else:
            read_layer(layer, result, place)


def _check_chain(layers: list[Any], fields: Mapping[str, Any]) -> None:
    """Raises UserError if the layers are not each applied once, one after another, as they are listed."""
    previous = None
    for layer in layers:
        nodes = layer["inbound_nodes"]
        histories = list(_histories(nodes))
        if histories != ([] if previous is None else [previous]) or len(nodes) > 1:
            raise UserError(f"its layer {layer['name']} does not follow {previous}: the network is no chain of layers")
        previous = layer["name"]
    outputs = fields["output_layers"]
    if previous not in (outputs[0], outputs[0][0] if isinstance(outputs[0], list) else None):
        raise UserError(f"its output is not that of its last layer {previous}")


def _histories(node: Any) -> Any:
    """Names of the layers that inbound_nodes refer to: [name, 0, 0, {}] or {'keras_history': [name, 0, 0]}."""
    if isinstance(node, dict):
        if node.get("training") or node.get("mask"):
            raise UserError("a layer is called with training=True or a mask, so it does other than when it is tested")
        if "keras_history" in node:
            yield node["keras_history"][0]
        else:
            for value in node.values():
                yield from _histories(value)
    elif isinstance(node, list):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
            yield node[0]
            yield from _histories(node[3:])
        else:
            for value in node:
                yield from _histories(value)
