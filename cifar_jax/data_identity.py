"""What tells the data of runs and of processes apart: checksums, in dataset.json of a run's folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.datasets import Dataset
from cifar_jax.errors import UserError
from cifar_jax.io import read_json, write_json


def read_identity(workdir: Path) -> dict[str, Any] | None:
    """Reads dataset.json; {} if it is damaged or foreign; None if it does not exist."""
    try:
        content = read_json(workdir / "dataset.json")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if {"source", "train_labels_sha256"} <= set(content) else {}


def _checksum(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def identify(dataset: Dataset) -> dict[str, Any]:
    """Returns what tells datasets apart: numbers of images, and checksums of labels and images in their order."""
    images = {"training images": dataset.train_images, "test images": dataset.test_images}
    arrays = images | {"training labels": dataset.train_labels, "test labels": dataset.test_labels}
    sizes = {f"number of {name}": len(array) for name, array in images.items()}
    return sizes | {f"{name}' SHA-256": _checksum(array) for name, array in arrays.items()}


def _identity(dataset: Dataset) -> dict[str, Any]:
    arrays = {"labels": dataset.train_labels, "images": dataset.train_images}
    return {"source": dataset.source} | {f"train_{name}_sha256": _checksum(array) for name, array in arrays.items()}


def check_same_data(workdir: Path, dataset: Dataset, resumes: bool, teacher: str | None = None) -> None:
    """Checks that a resumed run sees the same training data and teacher, and records their identity in dataset.json.

    Args: teacher: its SHA-256, see `teacher.identify_teacher`. Raises: UserError, see refuse_other_data.
    """
    identity = _identity(dataset)
    if resumes:
        _refuse_another(workdir, identity)
        if (read_identity(workdir) or {}).get("teacher_sha256", teacher) != teacher:
            raise UserError(
                f"{workdir}: --teacher has changed since this run began: restore it, or use another --workdir"
            )
    write_json(workdir / "dataset.json", identity | ({"teacher_sha256": teacher} if teacher else {}))


def refuse_other_data(workdir: Path, dataset: Dataset) -> None:
    """Raises: UserError if the run began with other training images or labels, or another order of them.

    Batches, flips and held-out images depend on the order of the images, and copies of CIFAR-10 differ in it.
    """
    _refuse_another(workdir, _identity(dataset))


def _refuse_another(workdir: Path, identity: dict[str, Any]) -> None:
    saved = read_identity(workdir) or {}
    for name in ("labels", "images"):
        found = identity[f"train_{name}_sha256"]
        if saved.get(f"train_{name}_sha256", found) != found:  # earlier versions have no checksum of the images
            raise UserError(
                f"{workdir}: this run began with {saved['source']}, and {identity['source']} has other {name} or "
                "another order: name the former with --data-dir, or name another --workdir"
            )
