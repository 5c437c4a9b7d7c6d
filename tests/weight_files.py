"""Random weights for tests of weight files."""

import numpy as np

from cifar_jax.models import MODELS
from cifar_jax.weights.files import Weights
from cifar_jax.weights.params import expected_shapes


def random_weights(model, num_classes=10, **fields):
    """Returns weights with nonzero biases."""
    rng = np.random.default_rng(1)
    tensor = lambda shape: rng.normal(0, 0.1, shape).astype(np.float32)
    shapes = expected_shapes(model, num_classes)
    params = {name: {"kernel": tensor(kernel), "bias": tensor(bias)} for name, kernel, bias in shapes}
    return Weights(model, params, MODELS[model].INPUT_SCALING, **fields)
