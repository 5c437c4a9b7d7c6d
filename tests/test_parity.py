"""The parity scripts pass, and each check fails if the code is broken on purpose."""

import dataclasses
import json
import os
import runpy
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from frameworks import ABSENT, REASON

if ABSENT:  # not importorskip, which imports Keras before parity_keras chooses its backend, and skips on the error
    pytest.skip(REASON, allow_module_level=True)

import parity_keras
import parity_pytorch
import torch
from parity import check, command, distributions, forward, ours, predictions, training

from cifar_jax import augment, ops, train_step
from cifar_jax.configs import RECIPES
from cifar_jax.datasets import load_dataset
from cifar_jax.models import MODELS
from cifar_jax.ops import winograd
from cifar_jax.weights import pytorch as pytorch_weights
from cifar_jax.weights.files import Weights, save_weights

SCRIPTS = {"parity_pytorch": parity_pytorch, "parity_keras": parity_keras}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 12, dtype=np.int32)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On a busy machine PyTorch's threads spend most of their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture
def initial_anew():
    """A program compiled by an earlier test must not hide a broken initializer, nor may the broken one remain."""
    caches = (ours.jitted_init, ours.initial_params)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def direct(monkeypatch):
    """Convolutions do not use Winograd's form, which compiles slowly."""
    monkeypatch.setattr(winograd, "pays", lambda kernel, size: False)
    ours.jitted_apply.cache_clear()
    yield
    ours.jitted_apply.cache_clear()


REMEMBERED = {}


def remembered(function):
    """Keeps the function's results for other tests with the same arguments."""

    def call(*arguments):
        leaves = jax.tree.leaves(arguments)
        values = [(leaf.dtype, leaf.tobytes()) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
        with jax.enable_x64(True):
            form = bool(winograd.pays((5, 5, 8, 8), 16))
        key = (function.__name__, form, *values)
        if key not in REMEMBERED:
            REMEMBERED[key] = function(*arguments)
        return REMEMBERED[key]

    return call


def first_result(function):
    """Makes the function return its first result every time."""
    results = []

    def call(*arguments, **options):
        results[:] = results or [function(*arguments, **options)]
        return results[0]

    return call


def known_params(model, key):
    """Returns the initial params of a network for seed 0, which are compiled once."""
    (name,) = (name for name, network in MODELS.items() if type(model) is network)
    return jax.tree.map(jnp.asarray, ours.initial_params(name))


@pytest.fixture
def quick_trainer(monkeypatch):
    """Trajectories use one device and the known parameters."""
    monkeypatch.setattr(training, "dividing_devices", lambda count: jax.local_devices()[:1])
    monkeypatch.setattr(train_step, "_init", known_params)


@pytest.fixture
def our_side(monkeypatch, quick_trainer):
    """Computes JAX's logits, gradients and trajectories once for all tests.

    Winograd's form compiles slowly, so only LeNet-5 in float64 uses it. test_ops.py compares the forms for all shapes.
    """
    pays = winograd.pays
    only_lenet5 = lambda kernel, size: kernel[1] == 5 and jax.config.jax_enable_x64 and pays(kernel, size)
    monkeypatch.setattr(winograd, "pays", only_lenet5)
    ours.jitted_apply.cache_clear()
    for module, name in ((training, "jax_trajectories"), (ours, "jax_loss_and_gradients"), (ours, "jax_logits")):
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))
    yield
    ours.jitted_apply.cache_clear()


def failed(checks):
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_the_script_passes(script, tmp_path, run_command, our_side):
    files = [tmp_path / f"{model}.safetensors" for model in pytorch_weights.TWINS]
    for model, path in zip(pytorch_weights.TWINS, files):
        save_weights(path, Weights(model, ours.initial_params(model), "unit"))
    sizes = {"images": 8, "steps": 3, "batch-size": 2, "seeds": 2, "test-images": 20}
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    flags += ["--dataset", "digits", "--layers", "--json", "--out", tmp_path / "out.json", "--weights", *files]
    main = lambda: command.run(f"scripts/{script}.py", ("torch",), SCRIPTS[script].checks)
    status, output, errors = run_command(main, *flags)
    content = json.loads(output)
    assert [check for check in content["checks"] if not check["passed"]] == []
    assert (status, errors) == (0, "")
    assert content == json.loads((tmp_path / "out.json").read_text())
    assert content["passed"]
    names = " ".join(check["name"] for check in content["checks"])
    for expected in ("logits", "activations of Conv_8", "gradients, float64", "initial kernel 9", "100 fed gradients",
                     "3 free steps", "differing arg-max of 20", "4× too small loss"):  # fmt: skip
        assert expected in names
    assert ("with dropout on" in names) == (script == "parity_pytorch")
    assert ("width shift" in names) == (script == "parity_keras")


def test_a_failure_is_exit_status_1_and_named(run_command, tmp_path):
    checks = lambda arguments, dataset: [check.Check("good", 0.0, 0.0, ""), check.Check("bad", np.nan, 1.0, "")]
    flags = ("--dataset", "digits", "--out", tmp_path / "out.json")
    status, output, _ = run_command(lambda: command.run("scripts/x.py", (), checks), *flags)
    assert status == 1
    assert json.loads((tmp_path / "out.json").read_text())["checks"][1]["error"] is None  # JSON has no NaN
    assert output.splitlines()[-2:] == ["bad        nan   1.0e+00 FAIL", "1 of 2 checks passed"]


def test_a_nan_in_any_tensor_is_a_difference():
    assert np.isnan(check.difference({"a": 0.0, "b": np.nan}, {"a": 0.0, "b": 0.0}))


def test_bad_input_is_one_line(run_command, tmp_path):
    bad = [("--dataset", "mnist"), ("--dataset", "digits", "--weights", "absent.pth"), ("--imags", "3")]
    bad += [("--seeds", "0"), ("--batch-size", "0"), ("--out", "absent/x.json"), ("--out", tmp_path)]
    bad += [("--dataset", "digits", "--steps", "400")]  # 1,600 images, but there are 1,437
    params = jax.jit(MODELS["lenet5"](num_classes=3).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    save_weights(tmp_path / "three.safetensors", Weights("lenet5", jax.device_get(params), "unit"))
    bad += [("--dataset", "digits", "--weights", tmp_path / "three.safetensors"), ("--dataset", "cifar100")]
    for arguments in bad:
        status, _, errors = run_command(lambda: command.run("scripts/x.py", (), parity_pytorch.checks), *arguments)
        assert status == 2
        assert errors.count("\n") == 1


@pytest.mark.parametrize(("script", "package"), [("parity_pytorch", "torch"), ("parity_keras", "keras")])
def test_a_framework_that_is_not_installed_is_one_line(script, package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "parity"]:
        monkeypatch.delitem(sys.modules, name)  # imported again, as in a new process
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(SCRIPTS[script].__file__)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {package} is not installed: pip install -e '.[parity]'\n"


def test_wrong_flatten_order_is_seen(monkeypatch, batch, direct):
    """PyTorch's fc1 is converted without the permutation from NCHW to NHWC."""
    convert = pytorch_weights.params_to_pytorch

    def wrong(params):
        return convert(params) | {"fullyc1.weight": np.asarray(params["Dense_0"]["kernel"]).T.copy()}

    monkeypatch.setattr(pytorch_weights, "params_to_pytorch", wrong)
    checks = forward.check_logits(parity_pytorch.PyTorchReference, "lenet5", batch[0])
    assert failed(checks)
    assert checks[0].error > 1e-3
    name, *_ = forward.check_activations(parity_pytorch.PyTorchReference, "lenet5", batch[0])[2:3]
    assert not name.passed  # --layers points at the first dense layer
    assert failed(forward.check_activations(parity_pytorch.PyTorchReference, "lenet5", batch[0]))[0].endswith("Dense_0")


def test_the_rate_outside_keras_velocity_is_seen(monkeypatch):
    config = RECIPES["all_cnn_reference"]
    assert not failed(training.check_optimizer(config, parity_keras.fed_optimizer))
    rate = lambda step: 0.01 / (1 + 5e-5 * jnp.asarray(step, jnp.float32))
    monkeypatch.setattr(training, "create_tx", lambda config, steps_per_epoch: optax.sgd(rate, 0.9, nesterov=True))
    assert len(failed(training.check_optimizer(config, parity_keras.fed_optimizer))) == 2


def first_steps(dataset):
    """The images, labels and batch size of the trajectories in test_the_script_passes."""
    return dataset.train_images[:6], dataset.train_labels[:6], 2


def test_wrong_momentum_is_seen(digits, our_side):
    config = RECIPES["lenet5_reference"]
    wrong = dataclasses.replace(config, momentum=0.8)
    theirs = lambda config, *args: parity_pytorch.fed_optimizer(wrong, *args)
    assert len(failed(training.check_optimizer(config, theirs))) == 2

    class Other(parity_pytorch.PyTorchReference):
        def train(self, config, batches):
            return super().train(wrong, batches)

    assert failed(training.check_trajectory(Other, config, *first_steps(digits)))


def test_truncated_initialisers_are_seen(monkeypatch, initial_anew):
    """JAX's glorot_normal and Flax' default, lecun_normal, are truncated."""
    scaling = nn.initializers.variance_scaling

    def truncated(scale, mode, distribution):
        return scaling(scale, mode, "truncated_normal" if distribution == "normal" else distribution)

    monkeypatch.setattr(nn.initializers, "variance_scaling", truncated)
    names = failed(distributions.check_initial(parity_pytorch.PyTorchReference, "lenet5", 2))
    assert names
    assert all("initial kernel 3" in name for name in names)
    monkeypatch.undo()
    ours.jitted_init.cache_clear()
    ours.initial_params.cache_clear()
    monkeypatch.setattr(nn.initializers, "glorot_uniform", nn.initializers.glorot_normal)
    assert len(failed(distributions.check_initial(parity_keras.KerasReference, "all_cnn", 1))) >= 9


def test_swapped_shift_axes_are_seen(monkeypatch, batch):
    images, _ = batch
    assert not failed(parity_keras.check_augmentation(images))
    affine = augment.affine
    monkeypatch.setattr(augment, "affine", lambda image, angle, y, x: affine(image, angle, x, y))
    assert failed(parity_keras.check_augmentation(images)) == [
        "augmentation of 12 images, float32",
        "augmentation of 12 images, float64",
    ]
    monkeypatch.undo()
    draw = augment.draw_affine
    monkeypatch.setattr(augment, "draw_affine", lambda key, degrees, shift: draw(key, degrees, 1.1 * shift))
    names = failed(parity_keras.check_augmentation(images))
    assert {name.split(",")[0] for name in names} == {"augmentation: height shift", "augmentation: width shift"}


REFERENCES = {"pytorch": parity_pytorch.PyTorchReference, "keras": parity_keras.KerasReference}


@pytest.mark.parametrize(
    ("model", "reference"), [("lenet5", "pytorch"), pytest.param("all_cnn", "keras", marks=pytest.mark.long)]
)
def test_a_wrong_layer_is_seen(monkeypatch, tmp_path, batch, model, reference, direct):
    """The max pool's result is 0.1 % too large."""
    images, labels = batch[0][:1], batch[1][:1]
    path, other = tmp_path / "weights.safetensors", REFERENCES[reference]
    save_weights(path, Weights(model, ours.initial_params(model), "unit"))
    pool = ops.max_pool
    monkeypatch.setattr(ops, "max_pool", lambda x, **size: pool(x, **size) * jnp.asarray(1.001, x.dtype))
    checks = forward.check_logits(other, model, images)
    checks += forward.check_gradients(other, model, images, labels)
    checks += predictions.check_predictions(other, path, images, labels)
    names = " ".join(failed(checks))
    expected = ["logits", "gradients, float64", "loss, float64"]
    # The logits of an initial All-CNN are near 0, so 0.1 % of them is below the loss's rounding.
    expected += ["gradients, float32", "mean loss", "4× too small loss"] if model == "lenet5" else []
    for part in expected:
        assert part in names


@pytest.mark.parametrize("model", list(pytorch_weights.TWINS))
def test_a_lost_gradient_is_seen(monkeypatch, digits, model, our_side):
    """One tensor's gradient is zero, also in float32, where All-CNN's tolerance is widest."""
    compute = ours.jax_loss_and_gradients

    def lossy(*args):
        loss, gradients = compute(*args)
        return loss, gradients | {"Conv_0": gradients["Conv_0"] | {"bias": 0 * gradients["Conv_0"]["bias"]}}

    monkeypatch.setattr(ours, "jax_loss_and_gradients", lossy)
    images, labels = digits.test_images[:2], digits.test_labels[:2]  # as in test_the_script_passes
    names = failed(forward.check_gradients(parity_pytorch.PyTorchReference, model, images, labels))
    assert [name.split(",")[1] for name in names] == [" float32", " float64", " float64"]


def test_a_trajectory_with_dropout_left_on_is_seen(monkeypatch, digits, direct, quick_trainer):
    monkeypatch.setattr(training, "without_randomness", lambda config: config)
    config = RECIPES["lenet5_reference"]
    assert failed(training.check_trajectory(parity_pytorch.PyTorchReference, config, *first_steps(digits)))


def test_another_arg_max_is_seen(tmp_path, batch, direct):
    """Another class has the largest logit, for images without ties."""

    class Rolled(parity_pytorch.PyTorchReference):
        def logits(self, images, dropout=False):
            return super().logits(images, dropout).roll(1, dims=-1)

    path = tmp_path / "lenet5.safetensors"
    save_weights(path, Weights("lenet5", ours.initial_params("lenet5"), "symmetric"))
    names = failed(predictions.check_predictions(Rolled, path, *batch))
    assert any("differing arg-max" in name for name in names)


def test_predictions_of_a_network_with_a_final_relu(tmp_path, batch, direct):
    path = tmp_path / "all_cnn.safetensors"
    save_weights(path, Weights("all_cnn", ours.initial_params("all_cnn"), "unit", final_relu=True))
    for reference in REFERENCES.values():
        assert failed(predictions.check_predictions(reference, path, batch[0][:2], batch[1][:2])) == []


def test_other_biases_and_flips_are_seen(monkeypatch, batch, initial_anew):
    uniform = jax.random.uniform
    monkeypatch.setattr(jax.random, "uniform", lambda *args, **kwargs: 1.1 * uniform(*args, **kwargs))
    names = failed(distributions.check_initial(parity_pytorch.PyTorchReference, "lenet5", 4))
    assert any("bias" in name and "bounds" in name for name in names)
    monkeypatch.undo()
    monkeypatch.setattr(augment, "random_flip", lambda key, image: image)
    assert failed(parity_keras.check_augmentation(batch[0])) == ["augmentation: share of flips"]


def test_keras_computes_on_the_cpu():
    """Even where PyTorch finds a GPU."""
    assert os.environ["KERAS_TORCH_DEVICE"] == "cpu"


def test_dropout_at_test_is_seen_to_differ(tmp_path, batch, monkeypatch, direct):
    """The reference tests without dropout, on weights for which dropout matters."""

    class NoDropout(parity_pytorch.PyTorchReference):
        def logits(self, images, dropout=False):
            return super().logits(images)

    images = np.repeat(batch[0], 10, axis=0)
    params = ours.initial_params("lenet5")
    top = np.asarray(ours.jax_logits("lenet5", params, ours.scaled(images, "lenet5"))).argmax(-1).astype(np.int32)
    path = tmp_path / "lenet5.safetensors"
    save_weights(path, Weights("lenet5", params, "symmetric"))
    for name in ("load_file", "Evaluator"):  # compiled once for both references
        monkeypatch.setattr(predictions, name, first_result(getattr(predictions, name)))
    assert not failed(predictions.check_dropout_at_test(parity_pytorch.PyTorchReference, path, images, top))
    assert failed(predictions.check_dropout_at_test(NoDropout, path, images, top))
