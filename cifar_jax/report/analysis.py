"""Numbers of a report: confidence interval, precision and recall, calibration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from sklearn import metrics

CALIBRATION_BINS = 15  # as in Guo et al. 2017, arXiv:1706.04599


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Logits, float64 [N, classes], and labels, int [N], of a set of images."""

    logits: np.ndarray
    labels: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """Class probabilities, float64 [N, classes]."""
        return scipy.special.softmax(self.logits, axis=1)

    @property
    def classes(self) -> np.ndarray:
        """The most probable class, int [N]."""
        return self.logits.argmax(1)

    @property
    def confidence(self) -> np.ndarray:
        """The most probable class's probability, float64 [N]."""
        return self.probabilities.max(1)

    @property
    def correct(self) -> np.ndarray:
        """Whether the most probable class is the label, bool [N]."""
        return self.classes == self.labels

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return float(self.correct.mean())


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a share by Wilson's formula (1927)."""
    z = 1.959964  # the normal distribution has 95 % within ±z
    share, spread = correct / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return centre - half, centre + half


def per_class(predictions: Predictions) -> list[dict[str, float]]:
    """Returns each class's precision, recall, F1 score (0 where undefined) and number of images."""
    classes = range(predictions.logits.shape[1])
    values = metrics.precision_recall_fscore_support(
        predictions.labels, predictions.classes, labels=list(classes), zero_division=0
    )
    names = ("precision", "recall", "f1", "images")
    return [{name: value[number].item() for name, value in zip(names, values)} for number in classes]


def confusion(predictions: Predictions) -> np.ndarray:
    """Returns the numbers of images by label (row) and predicted class (column), int [classes, classes]."""
    classes = list(range(predictions.logits.shape[1]))
    return metrics.confusion_matrix(predictions.labels, predictions.classes, labels=classes)


def reliability(predictions: Predictions) -> list[tuple[float, float, int]]:
    """Returns (mean confidence, accuracy, images) of each of CALIBRATION_BINS equal parts of (0, 1] that has images."""
    parts = np.clip(np.ceil(predictions.confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    inside = [parts == part for part in range(CALIBRATION_BINS)]
    mean = lambda values: float(values.mean())
    return [
        (mean(predictions.confidence[part]), mean(predictions.correct[part]), int(part.sum()))
        for part in inside
        if part.any()
    ]


def calibration_error(predictions: Predictions) -> float:
    """Returns the expected calibration error: the mean distance of confidence and accuracy over `reliability`'s parts,
    weighted by images (arXiv:1706.04599, eq. 3)."""
    parts = reliability(predictions)
    return sum(abs(confidence - accuracy) * count for confidence, accuracy, count in parts) / len(predictions.labels)


def cross_entropy(predictions: Predictions) -> float:
    """Returns the mean cross-entropy in nats."""
    log_probabilities = scipy.special.log_softmax(predictions.logits, axis=1)
    return float(-log_probabilities[np.arange(len(predictions.labels)), predictions.labels].mean())


def fit_temperature(predictions: Predictions) -> float:
    """Returns the temperature with the lowest cross-entropy of logits / temperature (arXiv:1706.04599)."""
    loss = lambda log_temperature: cross_entropy(with_temperature(predictions, math.exp(log_temperature)))
    result: Any = scipy.optimize.minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded")
    return math.exp(result.x)


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Returns the predictions of logits / temperature."""
    return dataclasses.replace(predictions, logits=predictions.logits / temperature)
