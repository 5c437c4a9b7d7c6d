import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cifar_jax import evaluate
from cifar_jax.checkpoint import Checkpoints, Progress
from cifar_jax.configs import RECIPES
from cifar_jax.io import write_json
from cifar_jax.metrics import RunLog, read_metrics
from cifar_jax.parallel import replicate
from cifar_jax.pretrained import load_pretrained
from cifar_jax.train import train_and_evaluate
from cifar_jax.train_step import create_train_state, cross_entropy
from cifar_jax.trainer import create_history

pytestmark = pytest.mark.usefixtures("direct_convolutions", "no_figures", "use_tiny_dataset")


@pytest.fixture(scope="module")
def finished(tiny_dataset, tmp_path_factory):
    """The folder of a finished run."""
    config = dataclasses.replace(
        RECIPES["quickstart"],
        workdir=str(tmp_path_factory.mktemp("finished") / "run"),
        batch_size=16,
        num_epochs=3,
        learning_rate=0.05,
        holdout=0,
        eval_batch_size=8,
        num_devices=1,
        steps_per_call=1,
    )
    train_and_evaluate(config, tiny_dataset)
    return Path(config.workdir)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run's folder."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_evaluate_agrees_with_training(run, run_command):
    rows = read_metrics(run)
    best = max(reversed(rows), key=lambda row: row.test_accuracy)  # of equally good epochs the last is kept
    results = {}
    for which, row in [("latest", rows[-1]), ("best", best)]:
        status, output, error = run_command(evaluate.main, "--workdir", run, "--checkpoint", which, "--json")
        assert (status, error) == (0, "")
        results[which] = result = json.loads(output)
        assert (result["epoch"], result["num_examples"]) == (row.epoch, 30)
        assert result["test_accuracy"] == pytest.approx(row.test_accuracy, abs=1e-9)
        assert result["test_loss"] == pytest.approx(row.test_loss, rel=1e-5)  # evaluated on 4 devices, trained on 1
    status, output, _ = run_command(evaluate.main, "--workdir", run)
    assert status == 0
    assert output.startswith(f"latest checkpoint, epoch 3: test loss {rows[-1].test_loss:.4f} accuracy")

    status, output, _ = run_command(evaluate.main, "--workdir", run, "--eval-dropout", "--json")
    assert status == 0
    dropped = json.loads(output)
    assert dropped["eval_dropout"] is True
    assert dropped["dropout_rates"] == [0.2, 0.2]
    assert abs(dropped["test_loss"] - results["latest"]["test_loss"]) > 1e-4
    _, output, _ = run_command(evaluate.main, "--workdir", run, "--eval-dropout")
    assert output.startswith("latest checkpoint, epoch 3, dropout 0.2 0.2: test loss")


def test_an_interrupted_epoch_is_named_with_its_steps(tiny_config, monkeypatch, run_command):
    workdir = Path(tiny_config.workdir)
    state, history = create_train_state(tiny_config, 6), create_history(6)
    Checkpoints(workdir).save(*replicate((state, history), jax.local_devices()), Progress(1, 2), RunLog(), None)
    write_json(workdir / "config.json", dataclasses.asdict(tiny_config))
    monkeypatch.setattr(evaluate, "Evaluator", lambda *_: lambda state: {"loss": 1.0, "accuracy": 0.5})
    _, output, _ = run_command(evaluate.main, "--workdir", workdir)
    expected = "latest checkpoint, epoch 1 and 2 steps: test loss 1.0000 accuracy 50.00% of 30 images of digits"
    assert output == f"{expected} (tiny digits)\n"


def test_a_loss_that_is_not_finite_is_one_line(run, run_command, monkeypatch):
    monkeypatch.setattr(evaluate.Evaluator, "__call__", lambda *_: {"loss": float("inf"), "accuracy": 0.1})
    status, output, error = run_command(evaluate.main, "--workdir", run, "--json")
    assert (status, output) == (2, "")
    assert error.count("\n") == 1
    assert "latest checkpoint, epoch 3: the loss is inf" in error
    assert "float32" in error
    _, _, error = run_command(evaluate.main, "--pretrained", "lenet5", "--dtype", "bfloat16")
    assert "lenet5: the loss is inf" in error
    assert "bfloat16" in error


def test_bad_input_is_one_line_and_status_2(tmp_path, run_command, tiny_config):
    status, _, error = run_command(evaluate.main, "--workdir", tmp_path / "nothing")
    assert (status, error.count("\n"), f"{tmp_path}/nothing: " in error) == (2, 1, True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(tiny_config)))
    status, _, error = run_command(evaluate.main, "--workdir", tmp_path / "run")
    assert status == 2
    assert "no latest checkpoint yet" in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_latest_checkpoint_is_passed_over(run, run_command):
    """One warning is printed, and no file in the folder changes."""
    damaged = max((run / "checkpoints" / "3").rglob("*"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = sorted((run / "checkpoints").iterdir())
    status, output, error = run_command(evaluate.main, "--workdir", run, "--json")
    assert (status, error.count("\n"), error.startswith("warning: ")) == (0, 1, True)
    row = read_metrics(run)[1]
    assert (json.loads(output)["epoch"], json.loads(output)["test_accuracy"]) == (2, pytest.approx(row.test_accuracy))
    assert sorted((run / "checkpoints").iterdir()) == before


def test_of_a_run_on_held_out_images_the_test_set_is_said(run, run_command):
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"holdout": 20})
    status, output, error = run_command(evaluate.main, "--workdir", run)
    assert (status, error.count("\n"), "held-out" in error) == (0, 1, True)
    assert "of 30 images" in output


def test_flip_tta_averages_with_the_mirror_image(tmp_path, tiny_dataset, run_command, monkeypatch):
    """The result is the same for mirrored images, and equals that of the averaged logits."""
    flags = ("--pretrained", "lenet5", "--json", "--flip-tta")
    ours = json.loads(run_command(evaluate.main, *flags)[1])
    mirrored = dataclasses.replace(tiny_dataset, test_images=tiny_dataset.test_images[:, :, ::-1])
    monkeypatch.setattr(evaluate, "load_dataset", lambda name, data_dir: mirrored)
    theirs = json.loads(run_command(evaluate.main, *flags)[1])
    plain = json.loads(run_command(evaluate.main, *flags[:-1])[1])
    assert ours["flip_tta"] is True
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-5)
    assert abs(ours["test_loss"] - plain["test_loss"]) > 1e-3
    network, params, preprocess = load_pretrained("lenet5")
    images = tiny_dataset.test_images
    both = [network.apply(params, preprocess(images)) for images in (images, images[:, :, ::-1])]
    expected = cross_entropy((both[0] + both[1]) / 2, jnp.asarray(tiny_dataset.test_labels)).mean()
    assert ours["test_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_in_the_home_folder(run, run_command):
    run.rename(Path.home() / "run")
    assert run_command(evaluate.main, "--workdir", "~/run")[0] == 0
    status, _, error = run_command(evaluate.main, "--workdir", "gs://bucket/run")
    assert (status, error.count("\n"), "bucket/run" in error) == (2, 1, True)
