"""Disturbed test images: five disturbances made here, in five severities, and sets of images in .npy files.

The severities follow the idea of CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv:1903.12261), not its numbers, so its
accuracies are comparable only when its own files are used.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import scipy.ndimage

from cifar_jax.datasets.cifar import IMAGE_SHAPE
from cifar_jax.errors import UserError

SEVERITIES = (1, 2, 3, 4, 5)
Disturb = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Adds Gaussian noise with a deviation of 4 %, 8 %, … of the range."""
    return images + rng.normal(0, 0.04 * severity * 255, images.shape)


def blur(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Blurs by a Gaussian with a deviation of 0.4, 0.8, … pixels."""
    return scipy.ndimage.gaussian_filter(images.astype(np.float64), (0, 0.4 * severity, 0.4 * severity, 0))


def contrast(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Moves pixels towards the image's mean: 0.75, 0.55, 0.4, 0.25, 0.15 of the contrast stay."""
    mean = images.mean((1, 2, 3), keepdims=True)
    return mean + (0.75, 0.55, 0.4, 0.25, 0.15)[severity - 1] * (images - mean)


def jpeg(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Compresses as JPEG of quality 80, 65, 50, 30, 15."""

    def compressed(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        PIL.Image.fromarray(image).save(file, "JPEG", quality=(80, 65, 50, 30, 15)[severity - 1])
        return np.asarray(PIL.Image.open(file))

    return np.stack([compressed(image) for image in images])


def shift(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Shifts by 2, 4, … pixels in one of eight directions, with edge fill."""
    steps = np.array([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]) * 2 * severity
    padded = np.pad(images, ((0, 0), (10, 10), (10, 10), (0, 0)), mode="edge")
    tops = 10 + steps[rng.integers(0, len(steps), len(images))]
    return np.stack([image[y : y + 32, x : x + 32] for image, (y, x) in zip(padded, tops)])


DISTURBANCES: dict[str, Disturb] = {"noise": noise, "blur": blur, "contrast": contrast, "JPEG": jpeg, "shift": shift}


def disturbed(name: str, images: np.ndarray, severity: int) -> np.ndarray:
    """Returns disturbed images, uint8 [N, 32, 32, 3]. The same arguments give the same images."""
    rng = np.random.default_rng([list(DISTURBANCES).index(name), severity])
    return np.clip(np.round(DISTURBANCES[name](images, severity, rng)), 0, 255).astype(np.uint8)


def find_sets(folder: Path) -> list[tuple[Path, Path]]:
    """Returns (images' file, labels' file) of each set in a folder of CIFAR-10.1 or CIFAR-10-C.

    CIFAR-10.1 has NAME_data.npy beside NAME_labels.npy. CIFAR-10-C has NAME.npy and one labels.npy.
    Raises: UserError if there is no such file, labels are missing, or arrays don't fit each other or aren't CIFAR-10's.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.glob("*.npy") if path.stem != "labels" and not path.stem.endswith("_labels"))
    if not paths:
        raise UserError(f"{folder}: has no .npy files of images: name a folder of CIFAR-10.1 or CIFAR-10-C")
    own = lambda path: folder / f"{path.stem.removesuffix('_data')}_labels.npy"
    sets = [(path, own(path) if path.stem.endswith("_data") else folder / "labels.npy") for path in paths]
    for path, labels in sets:
        if not labels.is_file():
            raise UserError(f"{path}: its labels are missing: {labels.name}")
        _load_set(path, labels)
    return sets


def read_sets(sets: Iterable[tuple[Path, Path]]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields (name, images uint8 [N, 32, 32, 3], labels [N]). CIFAR-10-C's files have five equal parts, by severity.

    Args: sets: see find_sets. Raises: UserError if a file has changed since.
    """
    for path, labels_path in sets:
        name, own = path.stem.removesuffix("_data"), path.stem.endswith("_data")
        images, labels = _load_set(path, labels_path)
        if own or len(labels) % 5:
            yield name, images, labels
            continue
        for severity, part in zip(SEVERITIES, np.split(np.arange(len(labels)), 5)):
            yield f"{name}, severity {severity}", images[part], labels[part]


def _load_set(path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images, labels). The images stay in their file until they are used: those of CIFAR-10-C are 3 GB."""
    images, labels = _load(path), _load(labels_path)
    if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE or labels.shape != images.shape[:1]:
        raise UserError(f"{path}: must be uint8 [N, 32, 32, 3] with N labels in {labels_path.name}")
    if labels.dtype.kind not in "iu" or not np.isin(labels, range(10)).all():
        raise UserError(f"{labels_path}: must be whole numbers from 0 to 9, CIFAR-10's classes")
    return images, labels


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's parser can raise anything for a damaged header
        raise UserError(f"{path}: can't be read ({error})") from error
