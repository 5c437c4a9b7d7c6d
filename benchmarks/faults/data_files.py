"""Faults of data files: mutated and crafted files in each layout."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import os
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.faults import guard
from benchmarks.faults.lab import Lab, Skipped
from benchmarks.faults.layouts import INFO, LAYOUTS, RECORDS, binary_files, image_folder, python_files, small_data
from benchmarks.faults.mutations import mutate
from cifar_jax.datasets import DATASETS, Dataset, load_dataset, mix_classes

RIGHT = "read as it was"
CHANGED = "read, with the changed pixels or labels"
Layouts = Mapping[str, Callable[[], dict[str, bytes]]]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_binary(folder: Path) -> None:
    write(folder, binary_files())


@contextlib.contextmanager
def small_cifar() -> Iterator[None]:
    """Context in which CIFAR-10 has 100 training and 20 test images."""
    with mock.patch.dict(DATASETS, {"cifar10": INFO}):
        yield


def load(folder: Path, cache: Path) -> str:
    """Loads a folder. Returns: RIGHT or CHANGED."""
    with small_cifar(), mock.patch.dict(os.environ, {"CIFAR_JAX_CACHE": str(cache)}):
        dataset = load_dataset("cifar10", folder)
    data = small_data()
    expected = mix_classes(Dataset(**data, info=INFO, source=""))
    fine = lambda name: np.array_equal(getattr(dataset, name), getattr(expected, name))
    return RIGHT if all(map(fine, data)) else CHANGED


def read(folder: Path) -> str:
    return load(folder, folder / "cache")


def mutated(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    return _mutated(lab, count, rng, LAYOUTS)


def mutated_images(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    return _mutated(lab, count, rng, {"image folder": image_folder})


def mutated_records(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    if any(importlib.util.find_spec(package) is None for package in ("pyarrow", "array_record")):
        raise Skipped("needs pyarrow and array-record")
    return _mutated(lab, count, rng, RECORDS)


def _mutated(lab: Lab, count: int, rng: np.random.Generator, layouts: Layouts) -> Iterator[str]:
    """Mutates one file of a layout: an archive, or a file in a folder."""
    folder = lab.new_folder()
    originals = {name: make() for name, make in layouts.items()}
    paths = []
    for number in range(count):
        files = dict(originals[list(originals)[number % len(originals)]])
        name = list(files)[int(rng.integers(len(files)))]
        files[name] = mutate(files[name], rng)
        paths.append(write(folder / f"mutated{number}", files))
        if len(paths) == 50 or number == count - 1:
            yield from guard.read_all(read, paths, folder)
            for path in paths:
                shutil.rmtree(path)
            paths = []
    shutil.rmtree(folder, ignore_errors=True)


class _Evil:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.system, ("touch executed",)


def _member(name: str, kind: bytes, link: str = "", size: int = 0) -> bytes:
    info = tarfile.TarInfo(f"{INFO.python.folder}/{name}")
    info.type, info.linkname, info.size = kind, link, size
    return info.tobuf(tarfile.GNU_FORMAT)


def with_checksum(header: bytes) -> bytes:
    """Returns a changed tar header with its new checksum."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _png(width: int, height: int) -> bytes:
    chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    pixels = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def crafted_folders() -> dict[str, dict[str, bytes]]:
    """Returns small files that run code, write elsewhere or exhaust the machine if a reader trusts them."""
    batch = f"{INFO.python.folder}/{INFO.python.train[0]}"
    tar = INFO.python.archive
    python = python_files()
    shared = b"]q\0" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60))
    pickles = {
        "a pickle that executes": pickle.dumps(_Evil(), protocol=2),
        "a bytearray of 4 GiB": b"\x80\x05\x96" + (2**32).to_bytes(8, "little") + b".",
        "a memo of gigabytes": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "shared lists": b"\x80\x02}(U\x06labels" + shared + b"U\x04dataNu.",
        "a million lists": b"\x80\x02(" + b"]" * 10**6 + b"t.",
    }
    tars = {
        "links to themselves": _member("data_batch_1", tarfile.SYMTYPE, batch) * 6,
        "links out of the folder": _member("data_batch_1", tarfile.SYMTYPE, "../../../etc/passwd"),
        "a member above the folder": _member("../../escaped", tarfile.REGTYPE),
        "a size of 2^60": _member("data_batch_1", tarfile.REGTYPE, size=2**60),
        "a sparse member of 6 GiB": with_checksum(
            _member("data_batch_1", tarfile.GNUTYPE_SPARSE)[:386]
            + b"00000000000\0" * 8 + b"\0" + b"60000000000\0" + bytes(17)
        ),
        "a gigabyte of zeros": bytes(2**28),
        "2,000 headers": _member("nothing", tarfile.REGTYPE) * 2000,
    }  # fmt: skip
    images = {
        f"{split}/{name}/{i}.png": _png(13_000, 13_000)
        for split, each in (("train", 10), ("test", 2))
        for name in INFO.class_names
        for i in range(each)
    }
    return {
        **{name: python | {batch: content} for name, content in pickles.items()},
        **{name: {tar: gzip.compress(content)} for name, content in tars.items()},
        "images of 13,000² pixels": images,
        "a saved page": {tar: b"<html>not found</html>"},
        "objects in an npz file": {"cifar10.npz": _npz_of_objects()},
    }


def _npz_of_objects() -> bytes:
    file = io.BytesIO()
    np.savez(file, x_train=np.array([_Evil()]), allow_pickle=True)
    return file.getvalue()


def crafted(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    folder = lab.new_folder()
    folders = list(crafted_folders().items())[:count]
    paths = [write(folder / name, files) for name, files in folders]
    yield from guard.read_all(read, paths, folder)
    shutil.rmtree(folder)
