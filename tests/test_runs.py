import dataclasses
import errno
import fcntl
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import stop_at

from cifar_jax import data_identity, runs
from cifar_jax.errors import UserError
from cifar_jax.outcomes import Interrupted
from cifar_jax.runs import attempts, claim_workdir, probe_workdir, read_config, read_summary, resolve_workdir
from cifar_jax.train import train_and_evaluate

DEEP = "[" * 100_000


@pytest.fixture
def begin(tiny_config, tiny_dataset):
    """Starts the tiny run and stops it before its first step."""

    def begin(**changes):
        with pytest.raises(Interrupted):
            train_and_evaluate(dataclasses.replace(tiny_config, **changes), tiny_dataset, stop_at(3))

    return begin


def test_only_one_training_at_a_time(tiny_config, tiny_dataset):
    workdir = Path(tiny_config.workdir)
    with claim_workdir(workdir, tiny_config), pytest.raises(UserError, match=rf"--workdir {workdir}: another process"):
        train_and_evaluate(tiny_config, tiny_dataset)
    assert not workdir.exists()  # nothing is left behind


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(code, tiny_config, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claim_workdir(Path(tiny_config.workdir), tiny_config):
        error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("warning: ")
    assert "no locks here" in error


@pytest.mark.parametrize("workdir", ["runs/a/run", "runs/" + "x" * 300])
def test_a_refused_run_leaves_no_folder(workdir, tiny_config, tiny_dataset, monkeypatch):
    """Nor those above it; a folder that was there stays."""
    Path("mine/empty").mkdir(parents=True)
    before = sorted(Path().rglob("*"))
    for folder in (workdir, f"mine/{workdir}", "mine/empty"):
        config = dataclasses.replace(tiny_config, workdir=folder, batch_size=4096)
        with pytest.raises(UserError, match=r"--batch-size|--workdir"):
            train_and_evaluate(config, tiny_dataset)
    assert sorted(Path().rglob("*")) == before


def test_a_workdir_in_the_home_folder(tiny_config, tiny_dataset):
    with pytest.raises(Interrupted):
        train_and_evaluate(dataclasses.replace(tiny_config, workdir="~/a/run"), tiny_dataset, stop_at(3))
    assert (Path.home() / "a/run/config.json").exists()
    assert not Path("~").exists()


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket", "file:///tmp/run"])
def test_an_address_is_refused_before_a_folder_is_made(address, tiny_config, tiny_dataset):
    with pytest.raises(UserError, match=f"--workdir {address}: "):
        train_and_evaluate(dataclasses.replace(tiny_config, workdir=address), tiny_dataset)
    assert {path.name for path in Path().iterdir()} <= {"tfds"}
    with pytest.raises(UserError, match=address):
        resolve_workdir(address)


@pytest.mark.parametrize("name", ["[p]", "a*", "a?", "a\\b", "a\udcff"])
def test_a_folder_whose_checkpoints_could_not_be_read_again(name, tiny_config, tiny_dataset, tmp_path):
    with pytest.raises(UserError, match="name another --workdir"):
        train_and_evaluate(dataclasses.replace(tiny_config, workdir=str(tmp_path / name / "run")), tiny_dataset)
    assert not (tmp_path / name / "run").exists()


# --- The probe ---


def test_a_probe_leaves_nothing(tmp_path):
    probe_workdir(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", ["save", "restore"])
def test_a_folder_that_holds_no_checkpoint_is_found_before_the_first_step(
    failure, tiny_config, tiny_dataset, monkeypatch
):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(runs.ocp.StandardCheckpointer, failure, fail)
    with pytest.raises(UserError, match=rf"--workdir {tiny_config.workdir}: .*Input/output error"):
        train_and_evaluate(tiny_config, tiny_dataset, stop_at(3))
    assert not Path(tiny_config.workdir).exists()


def test_a_folder_that_gives_back_other_bytes_is_found(tmp_path, monkeypatch):
    other = lambda *_: {"probe": np.array([0, 1, 3])}
    monkeypatch.setattr(runs.ocp.StandardCheckpointer, "restore", other)
    with pytest.raises(UserError, match="--workdir"):
        probe_workdir(tmp_path)


# --- Crashes while a run starts ---


def test_a_crash_before_there_is_a_config_goes_on(tiny_config, begin):
    """Either of the two files was written, and the checkpoint folder is still empty."""
    begin()
    workdir = Path(tiny_config.workdir)
    (workdir / "config.json").unlink()
    assert (workdir / "dataset.json").exists()
    (workdir / "checkpoints").mkdir(exist_ok=True)
    (workdir / "config.json.123.partial").write_text("{")
    (workdir / "probe-left").mkdir()
    begin()
    (workdir / "dataset.json").unlink()
    begin()
    assert read_config(workdir).batch_size == 16


def test_an_empty_config_of_a_crash_goes_on(tiny_config, begin):
    begin()
    workdir = Path(tiny_config.workdir)
    (workdir / "config.json").write_bytes(b"")
    begin(seed=3)
    assert read_config(workdir).seed == 3
    (workdir / "config.json").write_bytes(b"")
    (workdir / "metrics.csv").touch()  # results show that the run got further
    with pytest.raises(UserError, match=r"config\.json: "):
        runs.check_same_config(workdir, tiny_config)


@pytest.mark.parametrize("name", ["dataset.json", "metrics.csv", "batch_loss.npy", "summary.json", "loss.png"])
@pytest.mark.parametrize("content", ["mine", '{"mine": 1}', DEEP])
def test_files_of_the_users_own_are_left_alone(name, content, tiny_config, tiny_dataset):
    own = Path(tiny_config.workdir) / name
    own.parent.mkdir()
    own.write_text(content)
    (own.parent / ".lock").write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: .* --workdir"):
        train_and_evaluate(tiny_config, tiny_dataset)
    assert {path.name: path.read_text() for path in own.parent.iterdir()} == {name: content, ".lock": "mine"}


# --- config.json and dataset.json ---


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"num_epochs": None},
        {"seed": 1.5},
        {"steps_per_call": 1.5},
        {"nesterov": 1},
        {"workdir": ""},
    ],
)
def test_a_config_changed_by_hand_is_named(changes, tiny_config):
    folder = Path(tiny_config.workdir)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(tiny_config) | changes))
    with pytest.raises(UserError, match=r"config\.json: "):
        read_config(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"dropout_rates": []}', '{"batch_size": 1}', DEEP, '{"a":' * 100_000])
def test_a_damaged_config_is_named(content, tiny_config, tiny_dataset):
    folder = Path(tiny_config.workdir)
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: "):
        train_and_evaluate(tiny_config, tiny_dataset)


def test_no_config_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["", "{", DEEP, '{"source": 3}'])
def test_a_damaged_identity_of_the_data_is_written_anew(content, tiny_config, tiny_dataset):
    workdir = Path(tiny_config.workdir)
    workdir.mkdir()
    (workdir / "dataset.json").write_text(content)
    data_identity.check_same_data(workdir, tiny_dataset, resumes=True)
    assert json.loads((workdir / "dataset.json").read_text())["source"] == "tiny digits"


def test_other_images_with_the_same_labels_are_refused(tiny_config, tiny_dataset):
    """Such as those of another order of the files in each class."""
    workdir = Path(tiny_config.workdir)
    workdir.mkdir()
    data_identity.check_same_data(workdir, tiny_dataset, resumes=False)
    first, second = np.flatnonzero(tiny_dataset.train_labels == tiny_dataset.train_labels[0])[:2]
    images = tiny_dataset.train_images.copy()
    images[[first, second]] = images[[second, first]]
    other = dataclasses.replace(tiny_dataset, train_images=images)
    assert data_identity.identify(other) != data_identity.identify(tiny_dataset)
    with pytest.raises(UserError, match="has other images or another order: name the former"):
        data_identity.check_same_data(workdir, other, resumes=True)
    data_identity.check_same_data(workdir, tiny_dataset, resumes=True)
    saved = json.loads((workdir / "dataset.json").read_text())
    del saved["train_images_sha256"]  # as an earlier version wrote it
    (workdir / "dataset.json").write_text(json.dumps(saved))
    data_identity.check_same_data(workdir, other, resumes=True)


# --- Restarts and the summary ---


def test_attempts_go_on_with_the_last_restart_that_began(tiny_config):
    config = dataclasses.replace(tiny_config, auto_restart=True, seed=2**32 - 1)
    config = dataclasses.replace(config, optimizer="muon", adam_learning_rate=0.01)
    tries = attempts(config)
    assert [Path(attempt.workdir).name for attempt in tries] == ["run", "restart1", "restart2", "restart3"]
    assert [attempt.learning_rate for attempt in tries] == [0.05, 0.025, 0.0125, 0.00625]
    assert [attempt.adam_learning_rate for attempt in tries] == [0.01, 0.005, 0.0025, 0.00125]
    assert [attempt.seed for attempt in tries] == [2**32 - 1, 0, 1, 2]
    (Path(config.workdir) / "restart2").mkdir(parents=True)
    assert attempts(config) == tries[2:]
    assert attempts(dataclasses.replace(config, workdir=f"{config.workdir}-2", auto_restart=False))[0].seed == 2**32 - 1


def test_a_summary_is_of_this_recipe_and_complete(tiny_config, tmp_path):
    config = dataclasses.asdict(tiny_config)
    for summary, read in (
        ({"config": config, "epochs": 3}, True),
        ({"config": config, "epochs": 2}, False),
        ({"config": config | {"seed": 1}, "epochs": 3}, False),
        ({"config": [], "epochs": 3}, False),
    ):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert (read_summary(tmp_path, tiny_config) is not None) == read


def test_images_of_another_dataset_are_refused(tiny_config, tiny_dataset):
    with pytest.raises(UserError, match=r"images are of digits.*cifar10"):
        train_and_evaluate(dataclasses.replace(tiny_config, dataset="cifar10"), tiny_dataset)
    assert not Path(tiny_config.workdir).exists()


def test_processes_that_are_not_connected_are_refused(tiny_config, tiny_dataset, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"one of 2 processes: .* --coordinator auto"):
        train_and_evaluate(tiny_config, tiny_dataset)
    assert not Path(tiny_config.workdir).exists()
