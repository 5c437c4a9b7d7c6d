"""Random weights for tests of weight files, and reading of Keras' files without another process."""

import h5py
import numpy as np

from cifar_jax.models import MODELS
from cifar_jax.weights import hdf5_worker, keras_files
from cifar_jax.weights.files import Weights
from cifar_jax.weights.params import expected_shapes


def random_weights(model, num_classes=10, **fields):
    """Returns weights with nonzero biases."""
    rng = np.random.default_rng(1)
    tensor = lambda shape: rng.normal(0, 0.1, shape).astype(np.float32)
    shapes = expected_shapes(model, num_classes)
    params = {name: {"kernel": tensor(kernel), "bias": tensor(bias)} for name, kernel, bias in shapes}
    return Weights(model, params, MODELS[model].INPUT_SCALING, **fields)


def read_here(patch):
    """Makes Keras' files be read in this process, since another takes a quarter of a second to start.

    test_weights_hostile.py tests the other process, its limits and its end.
    """
    answer = lambda path: b"".join(hdf5_worker.answer(str(path.absolute()), h5py, np))
    patch.setattr(keras_files, "run_worker", answer)
