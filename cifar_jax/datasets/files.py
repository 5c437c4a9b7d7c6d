"""Finds a dataset's files in the known places and layouts, and returns checked, cached arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cifar_jax.console import say
from cifar_jax.datasets import imagefolder, npz, official, parquet, tfds
from cifar_jax.datasets.cache import cached
from cifar_jax.datasets.cifar import IMAGE_SHAPE, Cifar
from cifar_jax.datasets.download import download
from cifar_jax.datasets.info import SPLITS, Arrays, Dataset
from cifar_jax.datasets.layout import Layout
from cifar_jax.datasets.partial import is_partial
from cifar_jax.errors import UserError
from cifar_jax.io import user_path

LAYOUTS = (tfds.LAYOUT, official.LAYOUT, npz.LAYOUT, parquet.LAYOUT, imagefolder.LAYOUT)


def load_files(info: Cifar, data_dir: str | os.PathLike[str] | None) -> Dataset:
    """Finds, downloads if necessary, decodes and checks a dataset. Raises: UserError, naming the file."""
    layout, path = _locate(info, None if data_dir is None else user_path(data_dir, "--data-dir"))
    cache, files = cache_folder(), layout.files(info, path)

    def decode() -> Arrays:
        say(f"decoding {path}", error=True)
        return _checked(info, layout.read(info, path), path)

    arrays = cached(info, cache, files, decode)
    return Dataset(**arrays, info=info, source=str(path))


def _locate(info: Cifar, named: Path | None) -> tuple[Layout, Path]:
    """Returns the first layout found and its path. If the user named a folder, only that folder is searched."""
    if named is not None:
        if (found := _find(info, named, named=True)) is not None:
            return found
        if not _is_empty(named):
            wanted = ", ".join(filter(None, (layout.wanted(info) for layout in LAYOUTS)))
            raise UserError(
                f"--data-dir {named}: {info.title} not found (none of {wanted}): name its folder, or an empty folder "
                "to download it to"
            )
        return official.LAYOUT, download(info, named)
    for place in _places():
        if (found := _find(info, place, named=False)) is not None:
            return found
    folder = cache_folder()
    if folder is None:
        raise UserError(f"{info.title} not found, and no home folder to download it to: name a folder by --data-dir")
    return official.LAYOUT, download(info, folder)


def _find(info: Cifar, place: Path, named: bool) -> tuple[Layout, Path] | None:
    """Returns the first layout that the place has. Raises: the first UserError of a layout, if none has it."""
    refusals: list[UserError] = []
    for layout in LAYOUTS:
        try:
            if (path := layout.find(info, place, named)) is not None:
                for refusal in refusals:
                    say(f"note: skipped {refusal}", error=True)
                return layout, path
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return None


def _is_empty(folder: Path) -> bool:
    """Tells whether a folder has only hidden files and leftovers of a download. Raises: UserError if unreadable."""
    try:
        return all(name.startswith(".") or is_partial(name) for name in os.listdir(folder))
    except FileNotFoundError as error:
        raise UserError(
            f"--data-dir {folder} does not exist: name the dataset's folder, or create it to download the dataset there"
        ) from error
    except NotADirectoryError as error:
        raise UserError(
            f"--data-dir {folder} is a file of unknown type: name the dataset's folder, or an official archive"
        ) from error
    except OSError as error:
        raise UserError(f"--data-dir {folder}: {error.strerror}") from error


def _places() -> Iterator[Path]:
    """Yields the folders to search if the user named none."""
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
    yield from (Path("."), Path("data"))  # torchvision's examples use ./data
    if named := os.environ.get("KERAS_HOME"):
        yield user_path(named, "KERAS_HOME") / "datasets"
    elif home is not None:
        yield home / ".keras" / "datasets"
    if (cache := cache_folder()) is not None:
        yield cache


def _home() -> Path | None:
    try:
        home = Path.home()
    except RuntimeError:  # HOME is not set, and the system has no entry for this user
        return None
    return home if home.is_absolute() else None


def cache_folder() -> Path | None:
    """Returns CIFAR_JAX_CACHE or the user's cache folder; None without a home folder."""
    if folder := os.environ.get("CIFAR_JAX_CACHE"):
        return user_path(folder, "CIFAR_JAX_CACHE")
    import pooch  # imported here because it is not needed if the cache is named

    try:
        cache = Path(pooch.os_cache("cifar_jax"))
    except RuntimeError:
        return None
    return cache if cache.is_absolute() else None  # older versions of pooch leave ~ unexpanded


def _checked(info: Cifar, arrays: Arrays, path: Path) -> Arrays:
    """Returns the arrays with labels as int32. Raises: UserError if a shape or a label does not fit the dataset."""
    for split in SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.shape != (info.size(split), *IMAGE_SHAPE):
            raise UserError(f"{path}: the {split} set has {len(images)} images of {info.size(split)}: {info.advice}")
        if labels.shape != (info.size(split),) or labels.min() < 0 or labels.max() >= info.num_classes:
            raise UserError(f"{path}: has a label outside 0…{info.num_classes - 1}: {info.advice}")
        if split == "train" and (labels.min() > 0 or labels.max() < info.num_classes - 1):  # coarse labels, for one
            raise UserError(
                f"{path}: its labels go from {labels.min()} to {labels.max()}, but {info.title} needs 0 to "
                f"{info.num_classes - 1}: use a copy with these labels"
            )
        arrays[f"{split}_labels"] = labels.astype(np.int32)
    return arrays
