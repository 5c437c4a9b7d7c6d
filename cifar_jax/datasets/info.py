"""Base types of datasets: DatasetInfo, known without reading files, and Dataset, with the arrays."""

from __future__ import annotations

import abc
import dataclasses
import os

import numpy as np

Arrays = dict[str, np.ndarray]  # train_images, train_labels, test_images, test_labels, as in Dataset
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo(abc.ABC):
    """An entry of the registry.

    `mean` and `std` are per channel, over the training set's pixels in [0, 1]. 'standardized' scaling subtracts the
    mean and divides by the standard deviation.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abc.abstractmethod
    def load(self, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
        """Reads the dataset. Raises: UserError for errors that the user can fix."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, 32, 32, 3] and labels int32 [N] for training and test. `source` tells their origin."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    info: DatasetInfo
    source: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.info.class_names
