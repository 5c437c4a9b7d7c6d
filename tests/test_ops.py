import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import ops

# (images NHWC, kernel HWIO, padding): every shape of both networks in small batches, and odd ones.
CONVOLUTIONS = [
    ((4, 32, 32, 3), (3, 3, 3, 96), "SAME"),
    ((4, 32, 32, 96), (3, 3, 96, 96), "SAME"),
    ((4, 15, 15, 96), (3, 3, 96, 192), "SAME"),
    ((4, 15, 15, 192), (3, 3, 192, 192), "VALID"),
    ((4, 13, 13, 192), (3, 3, 192, 192), "SAME"),
    ((8, 6, 6, 192), (3, 3, 192, 192), "SAME"),
    ((8, 6, 6, 192), (1, 1, 192, 192), "SAME"),
    ((8, 6, 6, 192), (1, 1, 192, 10), "SAME"),
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
POOLS = [((4, 32, 32, 96), 3, 2), ((4, 13, 13, 192), 3, 2), ((4, 28, 28, 32), 2, 2), ((4, 10, 10, 64), 2, 2)]
ODD_POOLS = [((1, 7, 5, 2), 3, 2), ((3, 9, 4, 1), 2, 3), ((2, 5, 6, 3), 4, 1)]


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def value_and_gradients(function, *arguments):
    """The result, and the gradients for a fixed random cotangent, which bfloat16 holds exactly."""
    result = jax.eval_shape(function, *arguments)
    cotangent = normal(9, result.shape).astype(jnp.bfloat16).astype(result.dtype)

    def both(cotangent, *arguments):
        result, vjp = jax.vjp(function, *arguments)
        return result, *vjp(cotangent)

    return jax.jit(both)(cotangent, *arguments)


@pytest.mark.parametrize(("images", "kernel", "padding"), CONVOLUTIONS)
def test_cpu_convolution_is_laxs(images, kernel, padding):
    arguments = normal(0, images), normal(1, kernel)
    actual = value_and_gradients(lambda x, k: ops.cpu_convolution(x, k, padding), *arguments)
    expected = value_and_gradients(lambda x, k: ops.lax_convolution(x, k, padding), *arguments)
    for a, b in zip(actual, expected, strict=True):
        # Sums of up to thousands of products in another order.
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_toom_cook_correlates(taps):
    a, g, b = ops.toom_cook(ops._TILE, taps)
    kernel, data = np.random.default_rng(0).normal(size=taps), np.random.default_rng(1).normal(size=len(b))
    assert len(b) == ops._TILE + taps - 1  # as many products
    np.testing.assert_allclose(a @ (g @ kernel * (b @ data)), np.correlate(data, kernel, "valid"), rtol=1e-12)


WINOGRAD = [c for c in CONVOLUTIONS if 1 < c[1][1] < 6 and c[1][2] > 4 and c[0][2] > 5]


@pytest.mark.parametrize(("images", "kernel", "padding"), WINOGRAD)
def test_winograds_form_is_exact_but_for_rounding(images, kernel, padding):
    """The sums are the same ones in float64; in float32 they are nearly as exact as the plain convolution's."""
    arguments = [np.asarray(normal(seed, shape)) for seed, shape in enumerate((images, kernel))]
    ours = lambda x, k: ops.cpu_convolution(x, k, padding)
    plain = lambda x, k: ops.lax_convolution(x, k, padding)
    assert str(jax.make_jaxpr(ours)(*arguments)).count("= conv_general_dilated[") == kernel[1] + ops._TILE - 1
    in_float32 = value_and_gradients(ours, *arguments), value_and_gradients(plain, *arguments)
    with jax.enable_x64(True):
        doubles = [np.asarray(x, np.float64) for x in arguments]
        exact = value_and_gradients(plain, *doubles)
        for a, b in zip(value_and_gradients(ours, *doubles), exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.abs(b).max())
    for a, p, b in zip(*in_float32, exact, strict=True):
        deviation = lambda x, b=b: float(np.sqrt(np.mean(np.square(x - np.asarray(b)))))
        assert deviation(a) < 5 * deviation(p) + 1e-7 * np.abs(b).max()


def test_winograds_form_is_taken_where_it_saves():
    kernel = normal(0, (3, 3, 8, 8))
    assert [size for size in range(1, 17) if not ops.winograd_pays(kernel, size)] == [1, 2, 5]
    assert not ops.winograd_pays(kernel.astype(jnp.bfloat16), 16)
    assert not ops.winograd_pays(kernel[:, :, :4], 16)
    assert not ops.winograd_pays(normal(0, (3, 1, 8, 8)), 16)
    assert not ops.winograd_pays(normal(0, (3, 6, 8, 8)), 16)  # more points than there are


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_cpu_convolution_in_bfloat16(size, padding):
    images, kernel = normal(0, (16, 15, 15, 8), jnp.bfloat16), normal(1, (size, size, 8, 16), jnp.bfloat16)
    actual = value_and_gradients(lambda x, k: ops.cpu_convolution(x, k, padding), images, kernel)
    exact = value_and_gradients(
        lambda x, k: ops.lax_convolution(x, k, padding), images.astype(jnp.float32), kernel.astype(jnp.float32)
    )
    for a, b in zip(actual, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize(("images", "window", "stride"), POOLS + ODD_POOLS)
@pytest.mark.parametrize("ties", [False, True])
def test_slices_max_pool_is_laxs(images, window, stride, ties):
    x = normal(0, images)
    if ties:  # few values, so that most windows hold equals: their gradient goes to the first
        x = jnp.round(x)
    actual = value_and_gradients(lambda x: ops.slices_max_pool(x, window, stride), x)
    expected = value_and_gradients(lambda x: ops.lax_max_pool(x, window, stride), x)
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "padding"), [(3, "SAME"), (5, "VALID"), (1, "SAME")])
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
    results = [
        jax.value_and_grad(lambda variables, x, layer=layer: (layer.apply(variables, x) ** 2).sum(), (0, 1))(
            variables, images
        )
        for layer in (ours, theirs)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """In bfloat16 a sum of ones stands still at 256."""
    layer, images = ops.Conv(2, 1, "SAME", nn.initializers.ones, dtype=jnp.bfloat16), jnp.ones((4, 32, 32, 1))
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


def test_the_platform_decides(monkeypatch):
    images, kernel = normal(0, (4, 8, 8, 8)), normal(1, (3, 3, 8, 8))
    apply = lambda k: ops.Conv(8, 3, "SAME", nn.initializers.zeros).apply(
        {"params": {"kernel": k, "bias": jnp.zeros(8)}}, images
    )
    gradient = lambda: str(jax.make_jaxpr(jax.grad(lambda k: apply(k).sum()))(kernel))
    pool = lambda: str(jax.make_jaxpr(lambda x: ops.max_pool(x, 2, 2))(images))
    assert "dot_general" in gradient()
    assert "reduce_window" not in pool()
    monkeypatch.setattr(ops, "on_cpu", lambda: False)
    jax.clear_caches()
    assert "dot_general" not in gradient()
    assert "reduce_window" in pool()


@pytest.mark.parametrize("probability", [0.5, 0.8, 1 - 2**-16])
@pytest.mark.parametrize("shape", [(200_000,), (3, 5, 7, 1001)])  # an odd number as well
def test_bernoulli_mask(probability, shape):
    mask = np.asarray(ops.bernoulli_mask(jax.random.key(0), probability, shape))
    assert (mask.shape, mask.dtype) == (shape, bool)
    flat = mask.ravel()
    spread = 5 * np.sqrt(probability * (1 - probability) / flat.size)
    assert abs(flat.mean() - probability) < spread + 2**-17
    # Elements half the array apart share a word: they must not share their fate. Nor may neighbours or keys.
    half = -(-flat.size // 2)
    other = np.asarray(ops.bernoulli_mask(jax.random.key(1), probability, shape)).ravel()
    for left, right in ((flat[:-1], flat[1:]), (flat[: flat.size - half], flat[half:]), (flat, other)):
        expected = probability**2
        assert abs((left & right).mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / left.size) + 2**-16


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
