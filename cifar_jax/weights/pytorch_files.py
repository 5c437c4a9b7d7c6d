"""Reads the tensors of a PyTorch file (zip archive or legacy format) without PyTorch: see torch_pickle.

Reading takes no more memory than the network's tensors, because only storages of the state_dict's tensors are read.
"""

from __future__ import annotations

import dataclasses
import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.weights.params import Named
from cifar_jax.weights.torch_pickle import Foreign, TensorRecord, read_pickle

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first pickle of the legacy format, a number
MAX_VALUES = 2**22  # limit of one tensor; the largest has 331,776
MAX_BYTES = 2**27  # limit of all tensors; the largest network has 5.5 MB in float32
MAX_TENSORS = 1000
MAX_PICKLE = 2**23
WRAPPERS = ("state_dict", "model_state_dict", "net", "model", "network", "params", "module")
_BOOKKEEPING = ("n_averaged", "num_batches_tracked")
TYPES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": "V2", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
    "ComplexFloatStorage": "c8", "ComplexDoubleStorage": "c16",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Archive:
    """`root`: the pickled object; `read_storage(key, number of bytes)` → bytes; `order`: byte order, < or >."""

    root: Any
    read_storage: Callable[[str, int], bytes]
    order: str


def is_bookkeeping(name: str) -> bool:
    """Tells whether a tensor of a state_dict only counts steps or averages."""
    return name.rpartition(".")[2] in _BOOKKEEPING


def read_tensors(path: Path) -> tuple[list[Named], list[str]]:
    """Returns a state_dict's (name, tensor) pairs in its order, and notes on what was opened or dropped.

    Raises: UserError for a damaged file or one without a state_dict; OSError.
    """
    with path.open("rb") as file:
        try:
            archive = _open_zip(file) if zipfile.is_zipfile(file) else _open_legacy(file)
            state_dict, notes = _state_dict(archive.root)
            named: list[Named] = []
            budget = MAX_BYTES
            for name, record in state_dict.items():
                if is_bookkeeping(name):
                    notes.append(f"dropped tensor {name}")
                    continue
                named.append((name, _tensor(name, record, archive, budget)))
                budget -= named[-1][1].nbytes
        except UserError:
            raise
        except Exception as error:  # pickle, zip and numpy can raise anything for a damaged file
            text = str(error).strip() or type(error).__name__
            raise UserError(f"damaged, or not written by torch.save ({text:.200})") from error
    return named, notes


def _open_zip(file: IO[bytes]) -> _Archive:
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles or any(name.endswith("constants.pkl") for name in members):
        raise UserError("a zip archive without a state_dict (maybe TorchScript): save model.state_dict()")
    folder = pickles[0][: -len("data.pkl")]

    def read(name: str, length: int) -> bytes:
        info = members[f"{folder}{name}"]
        if info.compress_type != zipfile.ZIP_STORED or not 0 <= length <= info.file_size:
            raise ValueError(f"{name} is compressed or truncated")
        with archive.open(info) as member:
            data = member.read(length + 1)  # one byte more: reading to the end verifies the checksum
        if len(data) < length:
            raise ValueError(f"{name} is truncated")
        return data[:length]

    if members[pickles[0]].file_size > MAX_PICKLE:
        raise UserError("contains more than a state_dict: save model.state_dict()")
    name = f"{folder}byteorder"
    big = name in members and read("byteorder", min(members[name].file_size, 10)) == b"big"
    root = read_pickle(io.BytesIO(read("data.pkl", members[pickles[0]].file_size)))
    return _Archive(root, lambda key, length: read(f"data/{key}", length), ">" if big else "<")


def _open_legacy(file: IO[bytes]) -> _Archive:
    """Opens the legacy format: pickles (magic number, version, system, object, storages' keys), then the storages."""
    file.seek(0)
    if file.read(len(LEGACY_MAGIC)) != LEGACY_MAGIC:
        raise UserError("a pickle that torch.save did not write: save model.state_dict() with torch.save")
    read_pickle(file)
    system, root, keys = read_pickle(file), read_pickle(file), read_pickle(file)
    records = _storages(root)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        places[key] = file.tell(), count * np.dtype(TYPES[records[key][0]]).itemsize
        file.seek(places[key][1], 1)

    def read(key: str, length: int) -> bytes:
        start, stored = places[key]
        file.seek(start)
        data = file.read(length) if length <= min(stored, MAX_BYTES) else b""
        if len(data) != length:
            raise ValueError(f"storage {key} is truncated")
        return data

    end = file.seek(0, 2)
    if any(start + length > end or length < 0 for start, length in places.values()):
        raise ValueError("the file is truncated")
    return _Archive(root, read, "<" if system.get("little_endian", True) else ">")


def _storages(root: Any) -> dict[str, tuple[str, str, int]]:
    """Returns all storages of an object by key. Each object is visited once."""
    found, seen, left = {}, set(), [root]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, TensorRecord):
            found[item.storage[1]] = item.storage
        elif isinstance(item, tuple) and len(item) == 3 and isinstance(item[0], str) and item[0].endswith("Storage"):
            found[item[1]] = item
        elif isinstance(item, (dict, list, tuple)):
            left += item.values() if isinstance(item, dict) else item
    return found


def _state_dict(root: Any) -> tuple[dict[str, Any], list[str]]:
    """The tensors' dictionary, taken out of the dictionaries around it."""
    notes: list[str] = []
    if isinstance(root, Foreign):
        raise UserError(f"contains a whole pickled object ({root.name}): save model.state_dict()")
    is_dict = lambda value: isinstance(value, dict) and any(isinstance(x, TensorRecord) for x in value.values())
    while isinstance(root, dict) and not is_dict(root) and len(notes) < 3:
        inner = [key for key, value in root.items() if key in WRAPPERS and isinstance(value, dict)]
        inner = inner or [key for key, value in root.items() if is_dict(value)]
        if len(inner) != 1:
            break
        notes.append(f"reading its entry {inner[0]}")
        root = root[inner[0]]
    if not isinstance(root, dict) or not root:
        raise UserError("not a state_dict: save model.state_dict(), not the model or a checkpoint around it")
    if len(root) > MAX_TENSORS:
        raise UserError(f"has {len(root)} tensors, many more than any supported network")
    for name, value in root.items():
        if not isinstance(name, str):
            raise UserError(f"not a state_dict: a key is {str(name)[:50]}, not a name")
        if isinstance(value, Foreign) and value.name.startswith(("torch._utils.", "torch._tensor.")):
            raise UserError(f"tensor {name} can't be read: it must be dense, with data, and not quantized")
        if not isinstance(value, TensorRecord):
            raise UserError(
                f"not a state_dict: {name} is not a tensor, so it holds more than tensors: save model.state_dict()"
            )
    return root, notes


def _tensor(name: str, record: TensorRecord, archive: _Archive, budget: int) -> np.ndarray:
    kind, key, count = record.storage
    values = math.prod(record.size)
    if values > MAX_VALUES:
        raise UserError(f"tensor {name} has {values} values, more than in any supported network")
    if kind not in TYPES:
        raise UserError(f"tensor {name} can't be read: a {kind} is not supported")
    dtype = np.dtype(archive.order + TYPES[kind] if TYPES[kind] != "V2" else archive.order + "u2")
    if values * dtype.itemsize > budget:
        raise UserError(f"its tensors have more than {MAX_BYTES // 2**20} MiB: save one model.state_dict()")
    last = record.offset + sum((side - 1) * step for side, step in zip(record.size, record.stride))
    if min((*record.size, *record.stride, record.offset), default=0) < 0 or (values and not last < count <= MAX_BYTES):
        raise ValueError(f"tensor {name} lies outside its storage")
    start = record.offset if values else 0
    flat = np.frombuffer(archive.read_storage(key, (last + 1 if values else 0) * dtype.itemsize), dtype)[start:]
    view = np.lib.stride_tricks.as_strided(flat, record.size, [step * dtype.itemsize for step in record.stride])
    if TYPES[kind] == "V2":  # bfloat16: the upper half of a float32
        return np.ascontiguousarray((view.astype(np.uint32) << 16).view(np.float32))
    return np.ascontiguousarray(view.astype(dtype.newbyteorder("=")))
