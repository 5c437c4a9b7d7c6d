"""Reads CIFAR's pickles with a restricted unpickler: a malicious file can neither run code nor exhaust the machine."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from cifar_jax.datasets.cifar import PIXELS

# The opcodes of protocols 2 to 5 for dicts, lists, tuples, strings, bytes, integers and arrays.
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD),
)


class PickledDtype:
    """Replaces numpy.dtype while unpickling. It only records whether the type is uint8."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.is_uint8 = isinstance(name, (str, bytes)) and name in ("u1", b"u1", "uint8", b"uint8")

    def __setstate__(self, state: Any) -> None:
        pass


class PickledArray:
    """Replaces numpy.ndarray while unpickling. It accepts only the bytes of C-ordered uint8 arrays."""

    shape: tuple[int, ...] = ()
    buffer = b""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, buffer = state
        if not (isinstance(dtype, PickledDtype) and dtype.is_uint8) or fortran_order or type(buffer) is not bytes:
            raise pickle.UnpicklingError("an array is not of C-ordered uint8")
        if type(shape) is not tuple or not all(type(size) is int for size in shape):
            raise pickle.UnpicklingError("an array has no valid shape")
        self.shape, self.buffer = shape, buffer


class _Dispatch(dict[int, Callable[[Any], None]]):
    """The allowed opcodes' functions. Their number is limited, because each call costs time and memory."""

    def __init__(self, left: int) -> None:
        functions = pickle._Unpickler.dispatch
        super().__init__({code[0]: functions[code[0]] for code in _OPCODES})
        self[pickle.SETITEM[0]] = ArrayUnpickler.set_item
        self[pickle.SETITEMS[0]] = ArrayUnpickler.set_items
        self[pickle.BUILD[0]] = ArrayUnpickler.build
        self._left = left

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError("too many objects")
        if code not in self:
            raise pickle.UnpicklingError(f"opcode {code:#x} is not allowed")
        return super().__getitem__(code)


class ArrayUnpickler(pickle._Unpickler):
    """Builds arrays, lists, tuples, dicts with string keys, bytes, strings and integers, and calls no other code.

    Even numpy's own constructors are replaced, since a hostile dtype state can corrupt memory. It is the unpickler
    written in Python: a few bytes make the one in C allocate gigabytes for its memo.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes | memoryview, max_opcodes: int) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.dispatch = _Dispatch(max_opcodes)  # type: ignore[misc]  # the base's is its class's
        self._left_to_encode = len(data)

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return lambda *_: PickledArray()
            case "numpy", "ndarray":
                return PickledArray
            case "numpy", "dtype":
                return PickledDtype
            case "_codecs", "encode":
                return self._encode
        raise pickle.UnpicklingError(f"it asks for {f'{module:.80}.{name:.80}'!r}, which CIFAR does not need")

    def _encode(self, text: str, encoding: str) -> bytes:
        """How Python 3 writes bytes into a protocol 2 pickle: _codecs.encode(text, 'latin1')."""
        if type(text) is not str or not isinstance(encoding, (str, bytes)) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("an encoding other than latin1")
        self._left_to_encode -= len(text)
        if self._left_to_encode < 0:  # the same text is encoded repeatedly
            raise pickle.UnpicklingError("more bytes than the file has")
        return text.encode("latin1")

    def build(self) -> None:
        """Handles BUILD only for the two classes above. Elsewhere BUILD could set any attribute."""
        state = self.stack.pop()
        if type(self.stack[-1]) not in (PickledArray, PickledDtype):
            raise pickle.UnpicklingError("a state for an object without one")
        self.stack[-1].__setstate__(state)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def set_items(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    @staticmethod
    def _set(target: Any, items: list[Any]) -> None:
        if type(target) is not dict or not all(isinstance(key, (str, bytes)) for key in items[::2]):
            raise pickle.UnpicklingError("a key that is not a string")  # hashing nested tuples can take forever
        target.update(zip(items[::2], items[1::2], strict=True))


def read_batch(data: bytes | memoryview, label_key: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a batch's pixels, uint8 [count, 3072], and labels, int64 [count]. A damaged batch can raise anything."""
    # Each image has a number in each list of labels, and a file name that may be memoized: 6 opcodes in CIFAR-100.
    batch = ArrayUnpickler(data, max_opcodes=1000 + 20 * count).load()
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    pixels, labels = batch["data"], batch[label_key]
    if not isinstance(pixels, PickledArray) or type(labels) is not list:
        raise pickle.UnpicklingError("the pixels are not an array or the labels are not a list")
    if pixels.shape != (count, PIXELS) or len(labels) != count or len(pixels.buffer) != count * PIXELS:
        found = pixels.shape[0] if pixels.shape else 0
        raise pickle.UnpicklingError(f"it holds {found} images and {len(labels)} labels, not {count} of each")
    if not all(type(label) is int for label in labels):
        raise pickle.UnpicklingError("a label that is not a number")
    return np.frombuffer(pixels.buffer, np.uint8).reshape(count, PIXELS), np.array(labels, np.int64)
