"""Faults of data files: mutated and crafted files in each layout."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import os
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks.faults import guard
from benchmarks.faults.lab import Lab
from benchmarks.faults.mutations import mutate
from cifar_jax.datasets import DATASETS, load_dataset
from cifar_jax.datasets.cifar import CIFAR

RIGHT = "read as it was"
CHANGED = "read, with the changed pixels or labels"
INFO = dataclasses.replace(CIFAR["cifar10"], train_size=100, test_size=20)
Data = dict[str, np.ndarray]


def small_data() -> Data:
    """Returns 100 training and 20 test images, random, with labels from 0 to 9."""
    rng = np.random.default_rng(0)
    labels = np.arange(120, dtype=np.int32) % 10
    images = rng.integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
    return {
        "train_images": images[:100],
        "train_labels": labels[:100],
        "test_images": images[100:],
        "test_labels": labels[100:],
    }


def _batches(names: tuple[str, ...], split: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    data = small_data()
    planes = data[f"{split}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072)
    size = len(planes) // len(names)
    for i, name in enumerate(names):
        rows = slice(i * size, (i + 1) * size)
        yield name, planes[rows], data[f"{split}_labels"][rows]


def binary_files() -> dict[str, bytes]:
    files = INFO.binary
    return {
        f"{files.folder}/{name}": np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tobytes()
        for split in ("train", "test")
        for name, planes, labels in _batches(getattr(files, split), split)
    }


def python_files() -> dict[str, bytes]:
    files = INFO.python
    return {
        f"{files.folder}/{name}": pickle.dumps({b"labels": labels.tolist(), b"data": planes}, protocol=2)
        for split in ("train", "test")
        for name, planes, labels in _batches(getattr(files, split), split)
    }


def archive() -> dict[str, bytes]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, content in python_files().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {INFO.python.archive: file.getvalue()}


def npz() -> dict[str, bytes]:
    data, file = small_data(), io.BytesIO()
    names = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
    np.savez(file, **{ours: data[name] for ours, name in names.items()})  # type: ignore[arg-type]
    return {"cifar10.npz": file.getvalue()}


LAYOUTS: dict[str, Callable[[], dict[str, bytes]]] = {
    "binary": binary_files,
    "python": python_files,
    "archive": archive,
    "npz": npz,
}


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
    expected = small_data()
    fine = lambda name: np.array_equal(getattr(dataset, name), expected[name])
    return RIGHT if all(map(fine, expected)) else CHANGED


def read(folder: Path) -> str:
    return load(folder, folder / "cache")


def mutated(lab: Lab, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Mutates one file of a layout: an archive, or a batch in a folder."""
    folder = lab.new_folder()
    originals = {name: make() for name, make in LAYOUTS.items()}
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
        "a sparse member of 6 GiB": _member("data_batch_1", tarfile.GNUTYPE_SPARSE)[:386]
        + b"00000000000\0" * 8 + b"\0" + b"60000000000\0" + bytes(17),
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
