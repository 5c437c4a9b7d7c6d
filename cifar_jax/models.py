"""The two networks, as Flax Linen modules.

Linen and not NNX: both are supported, and a pure `apply` fits one pmapped, donated step without split and merge.
Both take float images [N, 32, 32, 3] (scaled as their recipe says) and return float32 logits [N, num_classes].
`dtype` is the type of the computation; parameters are always float32. Layers are named Conv_0 … Dense_2, so that their
names sort in the order of the network, on which other modules rely.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax import ops

Initializer = Callable[..., jax.Array]


KERNELS: dict[str, Initializer] = {"he": nn.initializers.he_normal(), "lsuv": nn.initializers.orthogonal()}


class AllCNN(nn.Module):
    """All-CNN variant of the Keras program: 1,369,738 parameters. After All-CNN-C of arXiv:1412.6806.

    Attributes:
      dropout_rates: after the first convolution, after the first pool, after the second pool.
      final_relu: one more ReLU between the 10-channel convolution and the average pool, as in the architecture
        JSON published with the original's pretrained weights (same parameters, other logits).
      initializer: 'original'; 'he' or 'lsuv': he_normal or orthogonal kernels and zero biases (see unit_variance).
      dtype: of the computation, float32 or bfloat16.
    """

    num_classes: int = 10
    dropout_rates: tuple[float, ...] = (0.2, 0.5, 0.5)
    final_relu: bool = False
    initializer: str = "original"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """float [N, 32, 32, 3], in the original in [0, 1] → logits float32 [N, 10]; train turns dropout on."""

        def conv(x: jax.Array, features: int, size: int, padding: str) -> jax.Array:
            # Keras' defaults: glorot_uniform kernels and zero biases (Flax's own would be truncated lecun_normal).
            kernel_init = KERNELS.get(self.initializer, nn.initializers.glorot_uniform())
            return ops.Conv(features, size, padding, kernel_init, dtype=self.dtype)(x)

        first, second, third = (partial(ops.Dropout(rate), train=train) for rate in self.dropout_rates)
        x = images.astype(self.dtype)
        x = first(nn.relu(conv(x, 96, 3, "SAME")))
        x = nn.relu(conv(x, 96, 3, "SAME"))
        x = nn.relu(conv(x, 96, 3, "SAME"))
        x = second(ops.max_pool(x, window=3, stride=2))
        x = nn.relu(conv(x, 192, 3, "SAME"))
        x = nn.relu(conv(x, 192, 3, "VALID"))
        x = nn.relu(conv(x, 192, 3, "SAME"))
        x = third(ops.max_pool(x, window=3, stride=2))
        x = nn.relu(conv(x, 192, 3, "SAME"))
        x = nn.relu(conv(x, 192, 1, "SAME"))
        x = conv(x, self.num_classes, 1, "SAME")
        if self.final_relu:
            x = nn.relu(x)
        return ops.global_average_pool(x)


def _pytorch_bias(fan_in: int) -> Initializer:
    """PyTorch's default bias: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), with the fan_in of the layer's kernel."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class LeNet5(nn.Module):
    """LeNet-5 variant of the PyTorch notebook: 395,006 parameters. After LeCun et al., 1998.

    Attributes:
      dropout_rates: after the first and after the second convolution's ReLU, before the pools.
      initializer: 'original'; 'he' or 'lsuv': he_normal or orthogonal kernels and zero biases (see unit_variance).
      dtype: of the computation, float32 or bfloat16.
    """

    num_classes: int = 10
    dropout_rates: tuple[float, ...] = (0.2, 0.2)
    initializer: str = "original"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """float [N, 32, 32, 3], in the original in [-1, 1] → logits float32 [N, 10]; train turns dropout on."""
        # PyTorch's default kernel, kaiming_uniform_(a=sqrt(5)), is U(±1/sqrt(fan_in)): a variance of 1/(3·fan_in).
        pytorch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        # The notebook's xavier_normal_ for fc1. JAX's glorot_normal truncates at two deviations: not the same.
        xavier_normal = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")

        def bias_init(fan_in: int) -> Initializer:
            return nn.initializers.zeros if self.initializer in KERNELS else _pytorch_bias(fan_in)

        def conv(x: jax.Array, features: int) -> jax.Array:
            kernel = KERNELS.get(self.initializer, pytorch_kernel)
            return ops.Conv(features, 5, "VALID", kernel, bias_init(5 * 5 * x.shape[-1]), self.dtype)(x)

        def dense(x: jax.Array, features: int, original: Initializer = pytorch_kernel) -> jax.Array:
            kernel = KERNELS.get(self.initializer, original)
            return nn.Dense(features, kernel_init=kernel, bias_init=bias_init(x.shape[-1]), dtype=self.dtype)(x)

        first, second = (partial(ops.Dropout(rate), train=train) for rate in self.dropout_rates)
        x = images.astype(self.dtype)
        x = ops.max_pool(first(nn.relu(conv(x, 32))), window=2, stride=2)
        x = ops.max_pool(second(nn.relu(conv(x, 64))), window=2, stride=2)
        x = x.reshape(x.shape[0], -1)  # NHWC; PyTorch flattens NCHW, which matters when weights move
        x = nn.relu(dense(x, 200, xavier_normal))
        x = nn.relu(dense(x, 100))
        return dense(x, self.num_classes).astype(np.promote_types(self.dtype, np.float32))


MODELS: dict[str, Callable[..., nn.Module]] = {"all_cnn": AllCNN, "lenet5": LeNet5}


def unit_variance(model: nn.Module, params: Any, images: jax.Array) -> Any:
    """Kernels divided, from the first layer to the last, by the deviation of their outputs: LSUV (arXiv:1511.06422).

    The paper repeats each division until the variance is 1; with zero biases one does it. Args: images as the model
    takes them. Returns: parameters like `params`, with which each layer's outputs have unit variance.
    """

    @jax.jit
    def deviations(params: Any) -> dict[str, jax.Array]:
        _, variables = model.apply({"params": params}, images, capture_intermediates=True)
        return {name: variables["intermediates"][name]["__call__"][0].std() for name in params}

    for name in sorted(params):  # Conv_0, Conv_1, …, Dense_0, …: in the order of the layers
        scale = 1 / deviations(params)[name]
        params = params | {name: params[name] | {"kernel": params[name]["kernel"] * scale}}
    return params
