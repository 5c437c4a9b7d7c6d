"""Faults of weight files: mutated files, crafted files, and state_dicts in another order."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults import guard
from benchmarks.faults.lab import Lab, Skipped
from benchmarks.faults.mutations import mutate
from cifar_jax.errors import UserError
from cifar_jax.pretrained import pretrained_path
from cifar_jax.weights import keras, pytorch
from cifar_jax.weights.files import Weights, load_weights, save_weights

RIGHT = "read as it was"
CHANGED = "read, with the changed numbers"
ORIGINAL = "lenet5_reference"
CHEAP, SLOW = ("safetensors", "pth"), ("h5", "weights.h5", "keras")  # each slow file starts a process


@functools.cache
def _original() -> Weights:
    return load_weights(pretrained_path(ORIGINAL))


def read(path: Path) -> str:
    """Returns RIGHT, or CHANGED for other finite numbers, which formats without checksums can't detect."""
    params, expected = load_weights(path).params, _original().params
    right = changed = True
    for layer, tensors in expected.items():
        for name, tensor in tensors.items():
            found = params[layer][name]
            right = right and np.array_equal(found, tensor)
            changed = changed and found.shape == tensor.shape and bool(np.isfinite(found).all())
    return RIGHT if right else CHANGED if changed else "read, with numbers that are not finite"


def _require(kinds: tuple[str, ...]) -> None:
    try:
        pytorch.import_torch()
        if set(kinds) & set(SLOW):
            keras.import_keras()
    except UserError as error:
        raise Skipped("needs the extra parity") from error


def _mutated(lab: Lab, count: int, rng: np.random.Generator, kinds: tuple[str, ...]) -> Iterator[str]:
    _require(kinds)
    folder = lab.new_folder()
    folder.mkdir()
    originals = {}
    for kind in kinds:
        save_weights(folder / f"original.{kind}", _original())
        originals[kind] = (folder / f"original.{kind}").read_bytes()
    if "pth" in kinds:
        originals["old.pth"] = _old_format()
    for start in range(0, count, 50):  # 1.6 MB per file
        paths = []
        for number in range(start, min(start + 50, count)):
            kind = list(originals)[number % len(originals)]
            paths.append(folder / f"mutated{number}.{kind}")
            paths[-1].write_bytes(mutate(originals[kind], rng))
        yield from guard.read_all(read, paths, folder)
        for path in paths:
            path.unlink()
    shutil.rmtree(folder)


def _old_format() -> bytes:
    """Returns the file in PyTorch's legacy format, before zip archives."""
    torch, file = pytorch.import_torch(), io.BytesIO()
    torch.save(pytorch.file_state_dict(_original().params, "lenet5"), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def mutated(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    return _mutated(lab, count, rng, CHEAP)


def mutated_keras(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    return _mutated(lab, count, rng, SLOW)


class _Evil:
    """Unpickling it calls a function with arguments."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call[0], self._call[1:]


def _zip(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _pth(content: bytes) -> bytes:
    return _zip({"archive/data.pkl": content, "archive/version": b"3\n", "archive/data/0": bytes(64)})


@functools.cache
def crafted_files() -> dict[str, bytes]:
    """Returns small files that run code or exhaust the machine if a reader trusts them."""
    evil = pickle.dumps({"conv1.weight": _Evil(os.system, "touch executed")}, protocol=2)
    nested = json.dumps({"config": {"layers": []}}).encode()[:-3] + b"[" * 100_000
    shared = b"\x80\x02]q\0" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60)) + b"."
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    deep = b'{"__metadata__":' + b"[" * 100_000
    bomb, small = bytes(2**28), bytes(2**26)
    return {
        "a pickle that executes.pth": _pth(evil),
        "a bare pickle that executes.pth": evil,
        "a 12-byte pickle of 4 GiB.pth": _pth(b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b"."),
        "the same, bare.pth": b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b".",
        "lists of lists of lists.pth": _pth(shared),
        "a million lists.pth": _pth(b"\x80\x02(" + b"]" * 10**6 + b"t."),
        "numbers and None as names.pth": _pth(pickle.dumps({1: 2, None: 3.0}, protocol=2)),
        "a member of 256 MiB.pth": _zip({"archive/data.pkl": bomb}),
        "an architecture nested deep.keras": _zip({"config.json": nested, "model.weights.h5": b""}),
        "deflate of 256 MiB.keras": _zip({"config.json": b"{}", "model.weights.h5": bomb}),
        "LZMA of 64 MiB.keras": _zip({"config.json": b"{}", "model.weights.h5": small}, zipfile.ZIP_LZMA),
        "bzip2 of 64 MiB.keras": _zip({"config.json": b"{}", "model.weights.h5": small}, zipfile.ZIP_BZIP2),
        "HDF5 that ends at once.h5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "a tensor of 4 TiB.safetensors": len(header).to_bytes(8, "little") + header,
        "a header nested deep.safetensors": len(deep).to_bytes(8, "little") + deep,
        "a header of 2^63 bytes.safetensors": b"\xff" * 7 + b"\x7f{",
        "a saved page.pth": b"<html>not found</html>",
        "nothing.safetensors": b"",
    }


def crafted(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    folder = lab.new_folder()
    folder.mkdir()
    paths = []
    for name, content in list(crafted_files().items())[:count]:
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    yield from guard.read_all(read, paths, folder)
    shutil.rmtree(folder)


def names_tell(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Loads tensors in random order, with a wrapper's prefix or inside a checkpoint's dict."""
    _require(("pth",))
    torch, folder = pytorch.import_torch(), lab.new_folder()
    folder.mkdir()
    state_dict = pytorch.file_state_dict(_original().params, "lenet5")
    paths = []
    for number in range(count):
        prefix = ("", "module.", "_orig_mod.")[number % 3]
        names = [list(state_dict)[i] for i in rng.permutation(len(state_dict))]
        content: dict[str, Any] = {prefix + name: state_dict[name] for name in names}
        wrapper = (None, "state_dict", "net", "model")[number % 4]
        paths.append(folder / f"shuffled{number}.pth")
        torch.save(content if wrapper is None else {wrapper: content, "epoch": 3}, paths[-1])
    yield from guard.read_all(read, paths, folder)
    shutil.rmtree(folder)
