import dataclasses
import os
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from cifar_jax import plots
from cifar_jax.errors import UserError
from cifar_jax.metrics import EpochMetrics, RunLog

ROW = EpochMetrics(1, 1.5, 0.25, 1.25, 0.5, 0.01, 2.0, 100.0)
NAMES = ("accuracy.png", "loss.png", "batch_loss.png")


@pytest.fixture
def run(tmp_path):
    """A run of one epoch of 9 steps."""
    RunLog([ROW], np.linspace(2, 1, 9, dtype=np.float32)).write(tmp_path)
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """Collects the axes of every figure, in order."""
    axes, subplots = [], Figure.subplots

    def recorded(self, *arguments, **options):
        axes.append(subplots(self, *arguments, **options))
        return axes[-1]

    monkeypatch.setattr(Figure, "subplots", recorded)
    return axes


def test_a_run_of_one_epoch_is_seen(run, drawn):
    """A curve of one point has a marker. The batch loss has several points."""
    plots.plot_run(run)
    accuracy, loss, batch_loss = drawn
    assert [line.get_marker() for line in (*accuracy.lines, *loss.lines)] == ["."] * 4
    assert [line.get_ydata()[0] for line in (*accuracy.lines, *loss.lines)] == [0.25, 0.5, 1.5, 1.25]
    np.testing.assert_allclose(batch_loss.lines[0].get_xydata()[[0, -1]], [(5, 1.75), (9, 1.25)])


@pytest.mark.parametrize(
    ("config", "label"),
    [(None, "test"), ('{"holdout": 0}', "test"), ('{"holdout": 5}', "held-out"), ("damaged", "test")],
)
def test_a_curve_says_what_was_tested(config, label, run, drawn):
    if config is not None:
        (run / "config.json").write_text(config)
    plots.plot_run(run)
    assert drawn[1].lines[1].get_label() == label


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "module://nowhere", "qtagg", "nonsense"]
)
def test_the_users_backend_does_not_matter(backend, run, monkeypatch):
    """Commands in a notebook inherit its MPLBACKEND, whose module may be missing."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the variable during its import
    monkeypatch.setenv("MPLBACKEND", backend)
    plots.plot_run(run)
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in NAMES)
    assert os.environ["MPLBACKEND"] == backend
    if backend.startswith("module:"):  # the user's own figures go there: matplotlib reads the variable only once
        assert sys.modules["matplotlib"].rcParams._get_backend_or_none() == backend


def test_the_users_settings_do_not_matter(run, tmp_path_factory):
    plots.plot_run(run)
    expected = [(run / name).read_bytes() for name in NAMES]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9, "savefig.dpi": 9}):
        plots.plot_run(run)
    assert [(run / name).read_bytes() for name in NAMES] == expected


def test_a_figure_that_cannot_be_written_is_named(run):
    (run / "loss.png").mkdir()
    with pytest.raises(UserError, match=r"loss\.png: "):
        plots.plot_run(run)


def test_running_mean():
    values = np.random.default_rng(0).normal(size=40)
    expected = [values[i : i + 7].mean() for i in range(34)]
    np.testing.assert_allclose(plots.running_mean(values, 7), expected)
    np.testing.assert_allclose(plots.running_mean(values, 40), [values.mean()])


def test_the_command(tmp_path, run_command):
    RunLog([ROW, dataclasses.replace(ROW, epoch=2)], np.linspace(2, 1, 600, dtype=np.float32)).write(tmp_path)
    assert run_command(plots.main, tmp_path) == (0, "", "")
    assert all((tmp_path / name).stat().st_size > 5000 for name in NAMES)
    status, _, error = run_command(plots.main, tmp_path / "nothing")
    assert (status, error.count("\n"), "nothing" in error) == (2, 1, True)
    assert run_command(plots.main)[0] == 2
    assert run_command(plots.main, "--help")[0] == 0
