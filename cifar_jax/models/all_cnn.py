"""All-CNN variant."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax import ops
from cifar_jax.models.initializers import choose_kernel


class AllCNN(nn.Module):
    """All-CNN variant of the Keras program, 1,369,738 parameters. It varies All-CNN-C (arXiv:1412.6806).

    Attributes:
      dropout_rates: after the first convolution, after the first pool, after the second pool.
      final_relu: adds a ReLU between the 10-channel convolution and the average pool, as in the architecture JSON
        published with the original's pretrained weights (same parameters, different logits).
      initializer: 'original', or a name of initializers.KERNELS (with zero biases).
      dtype: computation type, float32 or bfloat16.
    """

    LAYERS: ClassVar[tuple[str, ...]] = tuple(f"Conv_{i}" for i in range(9))
    INPUT_SCALING: ClassVar[str] = "unit"
    RESIZABLE: ClassVar[bool] = True
    CPU_STEPS_PER_CALL: ClassVar[int] = 1  # XLA's convolutions are several times slower inside a loop of steps

    num_classes: int = 10
    dropout_rates: tuple[float, ...] = (0.2, 0.5, 0.5)
    final_relu: bool = False
    initializer: str = "original"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Float [N, H, W, 3] → logits float32 [N, num_classes]. The original's pixels are 32×32, in [0, 1].

        Raises: ValueError for images with fewer than 11 rows or columns, of which the pools leave nothing.
        """
        if min(images.shape[1:3]) < 11:
            raise ValueError(f"images [N, H, W, 3] need 11 rows and columns or more, not {images.shape[1:3]}")

        def conv(x: jax.Array, features: int, size: int, padding: str) -> jax.Array:
            # Keras' defaults are glorot_uniform kernels and zero biases. (Flax's kernels: truncated lecun_normal.)
            kernel_init = choose_kernel(self.initializer, nn.initializers.glorot_uniform())
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
