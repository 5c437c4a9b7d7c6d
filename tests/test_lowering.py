"""Training programs, lowered for devices that are not here. A GPU or TPU gets nothing of the CPU's forms."""

import re
import types

import jax
import numpy as np
import pytest

from cifar_jax.configs import RECIPES
from cifar_jax.multi_step import create_train_steps
from cifar_jax.parallel import AXIS, has_constant_bounds
from cifar_jax.train_step import create_train_state
from cifar_jax.trainer import create_history

STEPS = 10
GPU = [types.SimpleNamespace(platform="gpu")]


@pytest.fixture(scope="module", params=["lenet5_reference", "all_cnn_fast"])
def traced(request):
    """A recipe's call of several steps on two devices. pmap lowers only for what is here; it is built on shard_map."""
    config, devices = RECIPES[request.param], jax.devices()[:2]
    steps = create_train_steps(config, devices, 32, STEPS, STEPS, has_constant_bounds(GPU))
    shape = jax.ShapeDtypeStruct
    number, images, labels = shape((), np.int32), shape((80, 32, 32, 3), np.uint8), shape((80,), np.int32)
    state = jax.eval_shape(lambda state: state, create_train_state(config, STEPS))
    arguments = (state, create_history(STEPS), images, labels, labels, number, number)
    whole, each = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    program = jax.shard_map(
        lambda *arguments: steps.function(*arguments[:-1], arguments[-1][0]),
        mesh=jax.sharding.Mesh(np.array(devices), (AXIS,)),
        in_specs=(*(whole for _ in arguments), each),
        out_specs=whole,
        check_vma=False,
    )
    with jax.numpy_dtype_promotion("standard"):  # optax' Muon needs it
        return jax.jit(program, donate_argnums=steps.donate).trace(*arguments, shape((2,), np.int32))


def test_other_platforms_get_no_form_of_the_cpu(traced):
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "tpu", "cpu")}
    for name in ("cuda", "tpu"):
        text = texts[name]
        assert "custom_call" not in text
        assert "f64" not in text
        assert text.count("select_and_scatter") == 2  # the gradients of both pools
        assert text.count("stablehlo.convolution") < texts["cpu"].count("stablehlo.convolution") / 2
        constant = r"cond \{\s+(%\w+) = stablehlo.constant dense<(\d+)>.*\s+.* stablehlo.compare LT, %\w+, \1,"
        bounds = re.findall(constant, text)
        assert text.count("stablehlo.while") == len(bounds) <= 2  # the steps, and Muon's iteration
        assert str(STEPS) in [bound for _, bound in bounds]
        assert "all_reduce" in text
    assert "select_and_scatter" not in texts["cpu"]
