import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from cifar_jax import compare
from cifar_jax.configs import RECIPES
from cifar_jax.io import write_json
from cifar_jax.metrics import EpochMetrics, RunLog


@pytest.fixture
def make_run(tmp_path):
    """Writes a run's files: its name, the accuracy after each epoch, and changed settings."""

    def make(name, accuracies, **changes):
        (tmp_path / name).mkdir()
        config = dataclasses.replace(RECIPES["quickstart"], workdir=name, num_epochs=3, **changes)
        write_json(tmp_path / name / "config.json", dataclasses.asdict(config))
        rows = [EpochMetrics(i, 1.5, 0.25, 1.25, a, 0.01, 60.0, 100.0) for i, a in enumerate(accuracies, 1)]
        RunLog(rows, np.zeros(9, np.float32)).write(tmp_path / name)
        return tmp_path / name

    return make


def test_seeds_are_averaged_and_settings_are_told(make_run, run_command, tmp_path):
    runs = [
        make_run("a", [0.5, 0.9, 0.8], seed=0),
        make_run("b", [0.5, 0.6, 0.7], seed=1, num_devices=1),  # which does not change the recipe
        make_run("c", [0.4, 0.5], seed=0, learning_rate=0.3),  # still training
    ]
    status, output, error = run_command(compare.main, *runs, "--json", "--out", tmp_path / "curves.png")
    assert (status, error) == (0, "")
    result = json.loads(output)
    assert [row["epoch"] for row in result["runs"]] == [3, 3, 2]
    assert [row["accuracy"] for row in result["runs"]] == [0.8, 0.7, 0.5]
    assert result["runs"][0]["best_accuracy"] == 0.9
    assert result["runs"][0]["seconds"] == 180
    assert [set(row["settings"]) for row in result["runs"]] == [{"seed", "learning_rate", "num_devices"}] * 3
    assert result["runs"][2]["settings"]["learning_rate"] == 0.3
    (seeds,) = result["seeds"]
    assert seeds["runs"] == [str(run) for run in runs[:2]]
    assert (seeds["mean_accuracy"], seeds["std_accuracy"]) == (pytest.approx(0.75), pytest.approx(0.05 * 2**0.5))
    with PIL.Image.open(tmp_path / "curves.png") as figure:
        assert figure.size[0] > 500

    _, output, _ = run_command(compare.main, *runs)
    lines = output.splitlines()
    assert len(lines) == 1 + 3 + 1
    assert lines[1].split()[:4] == [str(runs[0]), "3/3", "test", "80.00"]
    assert "75.00 ± 7.07" in lines[4]


def test_normalised_runs_on_other_numbers_of_devices_are_other_trainings(make_run, run_command):
    """Each device normalises its own part of the batch."""
    settings = [{"seed": 0, "num_devices": 1}, {"seed": 1, "num_devices": 1}, {"seed": 2, "num_devices": 2}]
    runs = [
        make_run(f"run{i}", [0.5, 0.5, 0.8], normalization="batch", **changes) for i, changes in enumerate(settings)
    ]
    (seeds,) = json.loads(run_command(compare.main, *runs, "--json")[1])["seeds"]
    assert seeds["runs"] == [str(run) for run in runs[:2]]


def test_a_seed_counts_once(make_run, run_command):
    runs = [make_run("a", [0.5, 0.5, 0.8], seed=0), make_run("b", [0.5, 0.5, 0.9], seed=0)]
    assert json.loads(run_command(compare.main, *runs, "--json")[1])["seeds"] == []
    other = make_run("c", [0.5, 0.5, 0.6], seed=1)
    (seeds,) = json.loads(run_command(compare.main, *runs, other, "--json")[1])["seeds"]
    assert (seeds["runs"], seeds["mean_accuracy"]) == ([str(runs[0]), str(other)], pytest.approx(0.7))


def test_held_out_images_are_told_apart(make_run, run_command):
    _, output, _ = run_command(compare.main, make_run("a", [0.5]), make_run("b", [0.5], holdout=100))
    assert [line.split()[2] for line in output.splitlines()[1:]] == ["test", "held-out"]


def test_bad_input_is_one_line_and_status_2(make_run, tmp_path, run_command):
    run, new, restarted = make_run("a", [0.5]), make_run("new", []), make_run("restarted", [0.5])
    (restarted / "restart1").mkdir()
    (tmp_path / "empty").mkdir()
    for arguments, text in {
        (): "two or more",
        (run,): "two or more",
        (run, tmp_path / "empty"): "config.json",
        (run, tmp_path / "none"): "none",
        (run, new): "no epoch",
        (run, restarted): "restart1",
        (run, run, "--out", tmp_path / "nowhere" / "x.png"): "x.png",
    }.items():
        status, output, error = run_command(compare.main, *arguments)
        assert (status, output, error.count("\n")) == (2, "", 1), arguments
        assert text in error
