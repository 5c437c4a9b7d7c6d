from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cifar_jax.errors import UserError
from cifar_jax.models import MODELS, AllCNN, LeNet5, unit_variance


def init(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))


def size_of(model):
    """Of images that a test of it takes: small where it takes them."""
    return (16, 16) if model.RESIZABLE else (32, 32)


@pytest.mark.parametrize(("name", "count"), [("all_cnn", 1_369_738), ("lenet5", 395_006)])
def test_parameter_count(name, count):
    shapes = jax.eval_shape(MODELS[name]().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_float32_parameters_and_logits_whatever_the_computation(name, dtype):
    model = MODELS[name](dtype=dtype)
    shape = lambda images: model.init_with_output(jax.random.key(0), images)
    logits, variables = jax.eval_shape(shape, jnp.zeros((5, 32, 32, 3)))
    assert (logits.shape, logits.dtype) == ((5, 10), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def layer_shapes(model):
    """Returns the layers' output shapes without the batch."""
    method = lambda images: model.init_with_output(jax.random.key(0), images, capture_intermediates=True)
    _, variables = jax.eval_shape(method, jnp.zeros((1, 32, 32, 3)))
    outputs = flatten_dict(variables["intermediates"])
    return {path[0]: value[0].shape[1:] for path, value in outputs.items() if len(path) > 1}


def test_all_cnn_shapes():
    shapes = layer_shapes(AllCNN())
    convolutions = [shapes[f"Conv_{i}"] for i in range(9)]
    expected = [(32, 32, 96)] * 3 + [(15, 15, 192)] + [(13, 13, 192)] * 2 + [(6, 6, 192)] * 2 + [(6, 6, 10)]
    assert convolutions == expected
    assert [shapes[f"Dropout_{i}"] for i in range(3)] == [(32, 32, 96), (15, 15, 96), (6, 6, 192)]


def test_lenet5_shapes():
    shapes = layer_shapes(LeNet5())
    assert [shapes[f"Conv_{i}"] for i in range(2)] == [(28, 28, 32), (10, 10, 64)]
    assert [shapes[f"Dropout_{i}"] for i in range(2)] == [(28, 28, 32), (10, 10, 64)]
    assert [shapes[f"Dense_{i}"] for i in range(3)] == [(200,), (100,), (10,)]


def test_all_cnn_refuses_images_that_the_pools_leave_nothing_of():
    shape = lambda size: jax.eval_shape(AllCNN().init_with_output, jax.random.key(0), jnp.zeros((2, size, 32, 3)))
    assert shape(11)[0].shape == (2, 10)
    with pytest.raises(ValueError, match="11 rows and columns"):
        shape(10)


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_initializer_is_refused(name):
    with pytest.raises(UserError, match=r"'xavier'.* original, he, lsuv, identity"):
        MODELS[name](initializer="xavier").init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_all_cnn_initialisers_are_keras():
    params = init(AllCNN())["params"]
    for name, layer in params.items():
        height, width, features_in, features_out = layer["kernel"].shape
        limit = np.sqrt(6 / (height * width * (features_in + features_out)))  # glorot_uniform
        largest = np.abs(layer["kernel"]).max()
        assert 0.97 * limit < largest <= limit, name
        assert not layer["bias"].any(), name


def test_lenet5_initialisers_are_pytorch():
    params = init(LeNet5())["params"]
    for name, fan_in in {"Conv_0": 75, "Conv_1": 800, "Dense_0": 1600, "Dense_1": 200, "Dense_2": 100}.items():
        bound = fan_in**-0.5
        assert 0.6 * bound < np.abs(params[name]["bias"]).max() <= bound, name
        if name != "Dense_0":
            assert 0.97 * bound < np.abs(params[name]["kernel"]).max() <= bound, name
    xavier = np.asarray(params["Dense_0"]["kernel"])
    deviation = np.sqrt(2 / (1600 + 200))
    np.testing.assert_allclose(xavier.std(), deviation, rtol=0.01)
    assert np.abs(xavier).max() > 4 * deviation  # not truncated


@pytest.mark.usefixtures("direct_convolutions")
@pytest.mark.parametrize("name", MODELS)
def test_dropout_only_in_training(name):
    model = MODELS[name]()
    variables, images = init(model), jax.random.uniform(jax.random.key(1), (2, *size_of(model), 3))
    run = jax.jit(lambda seed: model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(seed)}))
    assert np.abs(run(0) - run(1)).max() > 1e-3
    np.testing.assert_array_equal(run(0), run(0))
    traced = lambda **options: str(jax.make_jaxpr(partial(model.apply, **options))(variables, images))
    assert traced() == traced(train=False)


@pytest.mark.long
@pytest.mark.usefixtures("direct_convolutions")
def test_final_relu_changes_logits_not_parameters():
    plain, published = AllCNN(), AllCNN(final_relu=True)
    variables, images = init(plain), jax.random.uniform(jax.random.key(1), (4, 16, 16, 3))
    assert jax.tree.structure(variables) == jax.tree.structure(init(published))
    assert jax.jit(plain.apply)(variables, images).min() < 0
    assert jax.jit(published.apply)(variables, images).min() >= 0


@pytest.mark.usefixtures("direct_convolutions")
@pytest.mark.parametrize("name", [pytest.param("all_cnn", marks=pytest.mark.long), "lenet5"])
def test_lsuv_gives_every_layers_outputs_unit_variance(name):
    model = MODELS[name](initializer="lsuv")
    images = jax.random.normal(jax.random.key(1), (4, *size_of(model), 3)) * 3 + 1
    params = init(model)["params"]
    kernel = np.asarray(params["Conv_1"]["kernel"]).reshape(-1, params["Conv_1"]["kernel"].shape[-1])
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(kernel.shape[1]), atol=1e-5)
    scaled = unit_variance(model, params, images)
    _, variables = jax.jit(partial(model.apply, capture_intermediates=True))({"params": scaled}, images)
    outputs = {path[0]: value[0] for path, value in flatten_dict(variables["intermediates"]).items() if len(path) > 1}
    for layer in params:
        assert not scaled[layer]["bias"].any()
        np.testing.assert_allclose(outputs[layer].std(), 1, rtol=1e-4)
    assert not np.allclose(scaled["Conv_1"]["kernel"], params["Conv_1"]["kernel"])
