"""The parity scripts pass, and each check fails when the code is broken on purpose."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import parity_keras
import parity_pytorch
import pytest

from cifar_jax import augmentation, models
from cifar_jax.configs import RECIPES
from cifar_jax.interop import pytorch as interop_pytorch
from cifar_jax.interop.files import Weights, save_weights
from cifar_jax.models import MODELS

SCRIPTS = {"parity_pytorch": parity_pytorch, "parity_keras": parity_keras}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 12, dtype=np.int32)


@pytest.fixture(autouse=True)
def _compiled_anew():
    """A broken initialiser must not be hidden by what an earlier test compiled, nor stay behind."""
    caches = (parity.jitted_init, parity.initial_params)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def failed(checks):
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_the_script_passes(script, tmp_path, run_command):
    files = [tmp_path / f"{model}.safetensors" for model in MODELS]
    for model, path in zip(MODELS, files):
        save_weights(path, Weights(model, parity.initial_params(model), "unit"))
    sizes = {"images": 4, "steps": 3, "batch-size": 4, "seeds": 2, "test-images": 40}
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    flags += ["--dataset", "digits", "--layers", "--json", "--out", tmp_path / "out.json", "--weights", *files]
    main = lambda: parity.run(f"scripts/{script}.py", ("torch",), SCRIPTS[script].checks)
    status, output, errors = run_command(main, *flags)
    content = json.loads(output)
    assert [check for check in content["checks"] if not check["passed"]] == []
    assert (status, errors) == (0, "")
    assert content == json.loads((tmp_path / "out.json").read_text())
    assert content["passed"]
    names = " ".join(check["name"] for check in content["checks"])
    for expected in ("logits", "activations of Conv_8", "gradients, float64", "initial kernel 9", "100 fed gradients",
                     "3 free steps", "differing arg-max of 40", "4× too small loss"):  # fmt: skip
        assert expected in names
    assert ("accuracy with dropout on" in names) == (script == "parity_pytorch")
    assert ("width shift" in names) == (script == "parity_keras")


def test_a_failure_is_exit_status_1_and_named(run_command):
    checks = lambda arguments, dataset: [parity.Check("good", 0.0, 0.0, ""), parity.Check("bad", np.nan, 1.0, "")]
    status, output, _ = run_command(lambda: parity.run("scripts/x.py", (), checks), "--dataset", "digits")
    assert status == 1
    assert output.splitlines()[-2:] == ["bad        nan   1.0e+00 FAIL", "1 of 2 checks passed"]


def test_a_nan_in_any_tensor_is_a_difference():
    assert np.isnan(parity.difference({"a": 0.0, "b": np.nan}, {"a": 0.0, "b": 0.0}))


def test_bad_input_is_one_line(run_command):
    for arguments in (("--dataset", "mnist"), ("--dataset", "digits", "--weights", "absent.pth"), ("--imags", "3")):
        status, _, errors = run_command(lambda: parity.run("scripts/x.py", (), parity_pytorch.checks), *arguments)
        assert status == 2
        assert errors.count("\n") == 1


def test_wrong_flatten_order_is_seen(monkeypatch, batch):
    """PyTorch's fc1 taken over without the permutation of NCHW to NHWC."""
    convert = interop_pytorch.params_to_pytorch

    def wrong(params):
        return convert(params) | {"fullyc1.weight": np.asarray(params["Dense_0"]["kernel"]).T.copy()}

    monkeypatch.setattr(interop_pytorch, "params_to_pytorch", wrong)
    checks = parity.check_logits(parity_pytorch.PyTorchReference, "lenet5", batch[0])
    assert failed(checks)
    assert checks[0].error > 1e-3
    name, *_ = parity.check_activations(parity_pytorch.PyTorchReference, "lenet5", batch[0])[2:3]
    assert not name.passed  # --layers points at the first dense layer
    assert failed(parity.check_activations(parity_pytorch.PyTorchReference, "lenet5", batch[0]))[0].endswith("Dense_0")


def test_the_rate_outside_keras_velocity_is_seen(monkeypatch):
    config = RECIPES["all_cnn_reference"]
    assert not failed(parity.check_optimizer(config, parity_keras.fed_optimizer))
    rate = lambda step: 0.01 / (1 + 5e-5 * jnp.asarray(step, jnp.float32))
    monkeypatch.setattr(parity, "create_tx", lambda config, steps_per_epoch: optax.sgd(rate, 0.9, nesterov=True))
    assert len(failed(parity.check_optimizer(config, parity_keras.fed_optimizer))) == 2


def test_wrong_momentum_is_seen(batch):
    config = dataclasses.replace(RECIPES["lenet5_reference"], momentum=0.8)
    theirs = lambda config, *args: parity_pytorch.fed_optimizer(RECIPES["lenet5_reference"], *args)
    assert len(failed(parity.check_optimizer(config, theirs))) == 2
    images, labels = batch

    class Other(parity_pytorch.PyTorchReference):
        def train(self, config, batches):
            return super().train(RECIPES["lenet5_reference"], batches)

    assert failed(parity.check_trajectory(Other, config, images, labels, 4))


def test_truncated_initialisers_are_seen(monkeypatch):
    """JAX's glorot_normal truncates; so does Flax' default, lecun_normal."""
    scaling = nn.initializers.variance_scaling

    def truncated(scale, mode, distribution):
        return scaling(scale, mode, "truncated_normal" if distribution == "normal" else distribution)

    monkeypatch.setattr(models.nn.initializers, "variance_scaling", truncated)
    names = failed(parity.check_initial(parity_pytorch.PyTorchReference, "lenet5", 2))
    assert names
    assert all("initial kernel 3" in name for name in names)
    monkeypatch.undo()
    parity.jitted_init.cache_clear()
    parity.initial_params.cache_clear()
    monkeypatch.setattr(models.nn.initializers, "glorot_uniform", nn.initializers.glorot_normal)
    assert len(failed(parity.check_initial(parity_keras.KerasReference, "all_cnn", 1))) >= 9


def test_swapped_shift_axes_are_seen(monkeypatch, batch):
    images, _ = batch
    assert not failed(parity_keras.check_augmentation(images))
    affine = augmentation.affine
    monkeypatch.setattr(augmentation, "affine", lambda image, angle, y, x: affine(image, angle, x, y))
    assert failed(parity_keras.check_augmentation(images)) == ["augmentation of 12 images"]
    monkeypatch.undo()
    draw = augmentation.draw_affine
    monkeypatch.setattr(augmentation, "draw_affine", lambda key, degrees, shift: draw(key, degrees, 1.1 * shift))
    names = failed(parity_keras.check_augmentation(images))
    assert {name.split(",")[0] for name in names} == {"augmentation: height shift", "augmentation: width shift"}


def test_a_wrong_layer_is_seen_in_gradients_and_predictions(monkeypatch, tmp_path, batch):
    """Another dropout-free network: no ReLU after the first convolution's output is doubled."""
    images, labels = batch
    save_weights(tmp_path / "lenet5.safetensors", Weights("lenet5", parity.initial_params("lenet5"), "symmetric"))
    pool = models.ops.max_pool
    average = lambda x, window, stride: pool(x, window, stride) * jnp.asarray(1.001, x.dtype)
    monkeypatch.setattr(models.ops, "max_pool", average)
    jax.clear_caches()
    reference = parity_pytorch.PyTorchReference
    assert len(failed(parity.check_gradients(reference, "lenet5", images, labels))) == 4
    path = tmp_path / "lenet5.safetensors"
    assert any("mean loss" in name for name in failed(parity.check_predictions(reference, path, images, labels)))
    jax.clear_caches()


def test_dropout_at_test_is_seen_to_differ(tmp_path, batch):
    """A reference that does not drop out at the test, on weights for which that matters."""

    class NoDropout(parity_pytorch.PyTorchReference):
        def logits(self, images, dropout=False):
            return super().logits(images) if not dropout else -super().logits(images)

    images = np.repeat(batch[0], 20, axis=0)
    params = parity.initial_params("lenet5")
    top = np.asarray(parity.jax_logits("lenet5", params, parity.scaled(images, "lenet5"))).argmax(-1).astype(np.int32)
    save_weights(tmp_path / "lenet5.safetensors", Weights("lenet5", params, "symmetric"))
    path = tmp_path / "lenet5.safetensors"
    assert not failed(parity.check_dropout_at_test(parity_pytorch.PyTorchReference, path, images, top))
    assert failed(parity.check_dropout_at_test(NoDropout, path, images, top))
