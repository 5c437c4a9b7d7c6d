import dataclasses
import json
import sys

import numpy as np
import pytest

from benchmarks import early_training
from cifar_jax.configs import RECIPES

pytestmark = pytest.mark.usefixtures("direct_convolutions")


@pytest.mark.long
def test_both_frameworks_take_the_same_steps(monkeypatch, tmp_path, run_command):
    """Without dropout, the only difference, the losses agree, so model, order, augmentation and optimizer agree."""
    recipe = dataclasses.replace(
        RECIPES["all_cnn_reference"], batch_size=4, dropout_rates=(0.0, 0.0, 0.0), learning_rate=0.05
    )
    monkeypatch.setattr(early_training, "RECIPES", {"all_cnn_reference": recipe})
    flags = ("--dataset", "digits", "--num-steps", "5", "--seeds", "3", "--out", tmp_path)
    status, output, _ = run_command(early_training.main, *flags)
    assert status == 0
    assert output.startswith("seed 3 jax")
    content = json.loads((tmp_path / "early_training.json").read_text())
    assert content["dataset"] == "digits"
    runs = content["runs"]
    assert [(run["framework"], run["seed"]) for run in runs] == [("jax", 3), ("pytorch", 3)]
    ours, theirs = (np.array(run["batch_loss"]) for run in runs)
    assert len(ours) == 5
    np.testing.assert_allclose(ours, theirs, atol=2e-4)  # rounding grows with the steps
    assert np.ptp(ours) > 1e-3


def test_without_pytorch(run_command, tmp_path, monkeypatch):
    run_command(early_training.main, "--help")  # tyro imports torch at its first use
    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, errors = run_command(early_training.main, "--dataset", "digits", "--out", tmp_path)
    assert (status, errors) == (2, "error: PyTorch is not installed: pip install 'cifar_jax[parity]'\n")


def test_too_many_steps_are_refused(run_command, tmp_path):
    status, _, errors = run_command(early_training.main, "--dataset", "digits", "--num-steps", "99", "--out", tmp_path)
    assert status == 2
    assert "from 5 to 22" in errors
