"""Random keys as plain arrays, to save them or to send them to another process."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_key(array: Any) -> bool:
    """Tells whether an array holds random keys (jax.random.key)."""
    return bool(jnp.issubdtype(array.dtype, jax.dtypes.prng_key))


def plain(tree: Any) -> Any:
    """Returns keys as their uint32 data, and in one of several processes numpy arrays: there Orbax saves no others."""
    tree = jax.tree.map(lambda array: jax.random.key_data(array) if is_key(array) else array, tree)
    return tree if jax.process_count() == 1 else jax.tree.map(np.asarray, tree)


def with_keys(restored: Any, like: Any) -> Any:
    """Returns a restored tree with keys where `like` has them. Checkpoints of earlier versions hold keys already."""

    def wrap(array: Any, old: Any) -> Any:
        is_plain = is_key(old) and not is_key(array)
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(old)) if is_plain else array

    return jax.tree.map(wrap, restored, like)
