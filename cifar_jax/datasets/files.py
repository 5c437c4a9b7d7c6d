"""Where a dataset of files is looked for, in which layouts, and what becomes of it: arrays, checked and cached."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cifar_jax.datasets import imagefolder, npz, official, parquet, tfds
from cifar_jax.datasets.cache import cached
from cifar_jax.datasets.cifar import IMAGE_SHAPE, Cifar
from cifar_jax.datasets.download import download
from cifar_jax.datasets.info import SPLITS, Arrays, Dataset
from cifar_jax.datasets.layout import Layout
from cifar_jax.datasets.partial import PREFIX
from cifar_jax.errors import UserError
from cifar_jax.io import user_path

LAYOUTS = (tfds.LAYOUT, official.LAYOUT, npz.LAYOUT, parquet.LAYOUT, imagefolder.LAYOUT)


def load_files(info: Cifar, data_dir: str | os.PathLike[str] | None) -> Dataset:
    """Finds, downloads if need be, decodes and checks a dataset. Raises: UserError, naming the file."""
    layout, path = _locate(info, None if data_dir is None else user_path(data_dir, "--data-dir"))
    cache, files = _cache_folder(), layout.files(info, path)

    def decode() -> Arrays:
        print(f"decoding {path}", file=sys.stderr)
        return _checked(info, layout.read(info, path), path)

    arrays = cached(info, cache, files, decode)
    return Dataset(**arrays, info=info, source=str(path))


def _locate(info: Cifar, named: Path | None) -> tuple[Layout, Path]:
    """The first layout found. A folder that the user named is the only one that is looked at."""
    if named is not None:
        if (found := _find(info, named, named=True)) is not None:
            return found
        if not _is_empty(named):
            wanted = ", ".join(layout.wanted(info) for layout in LAYOUTS)
            raise UserError(
                f"--data-dir {named} holds no {info.title}, neither of {wanted}: name its folder, or an empty one to "
                "download it there"
            )
        return official.LAYOUT, download(info, named)
    for place in _places():
        if (found := _find(info, place, named=False)) is not None:
            return found
    folder = _cache_folder()
    if folder is None:
        raise UserError(f"no {info.title} and no home folder on this machine: name a folder with --data-dir")
    return official.LAYOUT, download(info, folder)


def _find(info: Cifar, place: Path, named: bool) -> tuple[Layout, Path] | None:
    for layout in LAYOUTS:
        if (path := layout.find(info, place, named)) is not None:
            return layout, path
    return None


def _is_empty(folder: Path) -> bool:
    """Nothing but hidden files and what a killed download left. Raises: UserError if `folder` can't be read."""
    try:
        return all(name.startswith((".", PREFIX)) for name in os.listdir(folder))
    except FileNotFoundError as error:
        raise UserError(
            f"--data-dir {folder} does not exist: name the folder of a dataset, or create it for a download"
        ) from error
    except NotADirectoryError as error:
        raise UserError(
            f"--data-dir {folder} is a file: name the folder that holds the dataset, or an official archive"
        ) from error
    except OSError as error:
        raise UserError(f"--data-dir {folder}: {error.strerror}") from error


def _places() -> Iterator[Path]:
    """Where a dataset is looked for if the user named no folder."""
    home = _home()
    if named := os.environ.get("TFDS_DATA_DIR"):
        folder = user_path(named, "TFDS_DATA_DIR")
        try:
            folder.stat()
        except OSError as error:
            raise UserError(
                f"TFDS_DATA_DIR {named}: {error.strerror}: correct or unset it, or use --data-dir"
            ) from error
        yield folder
    elif home is not None:
        yield home / "tensorflow_datasets"
    yield from (Path("."), Path("data"))  # where torchvision's examples put it
    if named := os.environ.get("KERAS_HOME"):
        yield user_path(named, "KERAS_HOME") / "datasets"
    elif home is not None:
        yield home / ".keras" / "datasets"
    if (cache := _cache_folder()) is not None:
        yield cache


def _home() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:  # HOME is not set, and the system does not know this user
        return None
    return home if home.is_absolute() else None


def _cache_folder() -> Path | None:
    """The user's cache folder, or CIFAR_JAX_CACHE; None without a home."""
    if folder := os.environ.get("CIFAR_JAX_CACHE"):
        return user_path(folder, "CIFAR_JAX_CACHE")
    import pooch  # here: where the data is at hand and the cache named, it need not be installed

    try:
        cache = Path(pooch.os_cache("cifar_jax"))
    except RuntimeError:
        return None
    return cache if cache.is_absolute() else None  # former versions leave ~ as it is


def _checked(info: Cifar, arrays: Arrays, path: Path) -> Arrays:
    """The arrays, labels as int32. Raises: UserError if a shape or the labels are not the dataset's."""
    for split in SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.shape != (info.size(split), *IMAGE_SHAPE):
            raise UserError(f"{path}: the {split} set has {len(images)} of {info.size(split)} images: {info.advice}")
        if labels.shape != (info.size(split),) or labels.min() < 0 or labels.max() >= info.num_classes:
            raise UserError(f"{path}: has a label outside 0…{info.num_classes - 1}: {info.advice}")
        if split == "train" and (labels.min() > 0 or labels.max() < info.num_classes - 1):  # coarse labels, for one
            raise UserError(
                f"{path}: its labels go from {labels.min()} to {labels.max()}, those of {info.title} from 0 to "
                f"{info.num_classes - 1}"
            )
        arrays[f"{split}_labels"] = labels.astype(np.int32)
    return arrays
