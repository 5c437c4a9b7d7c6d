"""What several tests of training share."""

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
    """One epoch from a fresh state, or from one whose buffers are donated: (state, history)."""
    trainer = Trainer(config, dataset.train_images, dataset.train_labels, select_devices(config))
    if state is not None:
        trainer.state = replicate(state, trainer.devices)
    assert trainer.run_epoch(0, 0) == trainer.steps_per_epoch
    return trainer.state, trainer.history


def first_images(dataset, count):
    """The dataset with its first `count` training images alone."""
    images, labels = dataset.train_images[:count], dataset.train_labels[:count]
    return dataclasses.replace(dataset, train_images=images, train_labels=labels)


def assert_trees_close(actual, expected, share):
    """Each leaf within `share` of its own largest value."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=share * max(float(np.abs(b).max()), 1e-30))


def stop_at(number):
    """A `stop` that says so from the `number`-th time on that it is asked."""
    asked = itertools.count(1)
    return lambda: next(asked) >= number


def latest_state(config):
    """The arrays of a run's latest checkpoint."""
    state = replicate(create_train_state(config, 6), jax.local_devices()[:1])
    state, _ = Checkpoints(Path(config.workdir)).restore_state("latest", state)
    parts = (state.step, state.params, state.opt_state, state.ema_params, state.folded_params)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(parts)]


def untimed_rows(config):
    """A run's rows, without what the clock says."""
    rows = read_metrics(Path(config.workdir))
    return [dataclasses.replace(row, seconds=0, images_per_second=0) for row in rows]
