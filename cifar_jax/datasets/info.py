"""What every dataset has: facts that are known without its files, and arrays once they are read."""

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

    `mean` and `std` are of the training set's pixels by channel, in [0, 1]: what 'standardized' scaling subtracts, and
    then divides by.
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
        """Reads the dataset. Raises: UserError for what the user can mend."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images uint8 [N, 32, 32, 3], labels int32 [N], for train and test; `source` says where they came from."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    info: DatasetInfo
    source: str

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.info.class_names

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.info.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.info.std
