"""Convolution with derivatives of every kind, and with a form for each platform, chosen when a program is lowered.

A convolution and its two gradients are each linear in both of their arguments. Together they are closed under
differentiation: each derivative of one of them, forward or backward, is a sum of the others.

                             by the first argument     by the second argument
    images ∗ kernel          image_gradient            kernel_gradient
    image_gradient(g, k)     convolution               kernel_gradient
    kernel_gradient(x, g)    image_gradient            convolution

Each is a JAX primitive, which a traced program keeps until it is lowered. Otherwise JAX would differentiate the fast
form itself, which is slow, or need a custom rule, which has no forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from cifar_jax.ops import cpu
from cifar_jax.ops.reference import Pads, as_pads, lax_convolution, lax_image_gradient, lax_kernel_gradient, vary_alike

Form = Callable[..., jax.Array]  # (first argument, second argument, pads)
Precision = str | None  # of products, as in jax.default_matmul_precision: noted where a convolution is called


def convolution(images: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    """Stride 1: images [N, H, W, I], kernel [h, w, I, O] of the same type; padding 'SAME', 'VALID' or two pairs.

    Returns: [N, H', W', O].
    """
    pads = as_pads(images.shape, kernel.shape, padding)
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return _bind(_convolution, images, kernel, pads=pads, precision=precision)


def _bind(primitive: Primitive, first: jax.Array, second: jax.Array, **params: Any) -> jax.Array:
    """Binds the primitive. Under shard_map an argument is first made to vary over the mesh axes of the other."""
    return primitive.bind(*vary_alike(first, second), **params)


def _at(precision: Precision, form: Form) -> Form:
    """Returns the form with this precision: a program is lowered after the context of its caller has ended."""

    def precise(*arguments: jax.Array, pads: Pads) -> jax.Array:
        with jax.default_matmul_precision(precision):
            return form(*arguments, pads)

    return precise


def _lowering(form: Form) -> Callable[..., Any]:
    """Returns the rule that lowers a primitive to this form.

    The form sees only shapes and types: the primitive has already determined over which devices the result varies.
    """

    def rule(context: Any, *values: Any, pads: Pads, precision: Precision) -> Any:
        lower = mlir.lower_fun(_at(precision, form), multiple_results=False)
        avals = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in]
        return lower(context.replace(avals_in=avals), *values, pads=pads)

    return rule


def _primitive(name: str, default: Form, on_cpu: Form, folds: bool) -> Primitive:
    """Creates a primitive that is lowered to `on_cpu` for the CPU and to `default` for other platforms.

    Args: folds: whether images are independent of each other, so that a vmap over them is one call with more images.
    """
    primitive = Primitive(name)

    def run(*arguments: Any, pads: Pads, precision: Precision) -> jax.Array:
        return primitive.bind(*arguments, pads=pads, precision=precision)

    # Under jax_debug_nans JAX runs a program again operation by operation. By this mark it knows an operation.
    run._apply_primitive, run.__qualname__ = True, name  # type: ignore[attr-defined]
    compiled = jax.jit(run, static_argnames=("pads", "precision"))

    @primitive.def_impl
    def compute(*arguments: Any, pads: Pads, precision: Precision) -> jax.Array:
        with jax.disable_jit(False):  # otherwise this would call itself
            return compiled(*arguments, pads=pads, precision=precision)

    @primitive.def_abstract_eval
    def shape_and_type(first: Any, second: Any, pads: Pads, precision: Precision) -> Any:
        if not folds:  # a sum over images: it is not sharded, even if they are
            whole = lambda aval: NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * aval.ndim))
            first, second = (aval.update(sharding=whole(aval)) for aval in (first, second))
        return jax.make_jaxpr(partial(default, pads=pads))(first, second).out_avals[0]

    mlir.register_lowering(primitive, _lowering(default))
    mlir.register_lowering(primitive, _lowering(on_cpu), platform="cpu")

    def batch(arguments: Any, axes: Any, pads: Pads, precision: Precision) -> tuple[jax.Array, int]:
        if folds and axes[1] is None:
            images = jnp.moveaxis(arguments[0], axes[0], 0)
            images, shape = images.reshape(-1, *images.shape[2:]), images.shape
            result = _bind(primitive, images, arguments[1], pads=pads, precision=precision)
            return result.reshape(*shape[:2], *result.shape[1:]), 0
        of_platform = lambda *pair: lax.platform_dependent(
            *pair, cpu=partial(_at(precision, on_cpu), pads=pads), default=partial(_at(precision, default), pads=pads)
        )
        return jax.vmap(of_platform, axes)(*arguments), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


_convolution = _primitive("convolution", lax_convolution, cpu.convolution, folds=True)
_image_gradient = _primitive("convolution_image_gradient", lax_image_gradient, cpu.image_gradient, folds=True)
_kernel_gradient = _primitive("convolution_kernel_gradient", lax_kernel_gradient, cpu.kernel_gradient, folds=False)

# Transposes with respect to the first and the second argument: (cotangent, arguments, parameters) → its cotangent.
# Of the two arguments, this one has no value.
ad.defbilinear(
    _convolution,
    lambda g, images, kernel, **params: _bind(_image_gradient, g, kernel, **params),
    lambda g, images, kernel, **params: _bind(_kernel_gradient, images, g, **params),
)
ad.defbilinear(
    _image_gradient,
    lambda x, gradient, kernel, **params: _bind(_convolution, x, kernel, **params),
    lambda x, gradient, kernel, **params: _bind(_kernel_gradient, x, gradient, **params),
)
ad.defbilinear(
    _kernel_gradient,
    lambda k, images, gradient, **params: _bind(_image_gradient, gradient, k, **params),
    lambda k, images, gradient, **params: _bind(_convolution, images, k, **params),
)
