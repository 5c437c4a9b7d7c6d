import dataclasses
import json

import pytest

from cifar_jax import evaluate, train
from cifar_jax.metrics import read_metrics
from cifar_jax.train import train_and_evaluate


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
    assert abs(dropped["test_loss"] - results["latest"]["test_loss"]) > 1e-4


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
