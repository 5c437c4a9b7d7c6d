"""LeNet-5 variant."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import ops
from cifar_jax.models.initializers import KERNELS, Initializer, choose_kernel, pytorch_bias


class LeNet5(nn.Module):
    """LeNet-5 variant of the PyTorch notebook, 395,006 parameters. It varies LeNet-5 (LeCun et al., 1998).

    Attributes:
      dropout_rates: after the first and the second convolution's ReLU, before the pools.
      initializer: 'original', or a name of initializers.KERNELS (with zero biases).
      dtype: computation type, float32 or bfloat16.
    """

    LAYERS: ClassVar[tuple[str, ...]] = ("Conv_0", "Conv_1", "Dense_0", "Dense_1", "Dense_2")
    INPUT_SCALING: ClassVar[str] = "symmetric"
    RESIZABLE: ClassVar[bool] = False  # the first dense layer needs the feature maps of 32×32 pixels
    CPU_STEPS_PER_CALL: ClassVar[int] = 16  # hides the dispatch time; the CPU kernels don't slow down in a loop

    num_classes: int = 10
    dropout_rates: tuple[float, ...] = (0.2, 0.2)
    initializer: str = "original"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Float [N, 32, 32, 3] → logits float32 [N, num_classes]. The original's pixels are in [-1, 1]."""
        # PyTorch's default kernel, kaiming_uniform_(a=sqrt(5)), is U(±1/sqrt(fan_in)): a variance of 1/(3·fan_in).
        pytorch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        # The notebook's xavier_normal_ for fc1. JAX's glorot_normal differs: it truncates at two deviations.
        xavier_normal = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")

        def bias_init(fan_in: int) -> Initializer:
            return nn.initializers.zeros if self.initializer in KERNELS else pytorch_bias(fan_in)

        def conv(x: jax.Array, features: int) -> jax.Array:
            kernel = choose_kernel(self.initializer, pytorch_kernel)
            return ops.Conv(features, 5, "VALID", kernel, bias_init(5 * 5 * x.shape[-1]), self.dtype)(x)

        def dense(x: jax.Array, features: int, original: Initializer = pytorch_kernel) -> jax.Array:
            kernel = choose_kernel(self.initializer, original)
            return ops.Dense(features, kernel, bias_init(x.shape[-1]), self.dtype)(x)

        first, second = (partial(ops.Dropout(rate), train=train) for rate in self.dropout_rates)
        x = images.astype(self.dtype)
        x = ops.max_pool(first(nn.relu(conv(x, 32))), window=2, stride=2)
        x = ops.max_pool(second(nn.relu(conv(x, 64))), window=2, stride=2)
        # NHWC; PyTorch flattens NCHW, which matters when weights are converted. -1 would not do for 0 images.
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        x = nn.relu(dense(x, 200, xavier_normal))
        x = nn.relu(dense(x, 100))
        return dense(x, self.num_classes).astype(np.promote_types(self.dtype, np.float32))
