"""Caches decoded arrays as .npy files with checksums. The next start maps them into memory.

An entry is a folder with the arrays and manifest.json: {'sha256': {file: checksum}, 'checked': {file: [size, mtime]}},
mtime in ns. Checksums are verified only if a file's size or time differs from 'checked'.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.console import say
from cifar_jax.datasets.cifar import IMAGE_SHAPE, Cifar
from cifar_jax.datasets.info import SPLITS, Arrays
from cifar_jax.datasets.partial import partial_folder
from cifar_jax.errors import UserError
from cifar_jax.io import write_json

_MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 2**16  # bytes
KEPT = 4  # entries of a dataset


class _Damaged(Exception):
    """The reason why an entry can't be used."""


def cached(info: Cifar, cache: Path | None, files: Iterable[Path], decode: Callable[[], Arrays]) -> Arrays:
    """Returns decode(), or its cached result if `files` have not changed since. Args: cache: the cache's folder."""
    if cache is None:
        say("no home folder, so decoded data are not cached: set CIFAR_JAX_CACHE to a folder", error=True)
        return decode()
    entry = cache / f"{info.name}-{_key(files)}"
    try:
        arrays = _open(info, entry)
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(entry)  # it was used: see _prune
        return arrays
    except FileNotFoundError:
        pass
    except (_Damaged, OSError) as error:
        say(f"{entry}: {error}: decoding again", error=True)
    arrays = decode()
    try:
        _save(info, entry, arrays)
    except OSError as error:
        say(f"can't cache decoded data in {entry} ({error}): the next start will decode again", error=True)
    with contextlib.suppress(OSError):  # another process prunes too
        _prune(info, entry)
    return arrays


def _key(files: Iterable[Path]) -> str:
    stamp, real_path = hashlib.sha256(), functools.cache(os.path.realpath)
    for file in files:
        status = file.stat()
        place = os.fsencode(f"{real_path(file.parent)}/{file.name}")  # the name may not be UTF-8
        stamp.update(place + f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return stamp.hexdigest()[:16]


def _expected(info: Cifar) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Returns {array name: (type, shape)}."""
    result: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {}
    for split in SPLITS:
        result[f"{split}_images"] = np.uint8, (info.size(split), *IMAGE_SHAPE)
        result[f"{split}_labels"] = np.int32, (info.size(split),)
    return result


def _open(info: Cifar, entry: Path) -> Arrays:
    """Maps an entry's arrays into memory. Raises: FileNotFoundError if there is no such entry; _Damaged."""
    entry.stat()
    arrays = {}
    for name, (dtype, shape) in _expected(info).items():
        arrays[name] = _map(entry / f"{name}.npy", dtype, shape)
        if name.endswith("labels") and (arrays[name].min() < 0 or arrays[name].max() >= info.num_classes):
            raise _Damaged(f"{name}.npy has a label outside 0…{info.num_classes - 1}")
    states = {f"{name}.npy": _state(entry / f"{name}.npy") for name in arrays}
    manifest = _read_manifest(entry)
    if manifest["sha256"].keys() != states.keys():
        raise _Damaged(f"{_MANIFEST} lists other files")
    if manifest["checked"] != states:
        for file in states:
            if _checksum(entry / file) != manifest["sha256"][file]:
                raise _Damaged(f"{file} has another checksum")
        with contextlib.suppress(UserError):  # a read-only cache is verified again next time
            write_json(entry / _MANIFEST, {"sha256": manifest["sha256"], "checked": states})
    return arrays


def _map(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """Maps a .npy file of this type and shape. Its header is compared with the expected one and never parsed."""
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    length = len(header.getvalue())
    if not os.path.isfile(path):
        raise _Damaged(f"{path.name} is missing")
    with path.open("rb") as file:
        if file.read(length) != header.getvalue():
            raise _Damaged(f"{path.name} has another type or shape")
    if path.stat().st_size != length + np.dtype(dtype).itemsize * int(np.prod(shape)):
        raise _Damaged(f"{path.name} has another size")
    return np.memmap(path, dtype, mode="r", offset=length, shape=shape)


def _read_manifest(entry: Path) -> dict[str, Any]:
    path = entry / _MANIFEST
    if not os.path.isfile(path) or path.stat().st_size > _MANIFEST_LIMIT:
        raise _Damaged(f"{_MANIFEST} is missing or too large")
    try:
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest["sha256"], dict) and isinstance(manifest["checked"], dict):
            return manifest
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise _Damaged(f"{_MANIFEST} can't be read")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _save(info: Cifar, entry: Path, arrays: Arrays) -> None:
    """Writes an entry to a temporary folder, syncs it and renames it, so that readers never see half an entry."""
    with partial_folder(entry.parent) as partial:
        checksums, states = {}, {}
        for name, array in arrays.items():
            path = partial / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
            checksums[path.name], states[path.name] = _checksum(path), _state(path)
        with (partial / _MANIFEST).open("w") as file:
            json.dump({"sha256": checksums, "checked": states}, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        if not _is_good(info, entry):
            shutil.rmtree(entry, ignore_errors=True)
            try:
                partial.rename(entry)
            except OSError:
                if not _is_good(info, entry):  # otherwise another process has written it
                    raise
            _sync_folder(entry.parent)


def _prune(info: Cifar, newest: Path) -> None:
    """Removes a dataset's entries above KEPT, those first that were not used for longest.

    A batch job may copy the data to a new place each time.
    """
    entries = [path for path in newest.parent.glob(f"{info.name}-{'[0-9a-f]' * 16}") if path != newest]
    for entry in sorted(entries, key=lambda path: path.stat().st_mtime_ns)[: 1 - KEPT]:
        shutil.rmtree(entry, ignore_errors=True)  # what another process has mapped stays readable to it


def _is_good(info: Cifar, entry: Path) -> bool:
    try:
        _open(info, entry)
    except (_Damaged, OSError):
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems can't sync a folder
    finally:
        os.close(descriptor)
