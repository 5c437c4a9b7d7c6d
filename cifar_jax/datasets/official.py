"""Reads the official CIFAR files, pickles or binary records, from an archive or the folder it unpacks to."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cifar_jax.datasets.cifar import PIXELS, Cifar, OfficialFiles
from cifar_jax.datasets.info import SPLITS, Arrays
from cifar_jax.datasets.layout import Layout, read_regular, starts_with
from cifar_jax.datasets.pickles import read_batch
from cifar_jax.errors import UserError

_BLOCK = 512  # bytes of a tar block


def find(info: Cifar, folder: Path, named: bool) -> Path | None:
    """Returns the folder or archive to read. If the user named `folder`, it may also be one of them itself."""
    if named and os.path.isfile(folder) and not any(starts_with(folder, magic) for magic in (b"PK\3\4", b"PAR1")):
        return folder
    python, *binary = (kind.archive for kind in info.official)
    for place in (folder, folder / info.keras_folder):
        for unpacked in [place / kind.folder for kind in info.official] + ([place] if named else []):
            if any(os.path.isfile(unpacked / name) for kind in info.official for name in kind.names):
                return unpacked
        archives = (python, *info.keras_archives, *binary)
        if found := next((place / name for name in archives if os.path.isfile(place / name)), None):
            return found
    return None


def read(info: Cifar, path: Path) -> Arrays:
    """Reads a folder or archive to arrays with NHWC images. Raises: UserError if a file is incomplete or damaged."""
    if os.path.isfile(path):
        members = _read_members(info, path)
        present: Callable[[str], bool] = members.__contains__
    else:
        present = lambda name: os.path.isfile(path / name)
    kind = next((kind for kind in info.official if any(map(present, kind.names))), None)
    if kind is None:
        raise UserError(f"{path}: no file of {info.title} in it ({info.python.names[0]} …): name its archive or folder")
    if missing := [name for name in kind.names if not present(name)]:
        raise UserError(f"{path}: {missing[0]} of {info.title} is missing: {info.advice}")
    arrays: Arrays = {}
    for split in SPLITS:
        names = getattr(kind, split)
        batches = []
        for name in names:
            count = info.size(split) // len(names)
            data = members[name] if os.path.isfile(path) else read_regular(path / name, _size_limit(count), info)
            batches.append(_read_batch(info, kind, data, count, path / name))
        images = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
        arrays[f"{split}_images"] = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        arrays[f"{split}_labels"] = np.concatenate([labels for _, labels in batches])
    return arrays


def _files(info: Cifar, path: Path) -> list[Path]:
    inside = [path / name for kind in info.official for name in kind.names]
    return [path] if os.path.isfile(path) else [file for file in inside if os.path.isfile(file)]


def _wanted(info: Cifar) -> str:
    return ", ".join(name for kind in info.official for name in (kind.folder, kind.archive))


LAYOUT = Layout(find, read, _files, _wanted)


def _read_batch(
    info: Cifar, kind: OfficialFiles, data: bytes | memoryview, count: int, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a file to pixels, uint8 [count, 3072], and labels, integers [count]."""
    if kind is info.binary:
        record = info.label_bytes + PIXELS
        if len(data) != count * record:
            raise UserError(f"{path}: has {len(data)} bytes instead of {count * record}: {info.advice}")
        records = np.frombuffer(data, np.uint8).reshape(count, record)
        return records[:, info.label_bytes :], records[:, info.label_bytes - 1]
    try:
        return read_batch(data, info.label_key, count)
    except Exception as error:  # a malicious or truncated pickle can raise anything
        reason = " ".join(str(error)[:200].split()) or type(error).__name__
        raise UserError(f"{path}: not a batch of {info.title} ({reason}): {info.advice}") from error


def _size_limit(images: int) -> int:
    """Returns the largest size of files with this many images. Names and numbers in pickles add less than a tenth."""
    return images * PIXELS * 5 // 4 + 2**20


def _read_members(info: Cifar, path: Path) -> dict[str, memoryview]:
    """Returns {name: bytes} of CIFAR's files in an archive, in any folder of it. Nothing is unpacked to disk."""
    limit = _size_limit(info.train_size + info.test_size)
    wanted = {name for kind in info.official for name in kind.names}
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            data = memoryview(file.read(limit + 1))  # to the end, where gzip stores its checksum
        if len(data) > limit:
            raise UserError(f"{path}: unpacks to more than {limit} bytes, too many for {info.title}: {info.advice}")
        return {name: content for name, content in _plain_files(data) if name in wanted}
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}: make it readable, or name another copy") from error
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: incomplete or corrupt ({error}): {info.advice}") from error


def _plain_files(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Yields (last part of the name, bytes) of a tar archive's regular files. Raises: ValueError if it is damaged.

    The module tarfile also follows links, sparse maps and extended headers, by which a small archive can exhaust the
    machine. CIFAR's archives use none of them, except extended headers for long names and times, which are skipped.
    """
    position = 0
    while position + _BLOCK <= len(data):
        header = bytes(data[position : position + _BLOCK])
        if not header.strip(b"\0"):
            break
        stored = int(header[148:156].strip(b"\0 ") or b"0", 8)
        if stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ValueError("wrong checksum of a tar header")
        size = int(header[124:136].strip(b"\0 ") or b"0", 8)  # binary sizes, above 8 GiB, raise ValueError
        position += _BLOCK
        if not 0 <= size <= len(data) - position:
            raise ValueError("truncated member")
        if header[156:157] in (b"0", b"\0"):
            name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")
            yield name.rpartition("/")[2], data[position : position + size]
        position += -(-size // _BLOCK) * _BLOCK
    if not position:
        raise ValueError("not a tar archive")
