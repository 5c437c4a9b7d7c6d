"""What only a GPU can show, in a minute: CIFAR_JAX_TEST_PLATFORMS=cuda,cpu pytest -n 0 -m gpu"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import assert_trees_close, stop_at

from cifar_jax import load_pretrained
from cifar_jax.configs import RECIPES
from cifar_jax.environment import describe_environment
from cifar_jax.models import MODELS
from cifar_jax.outcomes import Interrupted
from cifar_jax.parallel import select_devices
from cifar_jax.train import train_and_evaluate
from cifar_jax.trainer import Trainer

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("there is no GPU, or CIFAR_JAX_TEST_PLATFORMS does not name it")
    # Products in TensorFloat-32 would be less exact, and optax' Muon needs the standard promotion.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_and_gradients_are_those_of_the_cpu(name):
    model = MODELS[name](dropout_rates=(0.0,) * len(MODELS[name]().dropout_rates))
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)

    def compute(images):
        params = model.init(jax.random.key(0), images)
        loss = lambda params: (model.apply(params, images, train=True) ** 2).mean()
        return model.apply(params, images), jax.grad(loss)(params)

    results = []
    for platform in ("gpu", "cpu"):
        with jax.default_device(jax.devices(platform)[0]):
            results.append(jax.device_get(jax.jit(compute)(jnp.asarray(images))))
    assert_trees_close(results[0][0], results[1][0], 1e-4)
    assert_trees_close(results[0][1], results[1][1], 1e-2)  # near-ties of ReLU and maximum


@pytest.mark.parametrize("recipe", ["lenet5", "all_cnn_fast"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_lower_the_loss(recipe, dtype, tiny_dataset):
    config = dataclasses.replace(RECIPES[recipe], dtype=dtype, batch_size=16, num_devices=1, warmup_fraction=0.0)
    images, labels = np.tile(tiny_dataset.train_images, (4, 1, 1, 1)), np.tile(tiny_dataset.train_labels, 4)
    trainer = Trainer(config, images, labels, select_devices(config))
    losses = []
    for _ in range(4):
        trainer.run_epoch(0, 0)
        losses.append(trainer.epoch_metrics()["loss"])
    assert losses[-1] < losses[0] - 0.2


def test_a_run_stops_and_resumes(tmp_path, tiny_config, tiny_dataset):
    config = dataclasses.replace(tiny_config, num_epochs=2)
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tiny_dataset, stop_at(8))
    assert train_and_evaluate(config, tiny_dataset)["epochs"] == 2


CPU_RUN = """
import contextlib, dataclasses, itertools, sys
from cifar_jax.configs import RECIPES
from cifar_jax.outcomes import Interrupted
from cifar_jax.train import train_and_evaluate

calls = itertools.count()
config = dataclasses.replace(RECIPES["quickstart"], workdir=sys.argv[1], num_epochs=2, num_devices=1, steps_per_call=1)
with contextlib.suppress(Interrupted):
    train_and_evaluate(config, stop=lambda: next(calls) == 40)
"""


def test_a_run_that_a_cpu_began_goes_on(tmp_path, capsys):
    workdir = str(tmp_path / "run")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", CPU_RUN, workdir], cwd=ROOT, env=environment, check=True)
    config = dataclasses.replace(RECIPES["quickstart"], workdir=workdir, num_epochs=2, num_devices=1)
    train_and_evaluate(config)
    assert "resuming after 0 epochs" in capsys.readouterr().out
    losses = np.load(tmp_path / "run" / "batch_loss.npy")
    assert len(losses) == 90
    assert losses[40:50].mean() < losses[:10].mean() - 0.2


def test_released_networks_load():
    model, variables, preprocess = load_pretrained("lenet5")
    logits = model.apply(variables, preprocess(np.zeros((2, 32, 32, 3), np.uint8)))
    assert logits.devices() == {jax.devices("gpu")[0]}


def test_hardware_is_named():
    assert "NVIDIA" in describe_environment(jax.devices())["hardware"]
