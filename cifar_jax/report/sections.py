"""A report's sections: each returns its HTML, and adds its figures and its numbers to the Contents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cifar_jax.report import analysis, corruptions, figures, page
from cifar_jax.report.analysis import Predictions

GRID = 18  # images of a grid

Logits = Callable[[np.ndarray], np.ndarray]  # uint8 [N, 32, 32, 3] → float64 [N, classes]


@dataclasses.dataclass(frozen=True)
class Contents:
    """A report so far: numbers, JSON values; figures, PNG files by name."""

    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def draw(self, name: str, png: bytes, description: str) -> str:
        """Adds a figure. Returns: its HTML."""
        self.figures[f"{name}.png"] = png
        return page.figure(png, description)


def overview(contents: Contents, tested: Predictions) -> str:
    """Accuracy with its confidence interval, loss and calibration error."""
    count = len(tested.labels)
    low, high = analysis.wilson_interval(int(tested.correct.sum()), count)
    loss, error = analysis.cross_entropy(tested), analysis.calibration_error(tested)
    contents.numbers.update(num_examples=count, test_accuracy=tested.accuracy, interval_95=[low, high])
    contents.numbers.update(test_loss=loss, calibration_error=error)
    numbers = {"accuracy": f"{tested.accuracy:.2%}", "95 % interval": f"{low:.2%} – {high:.2%}", "images": f"{count:,}"}
    return page.headline(numbers | {"loss": f"{loss:.4f}", "calibration error": f"{error:.2%}"})


def classes(contents: Contents, tested: Predictions, names: Sequence[str]) -> str:
    """Precision and recall of each class, and the confusion matrix."""
    values = analysis.per_class(tested)
    contents.numbers["classes"] = dict(zip(names, values))
    shares = ("precision", "recall", "f1")
    rows = [
        [name, *(f"{row[share]:.1%}" for share in shares), f"{row['images']:,}"] for name, row in zip(names, values)
    ]
    png = figures.draw_confusion(analysis.confusion(tested), names)
    matrix = contents.draw("confusion", png, "Confusion matrix: images by label and predicted class.")
    return page.section("Classes", page.table(["class", "precision", "recall", "F1", "images"], rows), matrix)


def calibration(
    contents: Contents, tested: Predictions, held_out: Predictions | None, temperature: float | None
) -> str:
    """Accuracy by confidence, also with a temperature: fitted on held-out training images, or else the stored one."""
    curves = {"as trained": tested}
    note = "No temperature is fitted: this network saw all training images. A run with --holdout gets one."
    origin = "It is stored with the weights."
    if held_out is not None:
        temperature = analysis.fit_temperature(held_out)
        origin = f"It is fitted on {len(held_out.labels):,} held-out training images."
    if temperature is not None:
        curves[f"temperature {temperature:.2f}"] = scaled = analysis.with_temperature(tested, temperature)
        error, loss = analysis.calibration_error(scaled), analysis.cross_entropy(scaled)
        contents.numbers["temperature"] = {"value": temperature, "calibration_error": error, "test_loss": loss}
        note = f"Divided by a temperature of {temperature:.3f}, the logits have a calibration error of {error:.2%} and "
        note += f"a loss of {loss:.4f}. {origin}"
    text = f"Accuracy by confidence, in {analysis.CALIBRATION_BINS} parts of equal width."
    picture = contents.draw("reliability", figures.draw_reliability(curves), text)
    return page.section("Calibration", page.paragraph(note), picture)


def pictures(contents: Contents, tested: Predictions, images: np.ndarray, names: Sequence[str]) -> str:
    """The most confident mistakes and the least confident hits."""
    order, parts = np.argsort(-tested.confidence, kind="stable"), []
    predicted, labels, confidence = tested.classes.tolist(), tested.labels.tolist(), tested.confidence
    told = lambda i: f"{names[predicted[i]]} {confidence[i]:.0%}\nlabel: {names[labels[i]]}"
    for name, title, chosen in (
        ("mistakes", "Most confident mistakes", order[~tested.correct[order]][:GRID]),
        ("doubts", "Least confident hits", order[tested.correct[order]][::-1][:GRID]),
    ):
        if len(chosen):
            png = figures.draw_images(images[chosen], [told(i) for i in chosen])
            parts.append(page.section(title, contents.draw(name, png, f"{title}: prediction, confidence and label.")))
    return "".join(parts)


def importance(
    contents: Contents, tested: Predictions, images: np.ndarray, names: Sequence[str],
    measure: Callable[[np.ndarray], np.ndarray],
) -> str:  # fmt: skip
    """Which pixels matter, for the first image of each of ten classes. Args: measure: images → float [N, 32, 32]."""
    shown = np.unique(tested.labels, return_index=True)[1][:10]
    heat = measure(images[shown])
    heat = heat / np.maximum(heat.max((1, 2), keepdims=True), 1e-12)
    grid = np.concatenate([images[shown] / 255, np.repeat(heat[..., None], 3, -1)])
    titles = [names[number] for number in tested.classes[shown].tolist()] + [""] * len(shown)
    text = "Images of ten classes with their predicted class, and below each how much each pixel matters (SmoothGrad)."
    picture = contents.draw("importance", figures.draw_images(grid, titles, columns=len(shown)), text)
    return page.section("Which pixels matter", picture)


def first_layer(contents: Contents, kernel: np.ndarray) -> str:
    """The first layer's filters. Args: kernel: float [h, w, 3, filters]."""
    text = f"The {kernel.shape[-1]} filters of the first layer, each in its own range of values."
    return page.section("First layer", contents.draw("filters", figures.draw_filters(kernel), text))


def disturbances(contents: Contents, tested: Predictions, images: np.ndarray, logits: Logits) -> str:
    """Accuracies on disturbed images. Args: tested: predictions of the same images, undisturbed."""
    accuracy = lambda name, severity: (
        Predictions(logits(corruptions.disturbed(name, images, severity)), tested.labels).accuracy
    )
    accuracies: dict[str, Sequence[float]] = {
        name: [accuracy(name, severity) for severity in corruptions.SEVERITIES] for name in corruptions.DISTURBANCES
    }
    contents.numbers["disturbed"] = {"num_examples": len(images), "undisturbed": tested.accuracy, **accuracies}
    rows = [[name, *(f"{value:.1%}" for value in values)] for name, values in accuracies.items()]
    text = f"The first {len(images):,} test images. Undisturbed, their accuracy is {tested.accuracy:.1%}."
    png = figures.draw_corruptions(accuracies, tested.accuracy)
    picture = contents.draw("disturbed", png, "Accuracy by severity of five disturbances.")
    columns = ["severity", *map(str, corruptions.SEVERITIES)]
    return page.section("Disturbed images", page.paragraph(text), page.table(columns, rows), picture)


def other_sets(contents: Contents, sets: Iterable[tuple[str, np.ndarray, np.ndarray]], logits: Logits) -> str:
    """Accuracies on other sets of images. Args: sets: (name, images, labels) each."""
    accuracies = {name: (Predictions(logits(images), labels).accuracy, len(labels)) for name, images, labels in sets}
    contents.numbers["sets"] = {
        name: {"test_accuracy": accuracy, "num_examples": count} for name, (accuracy, count) in accuracies.items()
    }
    rows = [[name, f"{accuracy:.2%}", f"{count:,}"] for name, (accuracy, count) in accuracies.items()]
    return page.section("Other sets of images", page.table(["set", "accuracy", "images"], rows))
