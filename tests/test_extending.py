"""Checks docs/extending.md: another network is one file and one line of a registry."""

import dataclasses
import json
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from small_runs import stop_at

from cifar_jax import convert, evaluate, ops, predict
from cifar_jax.datasets import DATASETS, Dataset
from cifar_jax.errors import UserError
from cifar_jax.models import MODELS, get_model
from cifar_jax.optimizer import create_tx
from cifar_jax.sources import load_run
from cifar_jax.symmetry import mirror, symmetric_start
from cifar_jax.train import parse_command, train_and_evaluate
from cifar_jax.train_step import create_train_state

pytestmark = pytest.mark.usefixtures("direct_convolutions", "compiled_once", "no_figures")


class ElevenConvolutions(nn.Module):
    """A network whose layer names don't sort in the layers' order: Conv_10 sorts before Conv_2."""

    LAYERS: ClassVar[tuple[str, ...]] = tuple(f"Conv_{i}" for i in range(11))
    INPUT_SCALING: ClassVar[str] = "unit"
    RESIZABLE: ClassVar[bool] = True
    CPU_STEPS_PER_CALL: ClassVar[int] = 2

    num_classes: int = 10
    dropout_rates: tuple[float, ...] = (0.1,)
    initializer: str = "original"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.astype(self.dtype)
        conv = partial(ops.Conv, padding="SAME", kernel_init=nn.initializers.he_normal(), dtype=self.dtype)
        x = ops.max_pool(nn.relu(conv(4, 3)(x)), window=2, stride=2)
        x = ops.max_pool(nn.relu(conv(6, 3)(x)), window=2, stride=2)
        x = ops.Dropout(self.dropout_rates[0])(x, train=train)
        for _ in range(8):
            x = nn.relu(conv(6, 3)(x))
        return ops.global_average_pool(conv(self.num_classes, 1)(x))


@pytest.fixture
def eleven(monkeypatch):
    monkeypatch.setitem(MODELS, "eleven", ElevenConvolutions)
    return ElevenConvolutions()


def test_another_network_trains_resumes_and_is_loaded(eleven, tiny_config, tiny_dataset):
    changes = {"model": "eleven", "dropout_rates": (0.1,), "normalization": "batch", "num_epochs": 1}
    config = dataclasses.replace(tiny_config, **changes)
    with pytest.raises(Exception, match=r"saved after .* 2/6 steps"):
        train_and_evaluate(config, tiny_dataset, stop_at(8))
    summary = train_and_evaluate(config, tiny_dataset)
    assert summary["epochs"] == 1
    loaded, state, _ = load_run(config.workdir, "latest")
    assert loaded.model == "eleven"
    assert set(state.eval_params) == set(eleven.LAYERS)
    with pytest.raises(UserError, match="--dropout-rates"):
        dataclasses.replace(config, dropout_rates=(0.1, 0.1))


def test_mirror_symmetry_goes_by_the_order_of_the_layers(eleven):
    params = jax.jit(eleven.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    apply = jax.jit(lambda params, images: eleven.apply({"params": params}, images))
    flipped = apply(params, images[:, :, ::-1])
    scale = float(jnp.abs(flipped).max())
    np.testing.assert_allclose(apply(mirror(params, eleven.LAYERS), images), flipped, atol=1e-5 * scale)
    symmetric = symmetric_start(params, eleven.LAYERS)
    expected = apply(symmetric, images)
    np.testing.assert_allclose(apply(symmetric, images[:, :, ::-1]), expected, atol=1e-5 * scale)
    assert sorted(eleven.LAYERS) != list(eleven.LAYERS)


def test_muon_leaves_the_last_layer_to_adam(eleven, tiny_config):
    """Muon's step of a kernel has the same size for any gradient; Adam's follows its first gradient's sign."""
    changes = {"model": "eleven", "dropout_rates": (0.1,), "optimizer": "muon", "nesterov": False}
    changes["learning_rate"] = 0.01
    config = dataclasses.replace(tiny_config, **changes)
    with jax.numpy_dtype_promotion("standard"):
        params = create_train_state(config, 6).params
        tx = create_tx(config, 6)
        gradients = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype), params)
        updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    like_adam = {name: np.allclose(np.abs(updates[name]["kernel"]), 0.01, rtol=1e-3) for name in params}
    assert like_adam == {name: name == "Conv_10" for name in params}


def test_unknown_names_are_errors(tiny_config):
    with pytest.raises(UserError, match="resnet"):
        get_model("resnet")
    for field in ("model", "dataset"):
        with pytest.raises(UserError, match=f"--{field} resnet"):
            dataclasses.replace(tiny_config, **{field: "resnet"})


def test_another_dataset_has_its_own_classes_and_pixel_statistics():
    assert len(DATASETS["cifar100"].class_names) == len(set(DATASETS["cifar100"].class_names)) == 100
    assert DATASETS["cifar100"].mean != DATASETS["cifar10"].mean


@pytest.fixture(scope="module")
def tiny_cifar100():
    """Returns 100 images per split, one of each class."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(100, dtype=np.int32)
    return Dataset(images[:100], labels, images[100:], labels, DATASETS["cifar100"], "tiny CIFAR-100")


def test_cifar100_from_training_to_other_frameworks(tiny_cifar100, tmp_path, run_command, monkeypatch):
    """The 100 classes, their names and the pixel statistics accompany the weights."""
    monkeypatch.setattr(evaluate, "load_dataset", lambda name, data_dir: {"cifar100": tiny_cifar100}[name])
    flags = ["--dataset", "cifar100", "--batch-size", "50", "--num-epochs", "1", "--num-devices", "1"]
    config = parse_command(["lenet5", *flags, "--workdir", str(tmp_path / "run")])[0]
    with jax.numpy_dtype_promotion("standard"):
        summary = train_and_evaluate(config, tiny_cifar100)
    assert summary["num_parameters"] == 395_006 + 90 * 101
    picture = tmp_path / "picture.png"
    PIL.Image.fromarray(tiny_cifar100.test_images[0]).save(picture)
    files = [tmp_path / "weights.safetensors", tmp_path / "weights.pth", tmp_path / "weights.keras"]
    sources = [["--workdir", tmp_path / "run"]]
    for file in files:
        status, output, _ = run_command(convert.main, tmp_path / "run", file)
        assert status == 0
        needed = {"--input-scaling": "standardized", "--dataset": "cifar100"}
        told = [word for flag, value in needed.items() if f"{flag} {value}" in output for word in (flag, value)]
        assert file.suffix != ".pth" or len(told) == 4
        sources.append(["--weights", file, *told])
    losses, probabilities = [], []
    for source in sources:
        status, output, _ = run_command(evaluate.main, *source, "--json")
        assert status == 0, source
        losses.append(json.loads(output)["test_loss"])
        status, output, _ = run_command(predict.main, picture, *source, "--top", 100, "--json")
        assert status == 0, source
        probabilities.append(json.loads(output)[0]["probabilities"])
    assert losses == pytest.approx([summary["test_loss"]] * 4, rel=1e-5)
    assert all(set(found) == set(tiny_cifar100.class_names) for found in probabilities)
    status, _, errors = run_command(evaluate.main, "--weights", files[1], "--input-scaling", "standardized")
    assert (status, errors.count("\n")) == (2, 1)
    assert "100 outputs" in errors
