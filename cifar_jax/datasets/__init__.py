"""From a dataset's name and a folder to uint8 NHWC images and int32 labels, and the order of an epoch's batches.

CIFAR-10 (Krizhevsky, 2009) is read as TensorFlow Datasets, torchvision or Keras leave it on disk, else downloaded.
It is decoded once; the arrays are cached as .npy files and memory-mapped on the next start.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import shutil
import sys
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.errors import UserError

CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "digits": tuple("0123456789"),
}


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DATASETS = {name: DatasetInfo(name, names, _MEAN, _STD) for name, names in CLASS_NAMES.items()}
ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
IMAGES_PER_BATCH = 10_000  # of which the training set has five, the test set one
_RECORD = 1 + 3 * 32 * 32  # the binary layout: a label byte, then the red, green and blue planes
_PICKLE_SIZE_LIMIT = 64 * 2**20  # the official pickles have 31 MB, the unpacked archives 186 MB
_ARCHIVE_SIZE_LIMIT = 256 * 2**20
Arrays = dict[str, np.ndarray]
_ARRAY_NAMES = ("train_images", "train_labels", "test_images", "test_labels")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, 32, 32, 3], labels int32 [N], for train and test; `source` says where they came from."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    source: str


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads 'cifar10' or 'digits'.

    cifar10 is looked for in data_dir; in TFDS_DATA_DIR or TFDS' default folder; in ., ./data and Keras' folder. If it
    is nowhere, the official archive is downloaded, into data_dir or the cache.

    Raises: UserError, naming the file, for a file that is short or corrupt, or when the download fails.
    """
    if name == "digits":
        return _load_digits()
    if name != "cifar10":
        raise UserError(f"unknown dataset {name!r}: choose cifar10 or digits")
    if data_dir is not None and not Path(data_dir).exists():
        raise UserError(
            f"--data-dir {data_dir} does not exist: name a folder with CIFAR-10, or create it for a download"
        )
    for number, folder in enumerate(_search_path(data_dir)):
        named = data_dir is not None and number == 0
        found = _find_layout(folder, itself=named)
        if found is not None:
            break
        if named:
            print(f"no CIFAR-10 in --data-dir {data_dir}: looking elsewhere", file=sys.stderr)
    else:
        archive = _download(Path(data_dir) if data_dir is not None else _cache_dir())
        found = _read_official, archive
    read, path = found
    return Dataset(**_cached(read, path), class_names=CLASS_NAMES["cifar10"], source=str(path))


def hold_out(dataset: Dataset, count: int) -> Dataset:
    """Splits the last `count` training images off as the test set. Raises: UserError if that leaves none."""
    if count == 0:
        return dataset
    kept = len(dataset.train_labels) - count
    if kept < 1:
        raise UserError(f"--holdout {count}: there are only {len(dataset.train_labels)} training images")
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:kept],
        train_labels=dataset.train_labels[:kept],
        test_images=dataset.train_images[kept:],
        test_labels=dataset.train_labels[kept:],
    )


def _search_path(data_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    if data_dir is not None:
        yield Path(data_dir)
    yield Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
    yield from (Path("."), Path("data"))  # where torchvision's examples put it
    keras = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets"
    yield from (keras, keras / "cifar-10-batches-py-target")  # Keras 2, Keras 3
    yield _cache_dir()


def _find_layout(folder: Path, itself: bool) -> tuple[Callable[[Path], Arrays], Path] | None:
    """The first layout of CIFAR-10 in a folder, with the function that reads it.

    With `itself`, for a path that the user named: it may also be the unpacked folder or the archive itself.
    """
    keras = ("cifar-10-batches-py.tar.gz", "cifar-10-batches-py-target_archive")
    archives = ("cifar-10-python.tar.gz", *keras, "cifar-10-binary.tar.gz")
    if itself and folder.is_file():
        if not folder.name.endswith((".tar.gz", ".tgz", "_archive")):
            raise UserError(f"{folder} is a file: name the folder that holds CIFAR-10, or a .tar.gz archive of it")
        return _read_official, folder
    for tfds in (folder, folder / "3.0.2", folder / "cifar10/3.0.2"):
        if (tfds / "dataset_info.json").is_file() and tfds.absolute().parts[-2:] == ("cifar10", "3.0.2"):
            if any(tfds.glob("cifar10-train.array_record*")):
                return _read_tfds, tfds
            # TFDS' default format; only TensorFlow reads it, and we don't depend on TensorFlow.
            print(
                f"passing over {tfds}: it holds TFRecord files; prepare it with file_format='array_record'",
                file=sys.stderr,
            )
    for place in (folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin", *([folder] if itself else [])):
        if any((place / f"{name}{suffix}").is_file() for name in _BATCHES for suffix in ("", ".bin")):
            return _read_official, place
    return next(((_read_official, folder / name) for name in archives if (folder / name).is_file()), None)


def _read_tfds(folder: Path) -> Arrays:
    try:  # here: importing them costs a second, and a cached start does not need it
        import array_record.python.array_record_module  # noqa: F401  # not on every platform; TFDS reads with it
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"{folder}: reading it needs tensorflow-datasets and array-record ({error}): install them, or name an "
            "official archive with --data-dir"
        ) from error
    arrays: Arrays = {}
    print(f"decoding {folder} (once; cached for the next start)", file=sys.stderr)
    for split, size in (("train", 5 * IMAGES_PER_BATCH), ("test", IMAGES_PER_BATCH)):
        try:
            source = tfds.data_source(
                "cifar10:3.0.2", split=split, data_dir=folder.absolute().parents[1], download=False
            )
            # TFDS shuffles; the ids (train_00000, …) number the examples as they were read from their origin.
            examples = sorted(source.__getitems__(range(len(source))), key=lambda example: example["id"])
            images = np.stack([example["image"] for example in examples])
            labels = np.array([example["label"] for example in examples])
        except Exception as error:  # the readers below TFDS raise whatever they like for a damaged file
            shard = _damaged_shard(folder, split)
            raise UserError(f"{shard}: can't read the {split} split ({error}): prepare the folder anew") from error
        if images.shape != (size, 32, 32, 3):
            raise UserError(f"{folder}: the {split} split has {len(images)} of {size} images: prepare it anew")
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, _checked_labels(labels, folder)
    return arrays


def _damaged_shard(folder: Path, split: str) -> Path:
    """The file that can't be read, which the readers' messages do not name; the folder if each can be."""
    from array_record.python.array_record_module import ArrayRecordReader

    for shard in sorted(folder.glob(f"cifar10-{split}.array_record*")):
        try:
            ArrayRecordReader(str(shard)).read_all()
        except Exception:  # a C++ status, as RuntimeError or ValueError
            return shard
    return folder


def _read_official(path: Path) -> Arrays:
    """Five training batches and the test batch, Python's or binary, in an archive or unpacked, to NHWC arrays."""
    archive = _read_archive(path) if path.is_file() else None
    present = lambda name: (path / name).is_file() if archive is None else name in archive
    binary = any(present(f"{name}.bin") for name in _BATCHES) and not any(map(present, _BATCHES))
    suffix, read_batch = (".bin", _read_binary) if binary else ("", _read_pickle)
    names = [f"{name}{suffix}" for name in _BATCHES]
    members = {name: _read_file(path / name) for name in names} if archive is None else archive
    if missing := [name for name in names if name not in members]:
        raise UserError(f"{path}: lacks {missing[0]}: delete it to download it again")
    batches = [read_batch(members[name], path / name) for name in names]
    images = [pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for pixels, _ in batches]
    labels = [_checked_labels(labels, path) for _, labels in batches]
    return dict(
        train_images=np.concatenate(images[:5]),
        train_labels=np.concatenate(labels[:5]),
        test_images=np.ascontiguousarray(images[5]),
        test_labels=labels[5],
    )


def _checked_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{path}: holds a label outside 0…9, so it is corrupt: delete it to download it again")
    return labels.astype(np.int32)


def _read_file(path: Path) -> bytes:
    try:
        actual = path.stat().st_size
        if actual > _PICKLE_SIZE_LIMIT:
            raise UserError(f"{path}: has {actual} bytes, too many for a batch of CIFAR-10")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: complete CIFAR-10 there, or move it away to download it") from error


def _read_archive(path: Path) -> dict[str, bytes]:
    """The batches' bytes by name, whatever their folder; nothing is unpacked to disk."""
    members: dict[str, bytes] = {}
    try:
        with gzip.open(path) as file:
            data = file.read(_ARCHIVE_SIZE_LIMIT + 1)  # to the end, where gzip keeps its checksum
        if len(data) > _ARCHIVE_SIZE_LIMIT:
            raise UserError(f"{path}: unpacks to more than {_ARCHIVE_SIZE_LIMIT} bytes, so it is not CIFAR-10")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name.removesuffix(".bin") in _BATCHES and (content := archive.extractfile(member)) is not None:
                    members[name] = content.read()
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: incomplete or corrupt ({error}): delete it to download it again") from error
    return members


def _read_binary(data: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if len(data) != IMAGES_PER_BATCH * _RECORD:
        raise UserError(
            f"{path}: has {len(data)} bytes, not {IMAGES_PER_BATCH * _RECORD}: delete it to download it again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:], records[:, 0]


class _PickledArray:
    """Stands for numpy.ndarray while unpickling; accepts a uint8 buffer and nothing else."""

    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, buffer = state
        is_uint8 = isinstance(dtype, _PickledDtype) and dtype.name in ("u1", b"u1", "uint8")
        if not is_uint8 or fortran_order or not isinstance(buffer, bytes):
            raise pickle.UnpicklingError("an array that is not of C-ordered uint8")
        self.array = np.frombuffer(buffer, np.uint8).reshape(shape)


class _PickledDtype:
    """Stands for numpy.dtype while unpickling; only remembers its name."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a protocol 2 pickle: _codecs.encode(text, 'latin1')."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle._Unpickler):
    """Builds arrays, lists, dicts, bytes, strings and numbers: nothing in a file can call anything else.

    Even numpy's own constructors are replaced, since a hostile dtype state can corrupt memory. It is the unpickler
    written in Python, since a few bytes make the one in C allocate a memo of gigabytes; and functions are handed out
    as new lambdas, since a pickle can set attributes of what it gets.
    """

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return lambda *_: _PickledArray()
            case "numpy", "ndarray":
                return _PickledArray
            case "numpy", "dtype":
                return _PickledDtype
            case "_codecs", "encode":
                return lambda text, encoding: _latin1(text, encoding)
        raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r:.80}, which CIFAR-10 does not need")


def _read_pickle(data: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = batch["data"].array, np.array(batch["labels"], dtype=np.int64)
    except Exception as error:  # a hostile or cut pickle can raise anything
        raise UserError(f"{path}: not a batch of CIFAR-10 ({error}): delete it to download it again") from error
    if pixels.shape != (IMAGES_PER_BATCH, 3072) or labels.shape != (IMAGES_PER_BATCH,):
        count = len(pixels) if pixels.ndim else 0
        raise UserError(f"{path}: holds {count} images and {labels.size} labels, not {IMAGES_PER_BATCH} of each")
    return pixels, labels


def _load_digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, enlarged fourfold; a fixed, stratified 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    grey = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.broadcast_to(grey.repeat(4, 1).repeat(4, 2)[..., None], (len(grey), 32, 32, 3))
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int32), test_size=0.2, random_state=0, stratify=labels
    )
    return Dataset(
        train_images, train_labels, test_images, test_labels, CLASS_NAMES["digits"], "scikit-learn's load_digits"
    )


def _cache_dir() -> Path:
    if folder := os.environ.get("CIFAR_JAX_CACHE"):
        return Path(folder)
    import pooch  # here: where the data is at hand and the cache named, it need not be installed

    return Path(pooch.os_cache("cifar_jax"))


def _download(folder: Path) -> Path:
    """Downloads the official archive and checks it; an interrupted download leaves no file under the final name."""
    import pooch
    import requests

    hint = f"download {ARCHIVE_URL} elsewhere and name its folder with --data-dir, or use --dataset digits"
    fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
    try:
        path = pooch.retrieve(
            ARCHIVE_URL, f"sha256:{ARCHIVE_SHA256}", fname="cifar-10-python.tar.gz", path=folder, downloader=fetch
        )
    except requests.exceptions.RequestException as error:
        raise UserError(f"CIFAR-10 is not on this machine and the download failed ({_cause(error)}): {hint}") from error
    except (OSError, ValueError) as error:  # a full disk, a folder that can't be written, a wrong checksum
        raise UserError(f"can't download CIFAR-10 to {folder} ({error}): {hint}") from error
    return Path(path)


def _cause(error: BaseException) -> str:
    """The innermost reason; requests wraps it in three layers whose text runs over lines."""
    while (inner := getattr(error, "reason", None) or next(iter(error.args), None)) and isinstance(inner, Exception):
        error = inner
    return str(error).rpartition(": ")[2] or type(error).__name__


def _cached(read: Callable[[Path], Arrays], path: Path) -> Arrays:
    """Decodes `path` once; next time the arrays are memory-mapped. The key changes when a file does."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    stamp = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    entry = _cache_dir() / f"cifar10-{hashlib.sha256(chr(10).join(stamp).encode()).hexdigest()[:16]}"
    if (arrays := _open_arrays(entry)) is not None:
        return arrays
    arrays = read(path)
    try:
        _save_arrays(entry, arrays)
    except OSError as error:
        print(f"can't cache the decoded data in {entry} ({error}): the next start decodes again", file=sys.stderr)
    return arrays


def _open_arrays(entry: Path) -> Arrays | None:
    """None if they are not there, or damaged."""
    try:
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAY_NAMES}
    except (OSError, ValueError, EOFError):
        return None
    for name, array in arrays.items():
        n = IMAGES_PER_BATCH * (5 if name.startswith("train") else 1)
        if array.shape != ((n, 32, 32, 3) if name.endswith("images") else (n,)):
            return None
    return arrays


def _save_arrays(entry: Path, arrays: Arrays) -> None:
    """Written aside and renamed, so that a reader never sees half an entry."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = entry.with_name(f"partial-{uuid.uuid4()}")  # not mkdtemp: others who share the cache may read it
    partial.mkdir()
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        shutil.rmtree(entry, ignore_errors=True)
        try:
            partial.rename(entry)
        except OSError:
            if _open_arrays(entry) is None:  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
