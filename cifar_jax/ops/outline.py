"""Parts of a program that XLA compiles by themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outlined(
    function: Callable[Arguments, Result], static_argnames: tuple[str, ...] = ()
) -> Callable[Arguments, Result]:
    """Returns a function that XLA does not fuse with what precedes and follows it, nor its derivatives.

    XLA:CPU fuses cheap operations with all that read their results and computes them anew for each reader. A max pool's
    gradient reads its argument once for each element of the window, so all before it would be computed several times.
    `lax.optimization_barrier` does not help: XLA removes barriers before it fuses elementwise operations. A program
    that `jax.export` made for several platforms may fuse it all the same.

    Args: static_argnames: names of the arguments that are no arrays.
    """

    @functools.wraps(function)
    def body(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with set_xla_metadata(inlineable="true"):  # functions that this one calls
            return function(*args, **kwargs)

    compiled = jax.jit(body, static_argnames=static_argnames)

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with set_xla_metadata(inlineable="false"):
            return compiled(*args, **kwargs)

    return call
