"""Helpers for tests of training."""

import dataclasses
import itertools

import jax
import numpy as np

from cifar_jax.checkpoint import Checkpoints
from cifar_jax.metrics import read_metrics
from cifar_jax.parallel import replicate, select_devices
from cifar_jax.runs import Path
from cifar_jax.train_step import create_train_state
from cifar_jax.trainer import Trainer


def train_epoch(config, dataset, state=None):
    """Trains one epoch from a new state or from `state`, whose buffers are donated. Returns: (state, history)."""
    trainer = Trainer(config, dataset.train_images, dataset.train_labels, select_devices(config))
    if state is not None:
        trainer.state = replicate(state, trainer.devices)
    assert trainer.run_epoch(0, 0) == trainer.steps_per_epoch
    return trainer.state, trainer.history


def first_images(dataset, count):
    """Returns the dataset with only its first `count` training images."""
    images, labels = dataset.train_images[:count], dataset.train_labels[:count]
    return dataclasses.replace(dataset, train_images=images, train_labels=labels)


def assert_trees_close(actual, expected, share):
    """Asserts that each leaf's error is at most `share` of the leaf's largest value."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=share * max(float(np.abs(b).max()), 1e-30))


def stop_at(number):
    """Returns a `stop` that returns True from its `number`-th call on."""
    asked = itertools.count(1)
    return lambda: next(asked) >= number


def latest_state(config):
    """Returns the arrays of a run's latest checkpoint."""
    state = replicate(create_train_state(config, 6), jax.local_devices()[:1])
    state, _ = Checkpoints(Path(config.workdir)).restore_state("latest", state)
    parts = (state.step, state.params, state.opt_state, state.ema_params, state.folded_params)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(parts)]


def untimed_rows(config):
    """Returns a run's rows without the times."""
    rows = read_metrics(Path(config.workdir))
    return [dataclasses.replace(row, seconds=0, images_per_second=0) for row in rows]
