import dataclasses
import json

import jax
import pytest

from cifar_jax import evaluate, train
from cifar_jax.checkpoint import Checkpoints, Progress
from cifar_jax.io import write_json
from cifar_jax.metrics import read_metrics
from cifar_jax.parallel import replicate
from cifar_jax.train import train_and_evaluate
from cifar_jax.train_step import create_history, create_train_state


@pytest.fixture
def run(tiny_config):
    train_and_evaluate(tiny_config)
    return train.Path(tiny_config.workdir)


def test_evaluate_agrees_with_training(run, run_command):
    rows = read_metrics(run)
    best = max(reversed(rows), key=lambda row: row.test_accuracy)  # of equals Orbax keeps the last
    results = {}
    for which, row in [("latest", rows[-1]), ("best", best)]:
        status, output, error = run_command(evaluate.main, "--workdir", run, "--checkpoint", which, "--json")
        assert (status, error) == (0, "")
        results[which] = result = json.loads(output)
        assert (result["epoch"], result["num_examples"]) == (row.epoch, 30)
        assert result["test_accuracy"] == pytest.approx(row.test_accuracy, abs=1e-9)
        assert result["test_loss"] == pytest.approx(row.test_loss, rel=1e-5)  # four devices here, one in training
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


def test_an_interrupted_epoch_is_named_with_its_steps(tiny_config, use_tiny_dataset, monkeypatch, run_command):
    workdir = train.Path(tiny_config.workdir)
    state, history = create_train_state(tiny_config, 6), create_history(6)
    Checkpoints(workdir).save(*replicate((state, history), jax.local_devices()), Progress(1, 2), None)
    write_json(workdir / "config.json", dataclasses.asdict(tiny_config))
    monkeypatch.setattr(evaluate, "Evaluator", lambda *_: lambda state: {"loss": 1.0, "accuracy": 0.5})
    _, output, _ = run_command(evaluate.main, "--workdir", workdir)
    assert output == "latest checkpoint, epoch 1 and 2 steps: test loss 1.0000 accuracy 50.00% of 30 images of digits\n"


def test_a_loss_that_is_not_finite_is_one_line(run, run_command, monkeypatch):
    monkeypatch.setattr(evaluate.Evaluator, "__call__", lambda *_: {"loss": float("inf"), "accuracy": 0.1})
    status, output, error = run_command(evaluate.main, "--workdir", run, "--json")
    assert (status, output) == (2, "")
    assert error == "error: latest checkpoint, epoch 3: the loss is inf: the weights are too large for float32\n"
    _, _, error = run_command(evaluate.main, "--pretrained", "lenet5", "--dtype", "bfloat16")
    assert error == "error: lenet5: the loss is inf: the weights are too large for bfloat16\n"


def test_bad_input_is_one_line_and_status_2(tmp_path, run_command, tiny_config):
    status, _, error = run_command(evaluate.main, "--workdir", tmp_path / "nothing")
    assert (status, error.splitlines()) == (
        2,
        [f"error: {tmp_path}/nothing: no config.json, so not the workdir of a run"],
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(tiny_config)))
    status, _, error = run_command(evaluate.main, "--workdir", tmp_path / "run")
    assert status == 2
    assert "no latest checkpoint yet" in error
    assert not (tmp_path / "run" / "checkpoints").exists()
