import math
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import cifar_jax
from cifar_jax import ops
from cifar_jax.models import AllCNN, LeNet5
from cifar_jax.ops import bfloat16, cpu, reference, winograd
from cifar_jax.ops.outline import outlined
from cifar_jax.ops.reference import lax_convolution, lax_max_pool

# (images NHWC, kernel HWIO, padding): every kind of shape that both networks have, in small batches, and odd ones.
CONVOLUTIONS = [
    ((4, 32, 32, 3), (3, 3, 3, 96), "SAME"),
    ((1, 32, 32, 96), (3, 3, 96, 96), "SAME"),
    ((1, 15, 15, 192), (3, 3, 192, 192), "VALID"),
    ((8, 6, 6, 192), (3, 3, 192, 192), "SAME"),
    ((8, 6, 6, 192), (1, 1, 192, 192), "SAME"),
    ((4, 32, 32, 3), (5, 5, 3, 32), "VALID"),
    ((4, 14, 14, 32), (5, 5, 32, 64), "VALID"),
    ((1, 7, 5, 2), (2, 3, 2, 3), "SAME"),
    ((6, 9, 8, 5), (4, 2, 5, 7), "SAME"),
    ((5, 7, 7, 4), (7, 7, 4, 1), "VALID"),
    ((12, 5, 6, 1), (3, 3, 1, 2), ((2, 0), (1, 3))),
    ((2, 7, 9, 5), (3, 4, 5, 3), ((1, 0), (2, 3))),
    ((3, 6, 5, 6), (5, 5, 6, 2), "SAME"),
    ((2, 4, 3, 8), (1, 3, 8, 4), "VALID"),
]
WINOGRAD = [c for c in CONVOLUTIONS if 1 < c[1][1] < 6 and c[1][2] > 4 and c[0][2] > 5]  # in this form
DIRECT = [c for c in CONVOLUTIONS if c not in WINOGRAD]
POOLS = [((4, 32, 32, 96), 3, 2), ((4, 13, 13, 192), 3, 2), ((4, 28, 28, 32), 2, 2), ((4, 10, 10, 64), 2, 2)]
ODD_POOLS = [((1, 7, 5, 2), 3, 2), ((3, 9, 4, 1), 2, 3), ((2, 5, 6, 3), 4, 1)]


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def assert_close(actual, expected, tolerance):
    """Trees of arrays, relative to each array's largest value."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(check, actual, expected)


def value_and_gradients(function, *arguments):
    """The result, and the gradients for a fixed random cotangent, which bfloat16 holds exactly."""
    result = jax.eval_shape(function, *arguments)
    cotangent = normal(9, result.shape).astype(jnp.bfloat16).astype(result.dtype)

    def both(cotangent, *arguments):
        result, vjp = jax.vjp(function, *arguments)
        return result, *vjp(cotangent)

    return jax.jit(both)(cotangent, *arguments)


@pytest.mark.parametrize(("images", "kernel", "padding"), DIRECT)
def test_cpu_convolution_is_laxs(images, kernel, padding):
    arguments = normal(0, images), normal(1, kernel)
    actual = value_and_gradients(lambda x, k: ops.convolution(x, k, padding), *arguments)
    expected = value_and_gradients(lambda x, k: lax_convolution(x, k, padding), *arguments)
    assert_close(actual, expected, 4e-5)  # sums of up to thousands of products in another order


@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_toom_cook_correlates(taps):
    a, g, b = winograd.toom_cook(winograd.TILE, taps)
    kernel, data = np.random.default_rng(0).normal(size=taps), np.random.default_rng(1).normal(size=len(b))
    assert len(b) == winograd.TILE + taps - 1  # as many products
    np.testing.assert_allclose(a @ (g @ kernel * (b @ data)), np.correlate(data, kernel, "valid"), rtol=1e-12)


@pytest.mark.parametrize(
    ("images", "kernel", "padding"),
    [pytest.param(*case, marks=pytest.mark.long if case[0] == (8, 6, 6, 192) else ()) for case in WINOGRAD],
)
def test_winograds_form_is_exact_but_for_rounding(images, kernel, padding):
    """The sums are the same ones in float64; in float32 they are nearly as exact as the plain convolution's."""
    arguments = [np.asarray(normal(seed, shape)) for seed, shape in enumerate((images, kernel))]
    ours = lambda x, k: ops.convolution(x, k, padding)
    plain = lambda x, k: lax_convolution(x, k, padding)
    assert jax.jit(ours).lower(*arguments).as_text().count("stablehlo.convolution") == kernel[1] + winograd.TILE - 1
    in_float32 = value_and_gradients(ours, *arguments), value_and_gradients(plain, *arguments)
    with jax.enable_x64(True):
        doubles = [np.asarray(x, np.float64) for x in arguments]
        exact = value_and_gradients(plain, *doubles)
        assert_close(value_and_gradients(ours, *doubles), exact, 1e-13)
    for a, p, b in zip(*in_float32, exact, strict=True):
        deviation = lambda x, b=b: float(np.sqrt(np.mean(np.square(x - np.asarray(b)))))
        assert deviation(a) < 5 * deviation(p) + 1e-7 * np.abs(b).max()


def test_winograds_form_is_taken_where_it_saves():
    assert [size for size in range(1, 17) if not winograd.pays((3, 3, 8, 8), size)] == [1, 2, 5]
    assert not winograd.pays((3, 3, 4, 8), 16)
    assert not winograd.pays((3, 1, 8, 8), 16)
    assert not winograd.pays((3, 6, 8, 8), 16)  # more points than there are


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((6, 7), (1, 1)), ((0, -1), (2, 1))])
def test_cpu_convolution_in_bfloat16(size, padding):
    images, kernel = normal(0, (16, 15, 15, 8), jnp.bfloat16), normal(1, (size, size, 8, 16), jnp.bfloat16)
    actual = value_and_gradients(lambda x, k: ops.convolution(x, k, padding), images, kernel)
    exact = value_and_gradients(
        lambda x, k: lax_convolution(x, k, padding), images.astype(jnp.float32), kernel.astype(jnp.float32)
    )
    assert {a.dtype for a in actual} == {jnp.dtype(jnp.bfloat16)}
    assert_close(actual, exact, 0.02)


@pytest.mark.parametrize(("images", "block"), [(64, 16), (50, 10), (17, 17), (19, 1), (0, 0)])
def test_blocks_divide_the_images(images, block):
    shape = jax.ShapeDtypeStruct((images, 10, 8, 5), jnp.float32)
    assert winograd.block_size(shape, 3, 17 * 6 * 10 * 2 * 5 + 1) == block  # 6 points, 2 tiles: room for 17 images


@pytest.mark.parametrize("size", [3, 5])
def test_transforms_of_bfloat16_are_not_rounded(size, monkeypatch):
    """Only what is multiplied is rounded. Rounded transforms would have twice to four times these errors."""
    images, kernel = normal(0, (6, 14, 14, 32), jnp.bfloat16), normal(1, (size, size, 32, 16), jnp.bfloat16)
    shape = jax.eval_shape(lambda x, k: lax_convolution(x, k, "VALID"), images, kernel).shape
    cotangent, no_pads = normal(2, shape, jnp.bfloat16), ((0, 0), (0, 0))
    for name, *arguments in (
        ("convolution", images, kernel),
        ("image_gradient", cotangent, kernel),
        ("kernel_gradient", images, cotangent),
    ):
        results = []
        for limit in (0, 2**15, 2**30):  # blocks of 1, of 2 or 3, and of all 6 images
            monkeypatch.setattr(bfloat16, "BLOCK", limit)
            monkeypatch.setattr(winograd, "KERNEL_BLOCK", limit)
            form = getattr(winograd if name == "kernel_gradient" else bfloat16, name)
            results.append(jax.jit(partial(form, pads=no_pads))(*arguments))
        expected = getattr(reference, f"lax_{name}")(*(x.astype(jnp.float32) for x in arguments), no_pads)
        size_of = lambda x: float(jnp.sqrt(jnp.square(x).mean()))
        for result in results:
            assert size_of(result.astype(jnp.float32) - expected) < {3: 0.007, 5: 0.012}[size] * size_of(expected)


@pytest.mark.parametrize(("images", "window", "stride"), POOLS + ODD_POOLS)
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool_is_laxs(images, window, stride, ties):
    x = normal(0, images)
    if ties:  # few values, so that most windows hold equals: their gradient goes to the first
        x = jnp.round(x)
    actual = value_and_gradients(lambda x: ops.max_pool(x, window, stride), x)
    expected = value_and_gradients(lambda x: lax_max_pool(x, window, stride), x)
    np.testing.assert_array_equal(actual[0], expected[0])
    assert_close(actual[1], expected[1], 1e-6)


@pytest.mark.parametrize(
    ("size", "padding"), [(3, "SAME"), (5, "VALID"), pytest.param(1, "SAME", marks=pytest.mark.long)]
)
def test_conv_is_flax_conv(size, padding):
    """Initial parameters, outputs and gradients."""
    init = nn.initializers.normal(1), nn.initializers.uniform(1)
    ours = ops.Conv(6, size, padding, *init)
    theirs = nn.Conv(6, (size, size), padding=padding, kernel_init=init[0], bias_init=init[1])
    images = normal(0, (3, 8, 8, 5))
    variables = ours.init(jax.random.key(1), images)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(1), images))
    with jax.enable_x64(True):
        assert {x.dtype for x in jax.tree.leaves(ours.init(jax.random.key(1), images))} == {jnp.dtype(jnp.float32)}
    loss = lambda layer, variables, x: (layer.apply(variables, x) ** 2).sum()
    results = [jax.jit(jax.value_and_grad(partial(loss, layer), (0, 1)))(variables, images) for layer in (ours, theirs)]
    assert_close(*results, 1e-5)


def test_dense_is_flax_dense():
    """Initial parameters, outputs and gradients."""
    init = nn.initializers.normal(1), nn.initializers.uniform(1)
    ours, theirs = ops.Dense(6, *init), nn.Dense(6, kernel_init=init[0], bias_init=init[1])
    inputs = normal(0, (3, 8))
    variables = ours.init(jax.random.key(1), inputs)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(1), inputs))
    loss = lambda layer, variables, x: (layer.apply(variables, x) ** 2).sum()
    results = [jax.jit(jax.value_and_grad(partial(loss, layer), (0, 1)))(variables, inputs) for layer in (ours, theirs)]
    assert_close(*results, 1e-6)


@pytest.mark.parametrize("layer", [partial(ops.Conv, 2, 1, "SAME"), partial(ops.Dense, 2)])
def test_the_gradient_of_a_bias_is_summed_in_float32(layer):
    """In bfloat16 a sum of ones stands still at 256."""
    layer, images = layer(nn.initializers.ones, dtype=jnp.bfloat16), jnp.ones((4, 32, 32, 1))
    variables = layer.init(jax.random.key(0), images)
    assert layer.apply(variables, images).dtype == jnp.bfloat16
    gradient = jax.grad(lambda v: layer.apply(v, images).astype(jnp.float32).sum())(variables)["params"]["bias"]
    np.testing.assert_array_equal(gradient, [4096, 4096])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_global_average_is_taken_in_float32(dtype):
    images = (1 + jnp.arange(8 * 6 * 6 * 3) % 7).astype(dtype).reshape(8, 6, 6, 3)
    means = jax.jit(ops.global_average_pool)(images)
    assert means.dtype == jnp.float32
    np.testing.assert_allclose(means, np.asarray(images, np.float32).mean((1, 2)), rtol=1e-6)


# --- derivatives of every kind ---


class SmallNetwork(nn.Module):
    """Every form of a convolution, both networks' pools and paddings, and dropout, with few layers to compile."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False):
        layer = partial(ops.Conv, kernel_init=nn.initializers.he_normal(), dtype=self.dtype)
        x = nn.relu(layer(6, 3, "SAME")(images))  # of 3 channels: in the direct form
        x = ops.Dropout(0.2)(nn.relu(layer(8, 3, "SAME")(x)), train=train)  # in Winograd's
        x = ops.max_pool(x, window=3, stride=2)
        x = nn.relu(layer(8, 5, "VALID")(x))  # wide, in the direct form
        x = ops.max_pool(x, window=2, stride=2)
        return ops.global_average_pool(layer(10, 1, "SAME")(x))


NETWORKS = {"lenet5": (LeNet5, (2, 32, 32, 3)), "all_cnn": (AllCNN, (2, 16, 16, 3))}
SMALL_SHAPE = 2, 13, 13, 3


@pytest.fixture
def plain(monkeypatch):
    """Calls a function with lax's forms of convolution and max pool, which JAX differentiates by its own rules."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "convolution", lax_convolution)
            patch.setattr(ops, "max_pool", lax_max_pool)
            return function(*arguments)

    return call


@cache
def initial_params(network, shape):
    return jax.device_get(jax.jit(network().init)(jax.random.key(1), np.zeros(shape, np.float32))["params"])


def random_problem(network=SmallNetwork, shape=SMALL_SHAPE, dtype=np.float32):
    """A loss of the parameters, dropout on, and two sets of parameters: a place and a direction."""
    model, rngs = network(dtype=dtype), {"dropout": jax.random.key(0)}
    images = np.asarray(normal(0, shape), dtype)
    targets = jax.nn.one_hot(jnp.arange(shape[0]), 10, dtype=dtype)

    def loss(params, images=images, targets=targets):
        logits = model.apply({"params": params}, images, train=True, rngs=rngs)
        return -(jax.nn.log_softmax(logits) * targets).sum(-1).mean()

    params, rng = initial_params(network, shape), np.random.default_rng(1)
    directions = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    return loss, *jax.tree.map(lambda x: np.asarray(x, dtype), (params, directions))


def test_every_derivative_is_the_plain_networks(plain):
    """The loss, its gradient, its slope in a direction and the Hessian times the direction: in float64, where no
    near-tie of a ReLU or a max pool falls to the other side."""

    def derivatives(loss, params, direction):
        values, linear = jax.linearize(jax.value_and_grad(loss), params)
        return values, linear(direction)

    with jax.enable_x64(True):
        problem = random_problem(dtype=np.float64)
        expected = plain(lambda: jax.jit(partial(derivatives, problem[0]))(*problem[1:]))
        assert_close(jax.jit(partial(derivatives, problem[0]))(*problem[1:]), expected, 1e-12)
    loss, *arguments = random_problem()
    (value, _), (slope, _) = expected
    actual = jax.jit(lambda params, direction: jax.jvp(loss, (params,), (direction,)))(*arguments)
    assert_close(actual, (value, slope), 1e-4)


@pytest.mark.parametrize(("images", "kernel", "padding"), [DIRECT[-3], WINOGRAD[-1]])
def test_the_second_derivatives_of_a_convolution(images, kernel, padding):
    """Forward over backward, and backward over backward."""
    with jax.enable_x64(True):
        arguments = [np.asarray(normal(seed, shape), np.float64) for seed, shape in enumerate((images, kernel))]

        def second(convolution):
            gradient = jax.grad(lambda x, k: (convolution(x, k, padding) ** 2).sum(), (0, 1))
            forward = lambda x, k: jax.jvp(gradient, (x, k), (x, k))[1]
            backward = jax.grad(lambda x, k: sum((g**2).sum() for g in gradient(x, k)), (0, 1))
            return jax.jit(lambda x, k: (forward(x, k), backward(x, k)))(*arguments)

        assert_close(second(ops.convolution), second(lax_convolution), 1e-12)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_forward_and_backward_derivatives_agree(dtype):
    """In the network's type of computation, eagerly as well as compiled."""
    images, kernel = normal(0, (4, 9, 9, 6), dtype), normal(1, (3, 3, 6, 8), dtype)
    directions = normal(2, images.shape, dtype), normal(3, kernel.shape, dtype)
    function = lambda x, k: ops.global_average_pool(ops.max_pool(ops.convolution(x, k, "SAME"), 3, 2)).sum()
    for jit in (jax.jit, lambda function: function):
        gradients = jit(jax.grad(function, (0, 1)))(images, kernel)
        _, slope = jit(partial(jax.jvp, function))((images, kernel), directions)
        terms = [np.asarray(g, np.float64) * np.asarray(d, np.float64) for g, d in zip(gradients, directions)]
        size = sum(np.abs(term).sum() for term in terms)
        assert abs(slope - sum(term.sum() for term in terms)) < (1e-6 if dtype == np.float32 else 1e-2) * size


def test_forward_mode_of_a_released_network():
    """The tangents of its logits are their differences, to the few ReLUs and maxima that change between."""
    model, variables, _ = cifar_jax.load_pretrained("lenet5")
    images = normal(0, (2, 32, 32, 3))
    logits, tangents = jax.jit(lambda x: jax.jvp(lambda x: model.apply(variables, x), (x,), (x,)))(images)
    assert_close(logits, jax.jit(model.apply)(variables, images), 1e-5)
    step = 1e-3
    ahead, behind = (jax.jit(model.apply)(variables, images * (1 + sign * step)) for sign in (1, -1))
    assert_close(tangents, (ahead - behind) / (2 * step), 0.02)


# --- transformations ---


@pytest.mark.parametrize("axes", [*(pytest.param(x, marks=pytest.mark.long) for x in ((0, None), (None, 0))), (3, 2)])
def test_vmap_is_laxs(axes):
    """Of a convolution and its gradients, and the gradients of a vmap."""
    with jax.enable_x64(True):
        shapes = [[3, 7, 6, 5], [3, 3, 5, 4]]
        for shape, axis in zip(shapes, axes):
            if axis is not None:
                shape.insert(axis, 2)
        arguments = [np.asarray(normal(seed, shape), np.float64) for seed, shape in enumerate(shapes)]

        def results(convolution):
            loss = lambda x, k: (convolution(x, k, "SAME") ** 2).sum()
            every = jax.vmap(jax.value_and_grad(loss, (0, 1)), axes)
            outside = jax.grad(lambda x, k: jax.vmap(loss, axes)(x, k).sum(), (0, 1))
            return jax.jit(lambda x, k: (every(x, k), outside(x, k)))(*arguments)

        assert_close(results(ops.convolution), results(lax_convolution), 1e-13)


def test_gradients_by_example():
    """vmap of grad: their sum is the batch's gradient."""
    with jax.enable_x64(True):
        model, images = SmallNetwork(dtype=np.float64), np.asarray(normal(0, SMALL_SHAPE), np.float64)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), initial_params(SmallNetwork, SMALL_SHAPE))
        loss = lambda params, images: (model.apply({"params": params}, images) ** 2).sum()
        by_example = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, images[:, None])
        total = jax.jit(jax.grad(loss))(params, images)
        assert_close(jax.tree.map(lambda x: x.sum(0), by_example), total, 1e-12)


def test_checkpoint_and_scan():
    loss, params, _ = random_problem()
    expected = jax.jit(jax.grad(loss))(params)

    def scanned(params):
        total, _ = lax.scan(lambda total, _: (total + jax.checkpoint(loss)(params) / 2, None), 0.0, length=2)
        return total

    assert_close(jax.jit(jax.grad(scanned))(params), expected, 1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches(axis_type):
    """By jit and by shard_map, which checks over which devices values vary: gradients are those of one device."""
    images, kernel = normal(0, (8, 9, 9, 6)), normal(1, (3, 3, 6, 8))
    loss = lambda kernel, images: ops.max_pool(ops.convolution(images, kernel, "SAME"), 3, 2).sum()
    expected = jax.jit(jax.grad(loss, (0, 1)))(kernel, images)
    mesh = jax.make_mesh((2,), ("device",), axis_types=(axis_type,), devices=jax.devices()[:2])
    whole, divided = PartitionSpec(), PartitionSpec("device")
    kernel, images = jax.device_put((kernel, images), (NamedSharding(mesh, whole), NamedSharding(mesh, divided)))
    by_device = jax.shard_map(jax.grad(loss, (0, 1)), mesh=mesh, in_specs=(whole, divided), out_specs=(whole, divided))
    assert_close(jax.jit(by_device)(kernel, images), expected, 1e-5)  # shard_map sums the kernel's by itself
    with jax.set_mesh(mesh):
        assert_close(jax.jit(jax.grad(loss, (0, 1)))(kernel, images), expected, 1e-5)


@pytest.mark.parametrize("layer", [ops.Conv(6, 3, "SAME", nn.initializers.ones), ops.Dense(6, nn.initializers.ones)])
def test_gradients_are_summed_over_devices_in_float32(layer):
    """Of parameters that all devices of shard_map share, for a network in bfloat16."""
    layer = layer.clone(dtype=jnp.bfloat16)
    images = normal(0, (4, 9, 9, 3) if isinstance(layer, ops.Conv) else (4, 3))
    variables = layer.init(jax.random.key(0), images)
    gradient = jax.grad(lambda variables, x: layer.apply(variables, x).astype(jnp.float32).sum())
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    whole, divided = PartitionSpec(), PartitionSpec("device")
    program = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, divided), out_specs=whole)
    sums = [line for line in str(jax.make_jaxpr(program)(variables, images)).splitlines() if "psum" in line]
    assert sums
    assert not any("bf16" in line for line in sums)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_single_images_on_devices(dtype, monkeypatch):
    """By vmap in shard_map, with a kernel gradient of several blocks."""
    monkeypatch.setattr(winograd, "KERNEL_BLOCK", 0)
    images, kernel = normal(0, (4, 2, 9, 9, 6), dtype), normal(1, (3, 3, 6, 8), dtype)
    each = jax.vmap(jax.grad(lambda kernel, x: ops.convolution(x, kernel, "SAME").sum()), (None, 0))
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("device")), "out_specs": PartitionSpec("device")}
    varying = lambda kernel, x: each(lax.pcast(kernel, "device", to="varying"), x)
    actual = jax.jit(jax.shard_map(varying, mesh=mesh, **specs))(kernel, images)
    plain = jax.grad(lambda kernel, x: lax_convolution(x, kernel, "SAME").sum())
    expected = jax.vmap(plain, (None, 0))(kernel.astype(jnp.float32), images.astype(jnp.float32))
    assert_close(actual, expected, 0.02 if dtype == jnp.bfloat16 else 1e-5)


def test_eval_shape_and_wrong_arguments():
    images, kernel = jnp.ones((2, 8, 7, 3)), jnp.ones((3, 2, 3, 4))
    result = jax.eval_shape(partial(ops.convolution, padding="VALID"), images, kernel)
    assert (result.shape, result.dtype) == ((2, 6, 6, 4), jnp.float32)
    for wrong in (images[0], images[..., :2], images.astype(jnp.bfloat16)):
        with pytest.raises((TypeError, ValueError)):
            jax.eval_shape(partial(ops.convolution, padding=((0, 0), (0, 0))), wrong, kernel)


def test_without_jit_and_with_checks_for_nan():
    """Both make JAX run operation by operation."""
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    expected = ops.convolution(images, kernel, "SAME")
    with jax.disable_jit():
        np.testing.assert_array_equal(ops.convolution(images, kernel, "SAME"), expected)
    program = jax.jit(lambda images: ops.convolution(images, kernel, "SAME"))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        program(images * jnp.nan)


def test_the_precision_is_that_where_a_convolution_is_called():
    """The program is lowered after its context has ended."""

    def loss(kernel):
        with jax.default_matmul_precision("highest"):
            return ops.convolution(jnp.ones((2, 8, 8, 3)), kernel, "SAME").sum()

    def text(loss):
        program = jax.jit(jax.value_and_grad(loss)).trace(jnp.ones((3, 3, 3, 4)))
        return program.lower(lowering_platforms=("cuda",)).as_text()

    assert text(loss).count("precision HIGHEST") == 2 * operations(text(loss))["convolution"] > 0
    assert "HIGHEST" not in text(lambda kernel: ops.convolution(jnp.ones((2, 8, 8, 3)), kernel, "SAME").sum())


# --- the platform's form ---


def operations(text):
    """How often each operation is in a lowered program."""
    names = [part.split('"')[0].split(" ")[0].split("(")[0] for part in text.split("stablehlo.")[1:]]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("name", ["lenet5", pytest.param("all_cnn", marks=pytest.mark.long)])
def test_a_program_gets_the_form_of_its_platform(name, plain, monkeypatch):
    """Whatever machine lowers it: no other platform gets the CPU's."""
    loss, params, _ = random_problem(*NETWORKS[name])
    trace = lambda: jax.jit(jax.value_and_grad(loss)).trace(params)
    lowered = lambda program, platform: operations(program.lower(lowering_platforms=(platform,)).as_text())
    program, plain_program = trace(), plain(trace)
    for platform in ("tpu",) if name == "all_cnn" else ("cuda", "rocm", "tpu"):
        ours, laxs = lowered(program, platform), lowered(plain_program, platform)
        for operation in ("convolution", "reduce_window", "select_and_scatter", "dot_general", "reverse", "while"):
            assert ours.get(operation) == laxs.get(operation), operation
        assert ours["convolution"] == 3 * len(params) - 1 if name == "all_cnn" else 5
        assert "custom_call" not in ours
    here = lowered(program, "cpu")
    assert here["convolution"] > 5
    assert "select_and_scatter" not in here
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert lowered(trace(), "cpu") == here


def test_a_program_for_several_platforms(plain):
    """One artefact holds each platform's form, and on the CPU it computes what is compiled for it alone."""
    loss, params, _ = random_problem()
    program = jax.jit(jax.value_and_grad(loss))
    exported = jax.export.export(program, platforms=["cpu", "cuda", "tpu"])(params)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    found = operations(exported.mlir_module())
    assert found["select_and_scatter"] >= 2
    alone = operations(program.lower(params).as_text())
    assert found["convolution"] - alone["convolution"] in (11, 22)  # in one or two copies
    assert_close(jax.jit(exported.call)(params), program(params), 1e-6)  # XLA may inline what is outlined


def test_a_program_for_any_batch_size():
    model, (_, *size) = SmallNetwork(), SMALL_SHAPE
    images = normal(0, (3, *size))
    params = initial_params(SmallNetwork, SMALL_SHAPE)
    gradient = jax.jit(jax.grad(lambda params, images: model.apply({"params": params}, images).sum()))
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *size), jnp.float32)
    exported = jax.export.export(gradient, platforms=["cpu", "tpu"])(params, shape)
    assert_close(jax.jit(exported.call)(params, images), gradient(params, images), 1e-5)


@pytest.mark.parametrize("probability", [0.5, 0.8, 1 - 2**-16])
@pytest.mark.parametrize("shape", [(200_000,), (3, 5, 7, 1001), (8, 14, 14, 128)])
def test_bernoulli_mask(probability, shape):
    mask = np.asarray(ops.bernoulli_mask(jax.random.key(0), probability, shape))
    assert (mask.shape, mask.dtype) == (shape, bool)
    flat = mask.ravel()
    spread = 5 * np.sqrt(probability * (1 - probability) / flat.size)
    assert abs(flat.mean() - probability) < spread + 2**-32
    # Neighbours along every axis, elements far apart and the masks of other keys are independent.
    other = np.asarray(ops.bernoulli_mask(jax.random.key(1), probability, shape)).ravel()
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    pairs = [(flat[:-stride], flat[stride:]) for stride in {*strides, 2, 2**10, 2**16, flat.size // 2}]
    for left, right in [*pairs, (flat, other)]:
        expected = probability**2
        assert abs((left & right).mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / left.size) + 2**-16


def test_masks_of_many_keys_are_independent():
    """Of each element over 4,000 keys, and of each pair of keys over 64 elements: the counts are binomial."""
    keys = jax.random.split(jax.random.key(0), 4000)
    masks = np.asarray(jax.jit(jax.vmap(lambda key: ops.bernoulli_mask(key, 0.5, (64,))))(keys))
    by_element, by_key = masks.sum(0), masks.sum(1)
    assert abs(by_element - 2000).max() < 5 * np.sqrt(1000)
    assert 14 < by_key.var() < 18  # 64/4 = 16, with a standard error of 0.36
    correlations = np.corrcoef(masks.T) - np.eye(64)
    assert np.abs(correlations).max() < 5.5 / np.sqrt(4000)


def test_a_certain_mask():
    for probability in (0, 1):
        assert (np.asarray(ops.bernoulli_mask(jax.random.key(0), probability, (300_000,))) == probability).all()


def test_dropout_scales_what_it_keeps():
    x = jnp.full((100, 1000), 3, jnp.bfloat16)
    apply = lambda train: ops.Dropout(0.25).apply({}, x, train=train, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(apply(False), x)
    dropped = np.asarray(apply(True))
    assert dropped.dtype == jnp.bfloat16
    assert set(np.unique(dropped.astype(np.float32))) == {0.0, 4.0}
    assert abs((dropped == 0).mean() - 0.25) < 0.01
    untouched = ops.Dropout(0.0).apply({}, x, train=True)  # no key needed
    np.testing.assert_array_equal(untouched, x)


def test_forward_mode_through_dropout():
    """The tangent of what is kept is scaled as it is; that of what is dropped is 0."""
    x, rngs = normal(0, (100, 100)), {"dropout": jax.random.key(0)}
    apply = lambda x: ops.Dropout(0.2).apply({}, x, train=True, rngs=rngs)
    values, tangents = jax.jvp(apply, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(tangents, np.where(values == 0, 0, np.float32(1) / np.float32(0.8)))
    np.testing.assert_array_equal(jax.jit(lambda x: jax.linearize(apply, x)[1](jnp.ones_like(x)))(x), tangents)


@partial(outlined, static_argnames=("power",))
def doubled_below_zero(x, power):
    return jnp.where(x > 0, x, 2 * x) ** power  # jnp.where is a function by itself


def between(function):
    """Operations before and behind the function, with which XLA could fuse it."""
    return lambda x: jnp.tanh(function(jnp.tanh(x))).sum()


def calls(function, x):
    return jax.jit(function).lower(x).compile().as_text().count(" call(")


@pytest.mark.parametrize("function", [partial(doubled_below_zero, power=2), partial(cpu.max_pool, window=3, stride=2)])
def test_the_compiled_program_calls_an_outlined_function(function):
    x = normal(0, (2, 9, 9, 3))
    assert calls(between(function), x) == 1
    assert calls(jax.grad(between(function)), x) == 2  # one forward, one backward


def test_the_kernel_gradients_last_transform_is_outlined():
    images, kernel = normal(0, (2, 12, 12, 8)), normal(1, (3, 3, 8, 4))
    assert winograd.pays(kernel.shape, 12)
    gradient = jax.grad(lambda kernel: jnp.tanh(ops.convolution(images, kernel, "SAME")).sum())
    assert calls(gradient, kernel) == 1


def test_a_max_pool_stores_only_its_images():
    images = normal(0, (2, 9, 9, 3))
    _, pull = jax.vjp(partial(cpu.max_pool, window=3, stride=2), images)
    assert [x.shape for x in jax.tree.leaves(pull)] == [images.shape]


@pytest.mark.parametrize("derive", [lambda f: f, jax.grad, jax.hessian, lambda f: jax.vmap(jax.grad(f))])
def test_an_outlined_function_computes_the_same(derive):
    x = normal(0, (4, 5))
    plain = lambda x: jnp.where(x > 0, x, 2 * x) ** 3
    assert_close(derive(between(partial(doubled_below_zero, power=3)))(x), derive(between(plain))(x), 1e-6)


def test_an_outlined_function_runs_in_shard_map():
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    divided = PartitionSpec("device")
    function = partial(doubled_below_zero, power=1)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=divided, out_specs=divided)
    x = normal(0, (4, 5))
    np.testing.assert_array_equal(jax.jit(sharded)(x), np.where(x > 0, x, 2 * x))
