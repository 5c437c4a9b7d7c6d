"""A report's figures as PNG files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cifar_jax.plots import drawn, png
from cifar_jax.report.analysis import Predictions, reliability


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Draws the confusion matrix as shares of each label. Args: counts: int [classes, classes]."""
    size = 4.5 + 0.12 * len(names)
    with drawn((size + 0.8, size)) as (figure, axes):
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(picture, label="share of the label's images")
        axes.set(xlabel="predicted class", ylabel="label", xticks=range(len(names)), yticks=range(len(names)))
        small = {"fontsize": 8 if len(names) <= 20 else 4}
        axes.set_xticklabels(names, rotation=90, **small)
        axes.set_yticklabels(names, **small)
        if len(names) <= 20:
            for row, column in np.argwhere(counts):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=7)
        return png(figure)


def draw_reliability(curves: dict[str, Predictions]) -> bytes:
    """Draws accuracy by confidence, one curve for each set of predictions."""
    with drawn((5.2, 4.4)) as (figure, axes):
        axes.plot([0, 1], [0, 1], "--", color="gray", label="calibrated")
        for name, predictions in curves.items():
            confidence, accuracy, _ = zip(*reliability(predictions))
            axes.plot(confidence, accuracy, "o-", label=name)
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
        return png(figure)


def draw_images(images: np.ndarray, titles: Sequence[str], columns: int = 6) -> bytes:
    """Draws images with a title each. Args: images: uint8 or float from 0 to 1, [N, H, W, 3]."""
    rows = max(1, -(-len(images) // columns))
    with drawn((1.25 * columns, 1.55 * rows), rows, columns) as (figure, axes):
        for place in axes.flat:
            place.axis("off")
        for place, image, title in zip(axes.flat, images, titles):
            place.imshow(image, interpolation="nearest")
            place.set_title(title, fontsize=7)
        return png(figure)


def draw_filters(kernel: np.ndarray) -> bytes:
    """Draws first-layer filters, each scaled to its own range. Args: kernel: float [h, w, 3, filters]."""
    filters = kernel.transpose(3, 0, 1, 2)
    low, high = filters.min((1, 2, 3), keepdims=True), filters.max((1, 2, 3), keepdims=True)
    scaled = (filters - low) / np.maximum(high - low, 1e-12)
    columns = 16
    rows = -(-len(scaled) // columns)
    with drawn((0.45 * columns, 0.45 * rows), rows, columns) as (figure, axes):
        for place in axes.flat:
            place.axis("off")
        for place, image in zip(axes.flat, scaled):
            place.imshow(image, interpolation="nearest")
        return png(figure)


def draw_corruptions(accuracies: dict[str, Sequence[float]], clean: float) -> bytes:
    """Draws accuracy by severity, from 1, for each disturbance. Severity 0 is `clean`, the undisturbed accuracy."""
    with drawn((5.2, 4.0)) as (figure, axes):
        for name, values in accuracies.items():
            axes.plot(range(len(values) + 1), [clean, *values], "o-", label=name)
        axes.set(xlabel="severity", ylabel="accuracy", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
        return png(figure)
