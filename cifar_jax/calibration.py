"""Fits the temperature of a run on the images that it held out (Guo et al. 2017, arXiv:1706.04599).

A network that was trained on all training images has none: only the test set would be left, and it chooses nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cifar_jax.console import say
from cifar_jax.data_identity import refuse_other_data
from cifar_jax.datasets import Dataset, hold_out, load_dataset
from cifar_jax.errors import UserError
from cifar_jax.report.analysis import Predictions, fit_temperature
from cifar_jax.sources import Source


def held_out_part(source: Source, dataset: Dataset) -> Dataset | None:
    """Returns the dataset with a run's held-out training images as its test set; None if the run held out none.

    Raises: UserError if the run began with other training data, or in another order.
    """
    if not source.config.holdout:
        return None
    part = hold_out(dataset, source.config.holdout)
    refuse_other_data(Path(source.origin["workdir"]), part)
    return part


def calibrate(source: Source, data_dir: str | None = None) -> Source:
    """Returns the source with the temperature of its run's held-out images, or as it is if there are none.

    If the data can't be loaded, a note on stderr says so. Args: data_dir: folder of the dataset; None: the run's.
    """
    config = source.config
    if not config.holdout:
        return source
    try:
        part = held_out_part(source, load_dataset(config.dataset, data_dir or config.data_dir))
    except UserError as error:
        say(f"note: no temperature is stored, because it needs the held-out images: {error}", error=True)
        return source
    assert part is not None
    logits = source.create_predictor()(part.test_images)
    return dataclasses.replace(source, temperature=fit_temperature(Predictions(logits, part.test_labels)))
