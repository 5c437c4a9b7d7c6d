"""scikit-learn's handwritten digits: a small dataset that needs no download, for quick trials."""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from cifar_jax.datasets.info import Dataset, DatasetInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Digits(DatasetInfo):
    def load(self, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
        """Loads 1,797 digits of 8×8 pixels, enlarged to 32×32, in a fixed, stratified 80/20 split. Ignores data_dir."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        grey = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        images = np.broadcast_to(grey.repeat(4, 1).repeat(4, 2)[..., None], (len(grey), 32, 32, 3))
        train_images, test_images, train_labels, test_labels = train_test_split(
            images, labels.astype(np.int32), test_size=0.2, random_state=0, stratify=labels
        )
        return Dataset(train_images, train_labels, test_images, test_labels, self, "scikit-learn's load_digits")


DIGITS = _Digits(
    name="digits",
    title="the digits",
    class_names=tuple("0123456789"),
    mean=(0.4914, 0.4822, 0.4465),  # CIFAR-10's and not the digits' own: recipes scale both alike
    std=(0.2470, 0.2435, 0.2616),
)
