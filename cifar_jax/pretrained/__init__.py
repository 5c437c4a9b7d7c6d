"""Released networks: weights NAME.safetensors in this folder, each with its model card NAME.md."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.datasets import check_images
from cifar_jax.errors import UserError
from cifar_jax.weights.files import load_weights


def pretrained_names() -> list[str]:
    """Returns the names of the released networks."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.safetensors"))


def pretrained_path(name: str) -> Path:
    """Returns the weight file of a released network. Raises: UserError for an unknown name."""
    if name not in pretrained_names():
        raise UserError(f"unknown pretrained network {name!r}: choose one of {', '.join(pretrained_names())}")
    return Path(__file__).parent / f"{name}.safetensors"


def load_pretrained(name: str, dtype: Any = jnp.float32) -> tuple[nn.Module, Any, Callable[[Any], jax.Array]]:
    """Loads a released network. Returns: (model, variables, preprocess).

    `model.apply(variables, preprocess(images))` returns float32 logits [N, 10] for uint8 images [N, 32, 32, 3].
    Args: name: one of `pretrained_names`; dtype: computation type, float32 or bfloat16.
    Raises: UserError for an unknown name. `preprocess` raises it for images of another type or shape.
    """
    weights = load_weights(pretrained_path(name))

    preprocess = partial(_preprocess, statistics=pixel_statistics(weights.input_scaling, "cifar10"))
    return weights.create_module(dtype=dtype), {"params": weights.params}, preprocess


def _preprocess(images: Any, statistics: tuple[Any, Any]) -> jax.Array:
    images = jnp.asarray(images)
    check_images(images)
    return scale_images(images, *statistics)
