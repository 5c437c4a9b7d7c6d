"""Reads the pickles in PyTorch's files as data. Nothing in them is imported, called or copied.

`pickletools` splits a pickle into instructions. This module follows those that build dicts, lists, numbers and strings,
and the calls by which PyTorch describes a tensor. Everything else becomes a `Foreign` with its name. Time and memory
are proportional to the pickle's length, even if its objects refer to each other.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import IO, Any

MAX_INSTRUCTIONS = 500_000  # a checkpoint of 1,000 tensors has about 50,000
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An object, class or function that is not evaluated. `name`: the name of its class or function."""

    name: str


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """A view of a storage (class name, key, number of values). Offset, size and stride count values, not bytes."""

    storage: tuple[str, str, int]
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(file: IO[bytes]) -> Any:
    """Reads the pickle at the file's position. Raises: ValueError, IndexError, KeyError, TypeError if it is invalid."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        name = instruction.name
        if count > MAX_INSTRUCTIONS:
            raise ValueError("more pickle instructions than any state_dict has")
        if name == "STOP":
            return stack.pop()
        if name in ("PROTO", "FRAME"):
            continue
        if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](stack)
        elif name == "GLOBAL":
            stack.append(Foreign(argument.replace(" ", ".")))
        elif isinstance(argument, (int, float, str, bytes)) and not name.startswith(("EXT", "PERSID", "INST")):
            stack.append(argument)  # numbers and strings of every length
        else:
            raise ValueError(f"instruction {name}, which no state_dict has")
    raise ValueError("a truncated pickle")


def _marked(stack: list[Any]) -> list[Any]:
    """Pops the items above the last mark, and the mark."""
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise IndexError("no mark")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _store(stack: list[Any], pairs: list[Any]) -> None:
    if isinstance(stack[-1], dict):
        for key, value in zip(pairs[::2], pairs[1::2]):
            # Hashing other keys, such as nested tuples, can take forever.
            stack[-1][key if isinstance(key, (str, int, float, type(None))) else Foreign(str(type(key)))] = value


def _append(stack: list[Any], items: list[Any]) -> None:
    if isinstance(stack[-1], list):
        stack[-1].extend(items)


def _call(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    stack.append(_result(function.name if isinstance(function, Foreign) else "?", arguments))


def _result(function: str, arguments: Any) -> Any:
    if function == "collections.OrderedDict" and arguments == ():
        return {}
    if function in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if function == "torch._tensor._rebuild_from_type_v2" and isinstance(arguments[0], Foreign):
        return _result(arguments[0].name, arguments[2])
    if function in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        storage, offset, size, stride, *more = arguments
        integers = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 8
        if integers and all(type(number) is int for number in (offset, *size, *stride)) and not any(more[2:]):
            return TensorRecord(storage, offset, size, stride)
    return Foreign(function)


def _persistent(stack: list[Any]) -> None:
    """Replaces ('storage', class, key, device, number of values[, view]) by (class name, key, number of values)."""
    identity = stack.pop()
    if not isinstance(identity, tuple) or identity[0] != "storage":
        stack.append(identity[1] if isinstance(identity, tuple) and identity[0] == "module" else Foreign("?"))
        return
    _, kind, key, _, count, *view = identity
    if not isinstance(kind, Foreign) or not isinstance(key, str) or type(count) is not int or any(view):
        raise ValueError("a storage that can't be read")
    stack.append((kind.name.rpartition(".")[2], key, count))


def _tuple(size: int) -> Callable[[list[Any]], None]:
    def action(stack: list[Any]) -> None:
        items = tuple(stack[len(stack) - size :])
        del stack[len(stack) - size :]
        stack.append(items)

    return action


def _new_object(stack: list[Any]) -> None:
    _, kind = stack.pop(), stack.pop()
    stack.append(kind if isinstance(kind, Foreign) else Foreign("?"))


def _global(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(Foreign(f"{module:.100}.{name:.100}"))


def _new_dict(stack: list[Any]) -> None:
    items = _marked(stack)
    stack.append({})
    _store(stack, items)


def _foreign_set(stack: list[Any]) -> None:
    _marked(stack)


_ACTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "EMPTY_DICT": lambda stack: stack.append({}),
    "EMPTY_LIST": lambda stack: stack.append([]),
    "EMPTY_TUPLE": lambda stack: stack.append(()),
    "EMPTY_SET": lambda stack: stack.append(Foreign("set")),
    "TUPLE": lambda stack: stack.append(tuple(_marked(stack))),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "LIST": lambda stack: stack.append(_marked(stack)),
    "DICT": _new_dict,
    "SETITEM": lambda stack: (lambda value, key: _store(stack, [key, value]))(stack.pop(), stack.pop()),
    "SETITEMS": lambda stack: (lambda items: _store(stack, items))(_marked(stack)),
    "APPEND": lambda stack: (lambda item: _append(stack, [item]))(stack.pop()),
    "APPENDS": lambda stack: (lambda items: _append(stack, items))(_marked(stack)),
    "ADDITEMS": _foreign_set,
    "POP": lambda stack: stack.pop(),
    "STACK_GLOBAL": _global,
    "REDUCE": _call,
    "NEWOBJ": _new_object,
    "BUILD": lambda stack: stack.pop(),  # drops an object's attributes, such as an OrderedDict's _metadata
    "BINPERSID": _persistent,
}
