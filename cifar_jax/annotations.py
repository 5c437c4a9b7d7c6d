"""Compares a value with its annotation, as a type checker would: a Config may also come from Python or from a file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

NAMES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def is_number(value: Any) -> bool:
    """Tells whether it is an int or a float, which includes numpy's float64 and leaves out its other types."""
    return isinstance(value, int | float) and type(value) is not bool


def broken_rule(annotation: Any, value: Any, names: Iterable[str] | None = None) -> str | None:
    """Returns what a value must be, such as 'a whole number'; None if it is that, or if the annotation is another kind.

    Args: annotation: a type of NAMES, such a type or None, or a Literal; names: replace the values of a Literal.
    """
    members = get_args(annotation)
    if get_origin(annotation) is Literal:
        choices = tuple(members if names is None else names)
        return None if value in choices else f"one of {', '.join(choices)}"
    optional = type(None) in members
    kind = members[0] if optional else annotation
    fits = is_number(value) if kind is float else type(value) is kind
    return None if fits or kind not in NAMES or (optional and value is None) else NAMES[kind]
