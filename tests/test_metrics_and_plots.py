import ast
from pathlib import Path

import numpy as np
import pytest

from cifar_jax import plots
from cifar_jax.errors import UserError
from cifar_jax.io import write_atomically
from cifar_jax.metrics import EpochMetrics, MetricsWriter, read_batch_loss, read_metrics

ROW = EpochMetrics(1, 1.5, 0.25, 1.25, 0.5, 0.01, 2.0, 100.0)


def test_metrics_round_trip(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, 0, 10, 2)
    writer.write(ROW, np.array([2.0, 1.0], np.float32))
    writer.print(ROW, "held-out")
    assert read_metrics(tmp_path) == [ROW]
    np.testing.assert_array_equal(read_batch_loss(tmp_path), [2, 1])
    line = "epoch  1/10  train loss 1.5000 accuracy  25.00%  held-out loss 1.2500 accuracy  50.00%"
    assert capsys.readouterr().out == f"{line}  lr 0.01  2.0 s  100 images/s\n"


def test_damaged_files_are_named(tmp_path):
    assert read_metrics(tmp_path) == []
    MetricsWriter(tmp_path, 0, 10, 2).write(ROW, np.array([2.0, 1.0], np.float32))
    (tmp_path / "metrics.csv").write_text((tmp_path / "metrics.csv").read_text().replace("0.25", "nan"))
    with pytest.raises(UserError, match="a value is not finite"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text("epoch,train_loss\n1,x\n")
    with pytest.raises(UserError, match=r"metrics.csv: not a metrics.csv"):
        read_metrics(tmp_path)
    (tmp_path / "batch_loss.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"batch_loss.npy: damaged"):
        read_batch_loss(tmp_path)


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch):
    (tmp_path / "x.partial").touch()  # another program's
    write_atomically(tmp_path / "x", b"old")

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(UserError, match=r"can't write .*x: No space left on device"):
        write_atomically(tmp_path / "x", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old", "x.partial": b""}


def test_a_run_of_one_epoch_is_seen(tmp_path, monkeypatch):
    """A curve of one point has a marker, and the batch loss has more than one."""
    MetricsWriter(tmp_path, 0, 10, 9).write(ROW, np.linspace(2, 1, 9, dtype=np.float32))
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda axes, path: drawn.update({path.name: axes.lines}))
    plots.plot_run(tmp_path)
    assert [line.get_marker() for line in drawn["accuracy.png"] + drawn["loss.png"]] == ["."] * 4
    np.testing.assert_allclose(drawn["batch_loss.png"][0].get_xydata()[[0, -1]], [(5, 1.75), (9, 1.25)])
    for config, label in (('{"holdout": 0}', "test"), ('{"holdout": 5}', "held-out"), ("damaged", "test")):
        assert drawn["loss.png"][1].get_label() == "test"  # without a config
        (tmp_path / "config.json").write_text(config)
        plots.plot_run(tmp_path)
        assert drawn["loss.png"][1].get_label() == label
        (tmp_path / "config.json").unlink()
        plots.plot_run(tmp_path)


def test_running_mean():
    values = np.random.default_rng(0).normal(size=40)
    expected = [values[i : i + 7].mean() for i in range(34)]
    np.testing.assert_allclose(plots.running_mean(values, 7), expected)
    np.testing.assert_allclose(plots.running_mean(values, 40), [values.mean()])


def test_plots_imports_nothing_of_training():
    nodes = list(ast.walk(ast.parse(Path(plots.__file__).read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert {name for name in modules if "cifar_jax" in name} == {
        "cifar_jax.cli",
        "cifar_jax.errors",
        "cifar_jax.metrics",
    }


def test_plots_command(tmp_path, run_command):
    writer = MetricsWriter(tmp_path, 0, 2, 600)
    writer.write(ROW, np.linspace(2, 1, 600, dtype=np.float32))
    assert run_command(plots.main, tmp_path) == (0, "", "")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("accuracy", "loss", "batch_loss"))
    status, _, error = run_command(plots.main, tmp_path / "nothing")
    assert status == 2
    assert "nothing to draw" in error
    assert run_command(plots.main)[0] == 2
