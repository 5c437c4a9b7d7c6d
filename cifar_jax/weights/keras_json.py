"""Reads what a Keras architecture computes: a chain of layers, which may be nested in inner networks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from cifar_jax.errors import UserError
from cifar_jax.weights.keras import Layer, snake_case
from cifar_jax.weights.keras_layers import Architecture, read_layer
from cifar_jax.weights.params import Shapes


def read_architecture(config: Any) -> Architecture:
    """Reads the JSON object of a Sequential model, or of a Functional model that is a chain of layers.

    Raises: UserError for other models, for layers that no supported network has, and for unsupported fields.
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
    """Returns the steps (see Architecture) of a twin's layers."""
    defaults = {"activation": "linear", "use_bias": True}
    parts = [{"class_name": kind, "config": defaults | fields if kind in ("Conv2D", "Dense") else fields}
             for kind, fields in layers]  # fmt: skip
    return read_architecture({"class_name": "Sequential", "config": parts}).steps


def shape_steps(shapes: Shapes) -> list[str]:
    """Returns the steps known for a network without a twin: its layers with weights."""
    return [f"convolution of {k[:2]} to {k[3]}" if len(k) == 4 else f"dense {k[1]}" for _, k, _ in shapes]


def check_steps(steps: list[str], expected: list[str], model: str) -> None:
    """Raises: UserError naming the first step that differs."""
    for found, wanted in itertools.zip_longest(steps, expected, fillvalue="the end"):
        if found != wanted:
            raise UserError(f"its layers are not those of {model}: found {found}, expected {wanted}")


def _network(config: Any, result: Architecture, path: str) -> None:
    kind, fields = config.get("class_name", "Sequential"), config["config"]
    layers = fields if isinstance(fields, list) else fields["layers"]
    if kind not in ("Sequential", "Functional", "Model"):
        raise UserError(f"its class {str(kind)[:50]} is not supported: save a Sequential or Functional model")
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
    """Checks that the layers are applied in the listed order, each once. Raises: UserError."""
    previous = None
    for layer in layers:
        nodes = layer["inbound_nodes"]
        histories = list(_histories(nodes))
        if histories != ([] if previous is None else [previous]) or len(nodes) > 1:
            raise UserError(f"its layer {layer['name']} does not follow {previous}: layers must form a single chain")
        previous = layer["name"]
    outputs = fields["output_layers"]
    if previous not in (outputs[0], outputs[0][0] if isinstance(outputs[0], list) else None):
        raise UserError(f"its output is not the output of its last layer {previous}")


def _histories(node: Any) -> Any:
    """Yields the layer names in inbound_nodes: [name, 0, 0, {}] or {'keras_history': [name, 0, 0]}."""
    if isinstance(node, dict):
        if node.get("training") or node.get("mask"):
            raise UserError("calls a layer with training=True or a mask, which changes what it computes in tests")
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
