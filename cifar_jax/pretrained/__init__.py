"""The released weights: NAME.safetensors in this folder, each beside its model card NAME.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.errors import UserError
from cifar_jax.weights.files import load_weights


def pretrained_names() -> list[str]:
    """What `load_pretrained` can load."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.safetensors"))


def pretrained_path(name: str) -> Path:
    """The weight file of a released network. Raises UserError for an unknown one."""
    if name not in pretrained_names():
        raise UserError(f"no pretrained {name!r}: choose one of {', '.join(pretrained_names())}")
    return Path(__file__).parent / f"{name}.safetensors"


def load_pretrained(name: str, dtype: Any = jnp.float32) -> tuple[nn.Module, Any, Callable[[Any], jax.Array]]:
    """A released network: (model, variables, preprocess).

    `model.apply(variables, preprocess(images))` gives float32 logits [N, 10] for uint8 images [N, 32, 32, 3]; `dtype`
    is the type of the computation, float32 or bfloat16. Raises UserError for an unknown name, and `preprocess` for
    images of another type or shape.
    """
    weights = load_weights(pretrained_path(name))

    def preprocess(images: Any) -> jax.Array:
        images = jnp.asarray(images)
        if images.dtype != jnp.uint8 or images.shape[1:] != (32, 32, 3):
            raise UserError(f"images are {images.dtype} {list(images.shape)}: they must be uint8 [N, 32, 32, 3]")
        return scale_images(images, *pixel_statistics(weights.input_scaling, "cifar10"))

    return weights.create_module(dtype=dtype), {"params": weights.params}, preprocess
