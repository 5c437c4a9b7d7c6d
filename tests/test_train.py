import csv
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import evaluate, train
from cifar_jax.checkpoint import Checkpoints
from cifar_jax.configs import RECIPES
from cifar_jax.errors import UserError
from cifar_jax.metrics import read_batch_loss, read_metrics
from cifar_jax.parallel import replicate
from cifar_jax.train import Interrupted, parse_config, train_and_evaluate
from cifar_jax.train_step import create_train_state

pytestmark = pytest.mark.usefixtures("direct_convolutions", "no_figures")

STOP_CALLS_AN_EPOCH = 1 + 6 + 4  # before the epoch, before its steps, after the steps of its evaluation


def final_state(config):
    state = replicate(create_train_state(config, 6), jax.local_devices()[:1])
    state, _ = Checkpoints(train.Path(config.workdir)).restore_state("latest", state)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.step, state.params, state.opt_state, state.ema_params))]


def untimed_rows(config):
    rows = read_metrics(train.Path(config.workdir))
    return [dataclasses.replace(row, seconds=0, images_per_second=0) for row in rows]


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n, signal): the n-th time that training asks whether to stop, the signal arrives."""
    original = train.StopSignals.__call__

    def interrupt(n, signum):
        calls = iter(range(1, 1000))

        def call(self):
            if next(calls) == n:
                os.kill(os.getpid(), signum)
            return original(self)

        monkeypatch.setattr(train.StopSignals, "__call__", call)

    yield interrupt
    monkeypatch.setattr(train.StopSignals, "__call__", original)


@pytest.fixture(scope="module")
def finished_run(tiny_dataset, tmp_path_factory):
    """A finished run in small: (config, its folder's state, rows, batch losses)."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(train, "load_dataset", lambda name, data_dir: tiny_dataset)
        config = dataclasses.replace(
            RECIPES["quickstart"],
            workdir=str(tmp_path_factory.mktemp("uninterrupted") / "run"),
            optimizer="muon",
            learning_rate=0.02,
            ema_decay=0.9,
            swa_fraction=0.5,  # two cycles of 4 steps, from step 10, in the second epoch
            swa_cycles=2,
            batch_size=16,
            num_epochs=3,
            crop_padding=2,
            random_flip=True,
            eval_batch_size=8,
            num_devices=1,
            steps_per_call=1,
        )
        train_and_evaluate(config)
    return config


@pytest.fixture
def uninterrupted(finished_run):
    """finished_run, where optax' Muon may take powers of an integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield finished_run


def test_small_images_to_the_end_are_warned_of(tiny_dataset, tiny_config, monkeypatch, capsys):
    changes = {"model": "all_cnn", "dropout_rates": (0.0,) * 3, "image_sizes": ((14, 1),), "num_epochs": 1}
    monkeypatch.setattr(train, "create_train_state", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_and_evaluate(dataclasses.replace(tiny_config, **changes))
    assert "warning: --image-sizes leaves no epoch to images of 32 pixels" in capsys.readouterr().err


def test_a_run_writes_all_its_files(uninterrupted):
    folder = train.Path(uninterrupted.workdir)
    names = {path.name for path in folder.iterdir()}
    figures = {"accuracy.png", "loss.png", "batch_loss.png"}
    texts = {"config.json", "dataset.json", "metrics.csv", "summary.json"}
    assert names == {".lock", "batch_loss.npy", "checkpoints"} | texts | figures
    for figure in figures:
        assert (folder / figure).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert list(rows[0]) == [
        *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("learning_rate", "seconds", "images_per_second"),
    ]
    losses = read_batch_loss(folder)
    assert losses.shape == (18,)
    # The epoch's loss weights the last batch, of 10 images, by its size.
    assert float(rows[0]["train_loss"]) == pytest.approx((16 * losses[:5].sum() + 10 * losses[5]) / 90, rel=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["test_loss"] for row in summary["metrics"]] == [float(row["test_loss"]) for row in rows]
    assert summary["config"]["num_epochs"] == 3
    assert summary["num_parameters"] == 395_006
    assert summary["test_accuracy"] == float(rows[-1]["test_accuracy"])
    assert summary["best_test_accuracy"] == max(float(row["test_accuracy"]) for row in rows)
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 16


@pytest.mark.parametrize(
    ("where", "when", "signum"),
    [
        ("in the steps of epoch 2", STOP_CALLS_AN_EPOCH + 4, signal.SIGTERM),
        ("in the evaluation of epoch 2", STOP_CALLS_AN_EPOCH + 9, signal.SIGINT),
        ("after the checkpoint of epoch 1", STOP_CALLS_AN_EPOCH + 1, signal.SIGTERM),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(
    where, when, signum, uninterrupted, use_tiny_dataset, interrupt, tmp_path, capsys
):
    config = dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run"))
    interrupt(when, signum)
    with pytest.raises(Interrupted) as interrupted:
        train_and_evaluate(config)
    assert interrupted.value.exit_status == 128 + signum
    assert len(read_metrics(tmp_path / "run")) == 1, where
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 1
    train_and_evaluate(config)
    assert "resuming after 1 epochs" in capsys.readouterr().out
    assert untimed_rows(config) == untimed_rows(uninterrupted)
    np.testing.assert_array_equal(read_batch_loss(tmp_path / "run"), read_batch_loss(train.Path(uninterrupted.workdir)))
    for resumed, expected in zip(final_state(config), final_state(uninterrupted)):
        np.testing.assert_array_equal(resumed, expected)


def test_a_crash_between_log_and_checkpoint(uninterrupted, use_tiny_dataset, tmp_path):
    """Rows that the checkpoint does not know are dropped and written anew."""
    shutil.copytree(uninterrupted.workdir, tmp_path / "run")
    config = dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run"))
    checkpoints = tmp_path / "run" / "checkpoints"
    kept = sorted(folder.name for folder in checkpoints.iterdir())
    assert kept[-1] == "3"
    shutil.rmtree(checkpoints / "3")  # leaves the best, if that is an earlier one, else none
    (tmp_path / "run" / "summary.json").unlink()
    train_and_evaluate(config)
    assert untimed_rows(config) == untimed_rows(uninterrupted)
    assert len(read_batch_loss(tmp_path / "run")) == 18


def test_many_steps_a_call_and_two_devices(uninterrupted, use_tiny_dataset, tmp_path, interrupt):
    """As on accelerators: 6 steps in calls of 4, evaluation too; interrupted and resumed."""
    config = dataclasses.replace(uninterrupted, workdir=str(tmp_path / "one"), steps_per_call=4)
    train_and_evaluate(config)
    for row, expected in zip(untimed_rows(config), untimed_rows(uninterrupted), strict=True):
        assert dataclasses.asdict(row) == pytest.approx(dataclasses.asdict(expected), rel=1e-4)

    config = dataclasses.replace(config, workdir=str(tmp_path / "whole"), num_devices=2, num_epochs=2)
    train_and_evaluate(config)
    resumed = dataclasses.replace(config, workdir=str(tmp_path / "resumed"))
    interrupt(3, signal.SIGTERM)  # before the first epoch, its first call, its second call
    with pytest.raises(Interrupted, match="saved after 0 epochs and 4/6 steps"):
        train_and_evaluate(resumed)
    train_and_evaluate(resumed)
    assert untimed_rows(resumed) == untimed_rows(config)


def test_a_row_tells_the_rate_and_the_seconds_of_training(use_tiny_dataset, tiny_config, interrupt, monkeypatch):
    """By a clock that is one second later whenever it is read; interrupted in its second epoch."""
    clock = iter(range(1000))
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    config = dataclasses.replace(tiny_config, num_epochs=2, schedule="one_cycle", warmup_fraction=0.0)
    interrupt(STOP_CALLS_AN_EPOCH + 4, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train_and_evaluate(config)
    train_and_evaluate(config)
    rows = read_metrics(train.Path(config.workdir))
    assert [row.learning_rate for row in rows] == pytest.approx([0.05 * (12 - step) / 11 for step in (5, 11)])
    assert [row.seconds for row in rows] == [1, 2]
    assert [row.images_per_second for row in rows] == [90, 45]


def test_a_finished_run_is_left_alone(uninterrupted, use_tiny_dataset, capsys):
    before = (train.Path(uninterrupted.workdir) / "metrics.csv").read_bytes()
    summary = train_and_evaluate(uninterrupted)
    assert "already complete after 3 epochs" in capsys.readouterr().out
    assert summary["epochs"] == 3
    assert (train.Path(uninterrupted.workdir) / "metrics.csv").read_bytes() == before


def test_output_that_is_no_terminal(use_tiny_dataset, tmp_path, run_command, monkeypatch):
    """One line an epoch on stdout, no progress bar; and each epoch has its own order."""
    orders, original = [], train.epoch_order
    monkeypatch.setattr(train, "epoch_order", lambda *arguments: orders.append(arguments) or original(*arguments))
    arguments = ["--workdir", tmp_path / "run", "--num-epochs", 2, "--num-devices", 1]
    status, output, error = run_command(train.main, "quickstart", *arguments)
    assert (status, error) == (0, "")
    assert set(orders) == {(0, 0, 90), (0, 1, 90)}
    lines = output.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("lenet5, 395,006 parameters, float32, on 1 × cpu; 90 images from tiny digits")
    assert [line.startswith(f"epoch {i}/2  train loss") for i, line in enumerate(lines[1:3], 1)] == [True, True]
    assert lines[3].startswith("test accuracy")


def test_sigterm_saves_and_says_how_to_go_on(use_tiny_dataset, interrupt, tmp_path, run_command):
    interrupt(3, signal.SIGTERM)
    arguments = ["quickstart", "--workdir", tmp_path / "run", "--num-devices", 1, "--steps-per-call", 1]
    status, _, error = run_command(train.main, *arguments)
    assert status == 128 + signal.SIGTERM
    expected = f"To go on: python -m cifar_jax.train {' '.join(map(str, arguments))}"
    assert error.splitlines()[-1] == f"saved after 0 epochs and 1/3 steps. {expected}"


@pytest.mark.parametrize(
    ("signum", "status", "last"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopping after this step, to save")],
)
def test_a_second_signal_stops_at_once(
    signum, status, last, use_tiny_dataset, interrupt, tmp_path, run_command, monkeypatch
):
    before = signal.getsignal(signum)
    monkeypatch.setattr(train.Checkpoints, "save", lambda *_: os.kill(os.getpid(), signum))
    interrupt(2, signum)
    result, _, error = run_command(train.main, "quickstart", "--workdir", tmp_path / "run", "--num-devices", 1)
    assert result == status
    assert error.splitlines()[-1].startswith(last)
    assert signal.getsignal(signum) is before


def test_recipes_and_flags():
    assert parse_config([]) == RECIPES["lenet5"]
    assert parse_config(["--num-epochs", "7"]) == dataclasses.replace(RECIPES["lenet5"], num_epochs=7)
    flags = ["--dropout-rates", "0.1", "0", "0.3", "--no-random-flip", "--data-dir", "d", "--dtype", "bfloat16"]
    assert parse_config(["all_cnn_reference", *flags]) == dataclasses.replace(
        RECIPES["all_cnn_reference"], dropout_rates=(0.1, 0.0, 0.3), random_flip=False, data_dir="d", dtype="bfloat16"
    )


def test_help_names_every_recipe_and_field(run_command):
    status, output, _ = run_command(train.main, "--help")
    assert status == 0
    assert all(name in output for name in RECIPES)
    status, output, _ = run_command(train.main, "all_cnn_reference", "--help")
    assert status == 0
    for field in dataclasses.fields(RECIPES["lenet5"]):
        assert "--" + field.name.replace("_", "-") in output or f"no-{field.name.replace('_', '-')}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lenet"], "unknown recipe 'lenet': did you mean lenet5?"),
        (["vgg"], "unknown recipe 'vgg': choose one of lenet5, lenet5_reference,"),
        (["lenet5", "--num-epoch", "3"], "Unrecognized options: --num-epoch, 3: see --help"),
        (["--dtype", "f16"], "invalid choice 'f16' for argument '--dtype'. Expected one of ('float32', 'bfloat16')"),
        (
            ["lenet5", "--batch-size", "many"],
            "Error parsing --batch-size: invalid literal for int()",
        ),
        (["lenet5", "--workdir"], "Missing value for argument '--workdir'. Expected 1 values: see --help"),
        (["lenet5", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["quickstart", "--batch-size", "30", "--num-devices", "4"], "--batch-size 30 does not divide over 4 devices"),
        (["quickstart", "--num-devices", "9"], "--num-devices 9: this machine has 4"),
        (["lenet5", "--data-dir", "nowhere"], "--data-dir nowhere does not exist"),
        (["quickstart", "--workdir", "file/run"], "--workdir file/run: Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, run_command):
    open("file", "w").close()
    status, output, error = run_command(train.main, *arguments)
    assert (status, output) == (2, "")
    assert len(error.splitlines()) == 1
    assert error.startswith(f"error: {message}")


def test_a_changed_config_is_refused(uninterrupted, use_tiny_dataset, capsys):
    config = train.Path(uninterrupted.workdir) / "config.json"
    before = config.read_bytes()
    changed = dataclasses.replace(uninterrupted, learning_rate=0.01, seed=3)
    with pytest.raises(UserError, match=r"another config \(learning_rate 0.02 → 0.01, seed 0 → 3\)"):
        train_and_evaluate(changed)
    assert config.read_bytes() == before
    capsys.readouterr()
    train_and_evaluate(dataclasses.replace(uninterrupted, eval_batch_size=30, num_devices=2))
    output = capsys.readouterr()
    assert "already complete" in output.out
    assert output.err == ""
    config.write_bytes(before)


def test_other_devices_are_said_where_they_matter(use_tiny_dataset, tiny_config, interrupt, capsys):
    """As each draws its own dropout."""
    for rates, said in ((0.2, True), (0.0, False)):
        workdir = f"{tiny_config.workdir}-{rates}"
        config = dataclasses.replace(tiny_config, workdir=workdir, dropout_rates=(rates, rates), num_epochs=1)
        interrupt(3, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train_and_evaluate(config)
        capsys.readouterr()
        train_and_evaluate(dataclasses.replace(config, num_devices=2))
        assert ("going on with 2 devices where 1 began" in capsys.readouterr().err) == said


def test_a_run_without_a_step_may_change(tiny_config, monkeypatch):
    """As it may have been out of memory, and was told to lower its batch."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "create_train_steps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_and_evaluate(tiny_config)
    finished = dataclasses.replace(tiny_config, batch_size=10, num_epochs=1)
    train_and_evaluate(finished)
    assert len(read_batch_loss(train.Path(tiny_config.workdir))) == 9
    workdir = train.Path(tiny_config.workdir)
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "metrics.csv").unlink()
    for name in ("summary.json", "batch_loss.npy"):  # either is worth keeping
        with pytest.raises(UserError, match="another config"):
            train_and_evaluate(tiny_config)
        (workdir / name).unlink()


def test_a_restarted_run_may_not_change(tiny_config, monkeypatch):
    """Though none of its folders keeps an epoch: the changed recipe would go on where the old one's restarts ended."""
    config = dataclasses.replace(tiny_config, learning_rate=1e30, auto_restart=True)
    with pytest.raises(UserError, match="training diverged in epoch 1"):
        train_and_evaluate(config)
    with pytest.raises(UserError, match="restart3 holds a run with another config"):
        train_and_evaluate(dataclasses.replace(config, learning_rate=0.08))


def test_settings_that_the_number_of_steps_forbids(tiny_config, capsys, monkeypatch):
    with pytest.raises(UserError, match=r"--num-epochs 999999999: steps are counted up to 2,147,483,647"):
        train_and_evaluate(dataclasses.replace(tiny_config, num_epochs=999_999_999))
    with pytest.raises(UserError, match="use a larger --batch-size, or --num-devices 1"):
        train_and_evaluate(dataclasses.replace(tiny_config, batch_size=4, num_devices=4, mixup_alpha=0.2))
    monkeypatch.setattr(train, "create_train_state", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_and_evaluate(dataclasses.replace(tiny_config, swa_fraction=0.5, swa_cycles=10))
    assert capsys.readouterr().err == "warning: --swa-fraction leaves no step to each of 10 cycles: none\n"


def test_only_one_training_at_a_time(tiny_config, monkeypatch):
    def second(*_):
        with pytest.raises(UserError, match="another training is at work there"):
            train_and_evaluate(tiny_config)
        raise UserError("the first goes on")

    monkeypatch.setattr(train, "load_dataset", second)
    with pytest.raises(UserError, match="the first goes on"):
        train_and_evaluate(tiny_config)
    assert not train.Path(tiny_config.workdir).exists()  # nothing was done, nothing is left


def test_divergence_is_said_and_not_logged(tiny_config):
    with pytest.raises(UserError, match=r"training diverged in epoch 1 \(loss nan, of the test nan\)"):
        train_and_evaluate(dataclasses.replace(tiny_config, learning_rate=1e30))
    assert read_metrics(train.Path(tiny_config.workdir)) == []


def test_dead_training_is_said_or_restarted(tiny_config, monkeypatch, capsys):
    """What happens when is_dead says so; that it does is tested below."""
    monkeypatch.setattr(train, "is_dead", lambda losses, classes: True)
    config = dataclasses.replace(tiny_config, learning_rate=1e-12, num_epochs=1)
    train_and_evaluate(config)
    warning = capsys.readouterr().err
    assert "warning: training is dead in epoch 1" in warning
    assert warning.endswith("or use --auto-restart\n")
    dead = iter((True,))
    monkeypatch.setattr(train, "is_dead", lambda losses, classes: next(dead, False))
    with monkeypatch.context() as patch:
        patch.setattr(train, "create_train_steps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # as it was advised
            train_and_evaluate(dataclasses.replace(config, auto_restart=True))
    assert f"starting again in {config.workdir}/restart1" in capsys.readouterr().err

    dead = iter((False, True))
    monkeypatch.setattr(train, "is_dead", lambda losses, classes: next(dead, False))
    config = dataclasses.replace(config, workdir=f"{config.workdir}-restarted", auto_restart=True)
    summary = train_and_evaluate(config)
    assert (summary["config"]["learning_rate"], summary["config"]["seed"]) == (5e-13, 1)
    assert summary["config"]["swa_learning_rate"] == config.swa_learning_rate / 2
    assert f"starting again in {config.workdir}/restart1: rate 5e-13, seed 1" in capsys.readouterr().err
    assert read_metrics(train.Path(config.workdir)) == []  # the dead epoch is not logged
    with pytest.raises(UserError, match="was started again: go on with --auto-restart"):
        train_and_evaluate(dataclasses.replace(config, auto_restart=False))
    monkeypatch.setattr(train, "create_train_steps", None)  # nothing is trained again
    assert train_and_evaluate(config) == json.loads(json.dumps(summary))
    with pytest.raises(UserError, match=r"name .*restart1"):
        evaluate.load_run(train.Path(config.workdir), "latest")
    assert evaluate.load_run(train.Path(config.workdir) / "restart1", "latest", "bfloat16")[0].dtype == "bfloat16"


def test_a_dead_training_is_found_by_its_losses(tiny_config, monkeypatch, capsys):
    """Forced: with weights of zero all logits are equal, and the rate is too small to leave that.

    Its 15 flat steps are more than two epochs of 6. The next seed has a large bias, so not the loss of guessing.
    """
    create = train.create_train_state

    def create_equal_logits(config, *arguments):
        state = create(config, *arguments)
        bias = jnp.arange(10.0) * config.seed
        equal = jax.tree.map(lambda leaf: bias if leaf.shape == (10,) else jnp.zeros_like(leaf), state.params)
        return state.replace(params=equal)

    monkeypatch.setattr(train, "create_train_state", create_equal_logits)
    monkeypatch.setattr(train, "DEAD_STEPS", 15)
    config = dataclasses.replace(tiny_config, learning_rate=1e-12)
    train_and_evaluate(config)
    assert re.findall(r"warning: training is dead in epoch (\d)", capsys.readouterr().err) == ["3"]

    config = dataclasses.replace(config, workdir=f"{config.workdir}-restarted", auto_restart=True)
    assert train_and_evaluate(config)["config"]["seed"] == 1
    assert "training is dead in epoch 3 (loss flat at that of guessing)" in capsys.readouterr().err
    assert [row.epoch for row in read_metrics(train.Path(config.workdir))] == [1, 2]
    assert len(read_metrics(train.Path(config.workdir) / "restart1")) == 3


def test_restarts_end(tiny_config, monkeypatch, capsys):
    def diverge(config, devices):
        raise train.DeadTraining("training diverged in epoch 1", config)

    monkeypatch.setattr(train, "_train_and_evaluate", diverge)
    with pytest.raises(UserError, match=r"training diverged in epoch 1.* another --seed$"):
        train_and_evaluate(dataclasses.replace(tiny_config, auto_restart=True))
    assert capsys.readouterr().err.count("starting again") == 3


@pytest.mark.parametrize(
    ("losses", "dead"),
    [
        ([2.4] * 100 + [2.302] * 500, True),
        ([2.302] * 499, False),
        ([], False),
        ([2.302] * 500 + [2.0] * 100, False),
        (np.linspace(6, 1, 500), False),
        ([2.2] * 500, False),
        ([2.297] * 500, False),
        ([2.299] * 500, True),
        ([2.4] * 500, True),
        ([2.405] * 500, False),
        ([2.302] * 400 + [np.nan] * 100, False),
    ],
)
def test_is_dead(losses, dead):
    assert train.is_dead(np.array(losses, np.float32), 10) == dead


def test_held_out_images_are_neither_trained_on_nor_the_test_set(
    tiny_config, tiny_dataset, run_command, monkeypatch, capsys
):
    seen = {}
    replicate_data = train.replicate

    def recorded(tree, devices):
        if isinstance(tree, tuple) and len(tree) == 2:
            seen["train"] = tree
        return replicate_data(tree, devices)

    monkeypatch.setattr(train, "replicate", recorded)
    evaluator = train.Evaluator
    monkeypatch.setattr(
        train,
        "Evaluator",
        lambda config, state, images, labels, devices: (
            seen.update(test=(images, labels)) or evaluator(config, state, images, labels, devices)
        ),
    )
    train_and_evaluate(dataclasses.replace(tiny_config, holdout=20, num_epochs=1))
    np.testing.assert_array_equal(seen["train"][0], tiny_dataset.train_images[:70])
    np.testing.assert_array_equal(seen["train"][1], tiny_dataset.train_labels[:70])
    np.testing.assert_array_equal(seen["test"][0], tiny_dataset.train_images[70:])
    np.testing.assert_array_equal(seen["test"][1], tiny_dataset.train_labels[70:])
    output = capsys.readouterr().out
    assert "tests on 20 held-out training images" in output
    assert "  held-out loss " in output
    status, output, errors = run_command(evaluate.main, "--workdir", tiny_config.workdir)
    assert (status, errors) == (0, "the run tested on held-out training images; this is the test set\n")
    assert "of 30 images" in output
    with pytest.raises(UserError, match="--holdout 90: there are only 90 training images"):
        train_and_evaluate(dataclasses.replace(tiny_config, workdir=f"{tiny_config.workdir}-2", holdout=90))


def test_progressive_sizes_train_and_resume(use_tiny_dataset, tmp_path, interrupt, tiny_config):
    """Every size is compiled; a run that is stopped between them goes on with the right one."""
    sizes, compiled = [], []
    create = train.create_train_steps

    def recorded(config, devices, per_call, size):
        def compile_for(*arguments):
            if not compiled:  # one, small, in place of all, to save time
                compiled.append(create(config, devices, per_call, 14)(*arguments))
            return lambda *arguments: sizes.append(size) or compiled[0](*arguments)

        return compile_for

    config = dataclasses.replace(
        tiny_config,
        model="all_cnn",
        dropout_rates=(0.0, 0.0, 0.0),
        image_sizes=((16, 1), (24, 1)),
        batch_size=45,
        num_devices=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "create_train_steps", recorded)
        interrupt(3 + 4 + 3, signal.SIGTERM)  # in the steps of the second epoch, after its first
        with pytest.raises(Interrupted):
            train_and_evaluate(config)
        assert sizes == [16, 16, 24]
        sizes.clear()
        compiled.clear()
        train_and_evaluate(config)
    assert sizes[-2:] == [32, 32]
    assert 16 not in sizes


def test_a_closed_pipe_loses_no_epoch(use_tiny_dataset, tmp_path, monkeypatch, run_command):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(train.MetricsWriter, "print", closed)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    status, _, _ = run_command(train.main, "quickstart", "--workdir", tmp_path / "run", "--num-devices", 1)
    assert status == 141
    state = create_train_state(RECIPES["quickstart"], 3)
    assert Checkpoints(tmp_path / "run").restore_state("latest", state)[1].epoch == 1


def test_stopped_before_the_first_step(use_tiny_dataset, interrupt, tmp_path, run_command):
    interrupt(1, signal.SIGTERM)
    status, _, error = run_command(train.main, "quickstart", "--workdir", tmp_path / "run", "--num-devices", 1)
    assert status == 143
    assert "stopped before the first step, so nothing was saved. To go on:" in error


def test_a_batch_larger_than_the_dataset(tiny_config):
    with pytest.raises(UserError, match="--batch-size 91: there are only 90 training images"):
        train_and_evaluate(dataclasses.replace(tiny_config, batch_size=91))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "has checkpoints but no config.json"),
        (lambda run: (run / "metrics.csv").unlink(), "metrics.csv: lacks some of the run's epochs"),
        (lambda run: (run / "metrics.csv").write_text("epoch\ninf\n"), "metrics.csv: not a metrics.csv"),
        (lambda run: (run / "batch_loss.npy").unlink(), "batch_loss.npy: lacks some of the run's steps"),
        (lambda run: np.save(run / "batch_loss.npy", np.zeros((18, 2))), "batch_loss.npy: damaged"),
    ],
)
def test_a_half_lost_run_is_refused(damage, message, uninterrupted, use_tiny_dataset, tmp_path):
    shutil.copytree(uninterrupted.workdir, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        train_and_evaluate(dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run")))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"epochs": 1, "test_accuracy": 0.1}'])
def test_a_lost_or_earlier_summary_is_written_again(content, uninterrupted, use_tiny_dataset, tmp_path):
    shutil.copytree(uninterrupted.workdir, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(content)
    train_and_evaluate(dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run")))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == before


@pytest.mark.parametrize("removed", ["the folder", "what is in it"])
def test_a_finished_run_without_its_checkpoints_is_left_alone(
    removed, uninterrupted, use_tiny_dataset, tmp_path, capsys, monkeypatch
):
    shutil.copytree(uninterrupted.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    if removed == "what is in it":
        (tmp_path / "run" / "checkpoints").mkdir()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    summary = train_and_evaluate(dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run")))
    assert summary == json.loads(before["summary.json"])
    output = capsys.readouterr().out
    assert "already complete after 3 epochs" in output
    assert f"its checkpoints are gone: to train it again, remove {tmp_path}/run/summary.json" in output
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert after == before
    (tmp_path / "run" / "summary.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train, "create_train_steps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # of an unfinished one nothing is left
            train_and_evaluate(dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run")))
    assert "/checkpoints: training from the start" in capsys.readouterr().err
    (tmp_path / "run" / "summary.json").write_bytes(before["summary.json"])
    other = dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run"), seed=1)
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(other)))
    monkeypatch.setattr(train, "create_train_steps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # another recipe's summary is not this run's
        train_and_evaluate(other)


@pytest.mark.parametrize("name", ["dataset.json", "metrics.csv", "batch_loss.npy", "summary.json", "loss.png"])
def test_files_of_the_users_own_are_left_alone(name, tiny_config, tmp_path):
    own = tmp_path / "run" / name
    own.parent.mkdir()
    own.write_text("mine")
    (own.parent / ".lock").write_text("mine")
    with pytest.raises(UserError, match=rf"run/{name}: there is no config\.json beside it, so not a run's"):
        train_and_evaluate(tiny_config)
    assert {path.name: path.read_text() for path in own.parent.iterdir()} == {name: "mine", ".lock": "mine"}


@pytest.mark.parametrize("name", ["[p]", "a*", "a?", "a\\b", "a\udcff"])
def test_a_folder_whose_checkpoints_could_not_be_read_again(name, tiny_config, tmp_path):
    with pytest.raises(UserError, match="checkpoints can't lie below a folder whose name"):
        train_and_evaluate(dataclasses.replace(tiny_config, workdir=str(tmp_path / name / "run")))
    assert not (tmp_path / name / "run").exists()


def test_a_run_goes_on_with_its_own_data_alone(uninterrupted, tiny_dataset, monkeypatch, tmp_path):
    shutil.copytree(uninterrupted.workdir, tmp_path / "run")
    images, labels = tiny_dataset.train_images[::-1], tiny_dataset.train_labels[::-1]
    turned = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels, source="another copy")
    monkeypatch.setattr(train, "load_dataset", lambda name, data_dir: turned)
    config = dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run"))
    before = (tmp_path / "run" / "dataset.json").read_bytes()
    assert train_and_evaluate(config)["epochs"] == 3  # it is complete: nothing is trained
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"run: began with tiny digits, and another copy has other labels or another"):
        train_and_evaluate(config)
    assert (tmp_path / "run" / "dataset.json").read_bytes() == before


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
    folder = train.Path(tiny_config.workdir)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(tiny_config) | changes))
    with pytest.raises(UserError, match=r"config.json: not a config of this program"):
        train_and_evaluate(tiny_config)


@pytest.mark.parametrize("content", ["{", "[]", '{"dropout_rates": []}', '{"batch_size": 1}'])
def test_a_damaged_config_is_named(content, tiny_config):
    folder = train.Path(tiny_config.workdir)
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json: not a config of this program"):
        train_and_evaluate(tiny_config)


def test_an_epoch_against_stored_numbers(tiny_config, no_figures):
    """Initial weights, order, augmentation, dropout and steps together: without it random streams change unnoticed."""
    summary = train_and_evaluate(dataclasses.replace(tiny_config, num_epochs=1))
    losses = read_batch_loss(Path(tiny_config.workdir))
    np.testing.assert_allclose(losses, [2.305818, 2.236435, 2.414595, 2.252416, 2.297911, 2.2568], rtol=1e-4)
    assert summary["test_loss"] == pytest.approx(2.2915, rel=1e-4)
