import csv
import dataclasses
import errno
import fcntl
import io
import json
import shutil
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import latest_state, stop_at, untimed_rows

from cifar_jax import evaluate, metrics, plots, trainer, training
from cifar_jax.configs import RECIPES
from cifar_jax.errors import UserError
from cifar_jax.metrics import read_batch_loss, read_metrics
from cifar_jax.outcomes import Interrupted
from cifar_jax.sources import load_run
from cifar_jax.train import train_and_evaluate
from cifar_jax.trainer import Trainer

pytestmark = pytest.mark.usefixtures("direct_convolutions", "compiled_once", "no_figures")

# How often a run with 6 training and 4 evaluation steps per epoch, one per call, polls whether to stop: at its start,
# after loading data, before compiling and before its epochs; then before each epoch and step, and after each evaluation
# step.
START, BEFORE, EPOCH = 3, 4, 1 + 6 + 4


@pytest.fixture(scope="module")
def finished_run(tiny_dataset, tmp_path_factory):
    """The config of a small finished run."""
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
    with jax.numpy_dtype_promotion("standard"):
        train_and_evaluate(config, tiny_dataset)
    return config


@pytest.fixture
def uninterrupted(finished_run):
    """finished_run with standard type promotion, which optax' Muon needs."""
    with jax.numpy_dtype_promotion("standard"):
        yield finished_run


@pytest.fixture
def copied(uninterrupted, tmp_path):
    """The config for a copy of the finished run."""
    shutil.copytree(uninterrupted.workdir, tmp_path / "run")
    return dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run"))


def test_a_run_writes_all_its_files(uninterrupted):
    folder = Path(uninterrupted.workdir)
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
    # The epoch's loss weights the last batch by its size, 10 images.
    assert float(rows[0]["train_loss"]) == pytest.approx((16 * losses[:5].sum() + 10 * losses[5]) / 90, rel=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["test_loss"] for row in summary["metrics"]] == [float(row["test_loss"]) for row in rows]
    assert summary["config"]["num_epochs"] == 3
    assert summary["num_parameters"] == 395_006
    assert summary["data"] == "tiny digits"
    assert summary["test_accuracy"] == float(rows[-1]["test_accuracy"])
    assert summary["best_test_accuracy"] == max(float(row["test_accuracy"]) for row in rows)
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 16


@pytest.mark.parametrize(
    ("where", "when"),
    [
        ("in the steps of epoch 2", BEFORE + EPOCH + 4),
        ("in the evaluation of epoch 2", BEFORE + EPOCH + 9),
        ("after the checkpoint of epoch 1", BEFORE + EPOCH + 1),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(where, when, uninterrupted, tiny_dataset, tmp_path, capsys):
    config = dataclasses.replace(uninterrupted, workdir=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tiny_dataset, stop_at(when))
    assert len(read_metrics(tmp_path / "run")) == 1, where
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 1
    train_and_evaluate(config, tiny_dataset)
    assert "resuming after 1 epochs" in capsys.readouterr().out
    assert untimed_rows(config) == untimed_rows(uninterrupted)
    np.testing.assert_array_equal(read_batch_loss(tmp_path / "run"), read_batch_loss(Path(uninterrupted.workdir)))
    for resumed, expected in zip(latest_state(config), latest_state(uninterrupted)):
        np.testing.assert_array_equal(resumed, expected)


def test_a_crash_between_log_and_checkpoint(uninterrupted, copied, tiny_dataset):
    """Rows that are not in the checkpoint are dropped and rewritten."""
    checkpoints = Path(copied.workdir) / "checkpoints"
    assert max(folder.name for folder in checkpoints.iterdir()) == "3"
    shutil.rmtree(checkpoints / "3")
    (Path(copied.workdir) / "summary.json").unlink()
    train_and_evaluate(copied, tiny_dataset)
    assert untimed_rows(copied) == untimed_rows(uninterrupted)
    assert len(read_batch_loss(Path(copied.workdir))) == 18


def test_many_steps_a_call_and_two_devices(plain_config, tiny_dataset, tmp_path):
    """Like on accelerators, 6 steps and evaluation run in calls of 4. The run is interrupted and resumed."""
    config = dataclasses.replace(plain_config, steps_per_call=4, num_devices=2, num_epochs=1)
    train_and_evaluate(config, tiny_dataset)
    resumed = dataclasses.replace(config, workdir=str(tmp_path / "resumed"))
    with pytest.raises(Interrupted, match=r"\b0 epochs and 4/6 steps"):
        train_and_evaluate(resumed, tiny_dataset, stop_at(BEFORE + 3))  # before the second call
    train_and_evaluate(resumed, tiny_dataset)
    assert untimed_rows(resumed) == untimed_rows(config)


def test_a_row_tells_the_rate_and_the_seconds_of_training(tiny_dataset, tiny_config, no_steps, monkeypatch):
    """The clock advances one second per reading. The run is interrupted in its second epoch."""
    clock = iter(range(1000))
    monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    config = dataclasses.replace(tiny_config, num_epochs=2, schedule="one_cycle", warmup_fraction=0.0)
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tiny_dataset, stop_at(BEFORE + EPOCH - 3 + 4))  # one question in the evaluation
    train_and_evaluate(config, tiny_dataset)
    rows = read_metrics(Path(config.workdir))
    assert [row.learning_rate for row in rows] == pytest.approx([0.05 * (12 - step) / 11 for step in (5, 11)])
    assert [row.seconds for row in rows] == [1, 2]
    assert [row.images_per_second for row in rows] == [90, 45]


def test_an_epoch_against_stored_numbers(tiny_config, tiny_dataset):
    """Pins initial weights, order, augmentation, dropout and steps. A changed random stream fails this test."""
    summary = train_and_evaluate(dataclasses.replace(tiny_config, num_epochs=1), tiny_dataset)
    losses = read_batch_loss(Path(tiny_config.workdir))
    np.testing.assert_allclose(losses, [2.301793, 2.243631, 2.418518, 2.242177, 2.279662, 2.270258], rtol=1e-4)
    assert summary["test_loss"] == pytest.approx(2.292718, rel=1e-4)


# --- Messages, warnings and refusals ---


def test_a_finished_run_is_left_alone(uninterrupted, tiny_dataset, capsys):
    before = (Path(uninterrupted.workdir) / "metrics.csv").read_bytes()
    summary = train_and_evaluate(uninterrupted, tiny_dataset)
    assert "already complete after 3 epochs" in capsys.readouterr().out
    assert summary["epochs"] == 3
    assert (Path(uninterrupted.workdir) / "metrics.csv").read_bytes() == before


def test_small_images_to_the_end_are_warned_of(tiny_dataset, tiny_config, capsys):
    changes = {"model": "all_cnn", "dropout_rates": (0.0,) * 3, "image_sizes": ((14, 1),), "num_epochs": 1}
    with pytest.raises(Interrupted):
        train_and_evaluate(dataclasses.replace(tiny_config, **changes), tiny_dataset, stop_at(START))
    assert "warning: --image-sizes" in capsys.readouterr().err


def test_a_changed_config_is_refused(copied, tiny_dataset, capsys):
    config = Path(copied.workdir) / "config.json"
    before = config.read_bytes()
    with pytest.raises(UserError, match=r"\(learning_rate 0.02 → 0.01, seed 0 → 3\).* --workdir"):
        train_and_evaluate(dataclasses.replace(copied, learning_rate=0.01, seed=3), tiny_dataset)
    assert config.read_bytes() == before
    capsys.readouterr()
    train_and_evaluate(dataclasses.replace(copied, eval_batch_size=30, num_devices=2), tiny_dataset)
    output = capsys.readouterr()
    assert "already complete" in output.out
    assert output.err == ""


def test_other_devices_are_said_where_they_matter(tiny_dataset, tiny_config, no_steps, capsys):
    """Each device normalises its own part of a batch."""
    for normalization, said in (("batch", True), ("none", False)):
        workdir = f"{tiny_config.workdir}-{normalization}"
        config = dataclasses.replace(tiny_config, workdir=workdir, normalization=normalization, num_epochs=1)
        with pytest.raises(Interrupted):
            train_and_evaluate(config, tiny_dataset, stop_at(BEFORE + 3))
        capsys.readouterr()
        train_and_evaluate(dataclasses.replace(config, num_devices=2), tiny_dataset)
        assert ("--num-devices changed from 1 to 2" in capsys.readouterr().err) == said


def test_a_run_without_a_step_may_change(tiny_config, tiny_dataset, no_steps):
    """The first attempt may have run out of memory, after which the user lowers the batch size."""
    with pytest.raises(Interrupted, match="nothing to save"):
        train_and_evaluate(tiny_config, tiny_dataset, stop_at(START))
    finished = dataclasses.replace(tiny_config, batch_size=10, num_epochs=1)
    train_and_evaluate(finished, tiny_dataset)
    workdir = Path(tiny_config.workdir)
    assert len(read_batch_loss(workdir)) == 9
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "metrics.csv").unlink()
    for name in ("summary.json", "batch_loss.npy"):  # each of them marks results to keep
        with pytest.raises(UserError, match="batch_size 10 → 16"):
            train_and_evaluate(tiny_config, tiny_dataset)
        (workdir / name).unlink()
    with pytest.raises(Interrupted):
        train_and_evaluate(tiny_config, tiny_dataset, stop_at(START))


def test_settings_that_the_number_of_steps_forbids(tiny_config, tiny_dataset, capsys):
    for changes, named in (
        ({"num_epochs": 999_999_999}, "--num-epochs 999999999: .* 2,147,483,647"),
        ({"batch_size": 12, "num_devices": 4, "mixup_alpha": 0.2}, "an even number .* --batch-size or --num-devices"),
        ({"batch_size": 91}, "--batch-size 91: .* 90 training images"),
        ({"holdout": 90}, "--holdout 90: .* 90 training images"),
    ):
        with pytest.raises(UserError, match=named):
            train_and_evaluate(dataclasses.replace(tiny_config, **changes), tiny_dataset)
    assert not Path(tiny_config.workdir).exists()  # nothing is left behind
    with pytest.raises(Interrupted):
        train_and_evaluate(
            dataclasses.replace(tiny_config, swa_fraction=0.5, swa_cycles=10), tiny_dataset, stop_at(START)
        )
    assert capsys.readouterr().err.startswith("warning: --swa-fraction")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"epochs": 1, "test_accuracy": 0.1}', "[" * 100_000])
def test_a_lost_or_earlier_summary_is_written_again(content, copied, tiny_dataset):
    summary = Path(copied.workdir) / "summary.json"
    before = json.loads(summary.read_text())
    summary.write_text(content)
    train_and_evaluate(copied, tiny_dataset)
    assert json.loads(summary.read_text()) | {"date": before["date"]} == before  # the test may last until tomorrow


@pytest.mark.parametrize("removed", ["the folder", "what is in it"])
def test_a_finished_run_without_its_checkpoints_is_left_alone(removed, copied, tiny_dataset, capsys):
    workdir = Path(copied.workdir)
    shutil.rmtree(workdir / "checkpoints")
    if removed == "what is in it":
        (workdir / "checkpoints").mkdir()
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    assert train_and_evaluate(copied, tiny_dataset) == json.loads(before["summary.json"])
    output = capsys.readouterr().out
    assert "already complete after 3 epochs" in output
    assert f"remove {workdir}/summary.json" in output
    assert {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before
    (workdir / "summary.json").unlink()
    with pytest.raises(Interrupted, match="nothing to save"):  # without a checkpoint an unfinished run starts over
        train_and_evaluate(copied, tiny_dataset, stop_at(START))
    assert "training from the start" in capsys.readouterr().err
    (workdir / "summary.json").write_bytes(before["summary.json"])
    other = dataclasses.replace(copied, seed=1)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(other)))
    with pytest.raises(Interrupted, match="nothing to save"):  # another recipe's summary is not this run's
        train_and_evaluate(other, tiny_dataset, stop_at(START))


def test_a_run_goes_on_with_its_own_data_alone(copied, tiny_dataset):
    images, labels = tiny_dataset.train_images[::-1], tiny_dataset.train_labels[::-1]
    turned = dataclasses.replace(tiny_dataset, train_images=images, train_labels=labels, source="another copy")
    identity = Path(copied.workdir) / "dataset.json"
    before = identity.read_bytes()
    assert train_and_evaluate(copied, turned)["epochs"] == 3  # the run is complete, so nothing is trained
    (Path(copied.workdir) / "summary.json").unlink()
    with pytest.raises(UserError, match=r"tiny digits.* another copy .*--data-dir"):
        train_and_evaluate(copied, turned)
    assert identity.read_bytes() == before


def test_held_out_images_are_neither_trained_on_nor_the_test_set(plain_config, tiny_dataset, capsys):
    """The run equals one on a dataset of the first 70 training images that tests on the last 20."""
    images, labels = tiny_dataset.train_images, tiny_dataset.train_labels
    split = dataclasses.replace(
        tiny_dataset,
        train_images=images[:70],
        train_labels=labels[:70],
        test_images=images[70:],
        test_labels=labels[70:],
    )
    expected = dataclasses.replace(plain_config, workdir=f"{plain_config.workdir}-split", num_epochs=1)
    train_and_evaluate(expected, split)
    capsys.readouterr()
    config = dataclasses.replace(plain_config, holdout=20, num_epochs=1)
    train_and_evaluate(config, tiny_dataset)
    assert untimed_rows(config) == untimed_rows(expected)
    output = capsys.readouterr().out
    assert "20 held-out training images" in output
    assert "  held-out loss " in output


def test_progressive_sizes_train_and_resume(tiny_config, tiny_dataset, no_steps, monkeypatch):
    """Every remaining size is compiled. A run that was stopped between sizes resumes with the right one."""
    config = dataclasses.replace(
        tiny_config, model="all_cnn", dropout_rates=(0.0,) * 3, image_sizes=((16, 1), (24, 1)), batch_size=45
    )
    compiled, trained = set(), []
    monkeypatch.setattr(Trainer, "compile", lambda self, size, order: compiled.add(size))
    run_steps = lambda self, order, start, count, size: trained.append(size) or np.float32(2)
    monkeypatch.setattr(Trainer, "run_steps", run_steps)
    with pytest.raises(Interrupted, match="1 epochs and 1/2 steps"):
        train_and_evaluate(config, tiny_dataset, stop_at(BEFORE + 2 + 3 + 4))
    assert (compiled, trained) == ({16, 24, 32}, [16, 16, 24])
    compiled.clear()
    trained.clear()
    train_and_evaluate(config, tiny_dataset)
    assert (compiled, trained) == ({24, 32}, [24, 32, 32])


# --- Failing runs ---


def test_divergence_is_said_and_not_logged(tiny_config, tiny_dataset):
    with pytest.raises(UserError, match=r"diverged in epoch 1 .*nan.*--learning-rate"):
        train_and_evaluate(dataclasses.replace(tiny_config, learning_rate=1e30), tiny_dataset)
    assert read_metrics(Path(tiny_config.workdir)) == []


def test_a_stop_in_an_epoch_that_diverged_does_not_save_it(tiny_config, tiny_dataset):
    with pytest.raises(UserError, match="diverged in epoch 1"):
        train_and_evaluate(
            dataclasses.replace(tiny_config, learning_rate=1e30), tiny_dataset, stop_at(BEFORE + 1 + 4)
        )  # after 3 steps; the second's loss is nan
    assert not any(Path(tiny_config.workdir).glob("checkpoints/[0-9]*"))


def test_stalled_training_is_warned_of_or_restarted(tiny_config, tiny_dataset, no_steps, monkeypatch, capsys):
    """The effects of is_stalled, which test_metrics.py tests."""
    monkeypatch.setattr(training, "is_stalled", lambda losses, classes: next(answers, False))
    answers = iter((True,))
    config = dataclasses.replace(tiny_config, learning_rate=1e-12, num_epochs=1)
    train_and_evaluate(config, tiny_dataset)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: training stalled in epoch 1")
    assert "--auto-restart" in warning
    answers = iter((True,))  # resumed with the flag, as advised
    with pytest.raises(Interrupted, match="nothing to save"):
        train_and_evaluate(dataclasses.replace(config, auto_restart=True), tiny_dataset, stop_at(START))
    assert f"starting again in {config.workdir}/restart1" in capsys.readouterr().err

    answers = iter((False, True))
    config = dataclasses.replace(config, workdir=f"{config.workdir}-restarted", auto_restart=True)
    summary = train_and_evaluate(config, tiny_dataset)
    assert (summary["config"]["learning_rate"], summary["config"]["seed"]) == (5e-13, 1)
    assert summary["config"]["swa_learning_rate"] == config.swa_learning_rate / 2
    assert f"starting again in {config.workdir}/restart1: rate 5e-13, seed 1" in capsys.readouterr().err
    assert read_metrics(Path(config.workdir)) == []  # the epoch that stalled is not logged
    with pytest.raises(UserError, match="--auto-restart"):
        train_and_evaluate(dataclasses.replace(config, auto_restart=False), tiny_dataset)
    monkeypatch.setattr(Trainer, "run_epoch", None)  # nothing is trained again
    assert train_and_evaluate(config, tiny_dataset) == json.loads(json.dumps(summary))
    with pytest.raises(UserError, match=r"name .*restart1"):
        load_run(Path(config.workdir), "latest")
    assert load_run(Path(config.workdir) / "restart1", "latest", "bfloat16")[0].dtype == "bfloat16"


def test_a_stalled_training_is_found_by_its_losses(plain_config, tiny_dataset, monkeypatch, capsys):
    """A forced stall: with zero weights all logits are equal, and the rate is too small to change that.

    Its 5 flat steps are more than two epochs of 2. The next seed has a large bias, so not the loss at chance.
    """
    create = trainer.create_train_state

    def create_equal_logits(config, *arguments):
        state = create(config, *arguments)
        bias = np.arange(10, dtype=np.float32) * config.seed
        equal = jax.tree.map(lambda leaf: bias if leaf.shape == (10,) else np.zeros_like(leaf), state.params)
        return state.replace(params=equal)

    monkeypatch.setattr(trainer, "create_train_state", create_equal_logits)
    monkeypatch.setattr(metrics, "STALLED_STEPS", 5)
    config = dataclasses.replace(plain_config, learning_rate=1e-12, auto_restart=True, batch_size=45)
    assert train_and_evaluate(config, tiny_dataset)["config"]["seed"] == 1
    assert "stalled in epoch 3" in capsys.readouterr().err
    assert [row.epoch for row in read_metrics(Path(config.workdir))] == [1, 2]
    assert len(read_metrics(Path(config.workdir) / "restart1")) == 3


def test_restarts_end(tiny_config, tiny_dataset, no_steps, monkeypatch, capsys):
    nothing = {"loss": np.nan, "accuracy": 0.1, "batch_loss": np.zeros(6)}
    monkeypatch.setattr(Trainer, "epoch_metrics", lambda self: nothing)
    config = dataclasses.replace(tiny_config, learning_rate=1e30, auto_restart=True)
    with pytest.raises(UserError, match=r"diverged in epoch 1.* another --seed$"):
        train_and_evaluate(config, tiny_dataset)
    assert capsys.readouterr().err.count("starting again in") == 3
    with pytest.raises(UserError, match=r"restart3: .*learning_rate 1.25e\+29 → 0.01"):  # a changed recipe can't go on
        train_and_evaluate(dataclasses.replace(config, learning_rate=0.08), tiny_dataset)


# --- Optional last steps, other environments ---


def test_the_summary_is_written_before_the_figures(tiny_config, tiny_dataset, no_steps, monkeypatch):
    """A batch system that has sent SIGTERM may soon end the process."""

    def end(*_):
        raise SystemExit

    monkeypatch.setattr(plots, "plot_run", end)
    with pytest.raises(SystemExit):
        train_and_evaluate(dataclasses.replace(tiny_config, num_epochs=1), tiny_dataset)
    assert json.loads((Path(tiny_config.workdir) / "summary.json").read_text())["epochs"] == 1


def test_a_figure_that_fails_costs_one_line(tiny_config, tiny_dataset, monkeypatch, capsys):
    def fail(workdir):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(plots, "plot_run", fail)
    summary = train_and_evaluate(dataclasses.replace(tiny_config, num_epochs=1), tiny_dataset)
    error = capsys.readouterr().err
    assert (error.count("\n"), error.startswith("warning: "), "no font at all" in error) == (1, True, True)
    assert json.loads((Path(tiny_config.workdir) / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_a_training_in_a_thread_where_nothing_can_be_locked(tiny_config, tiny_dataset, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    results = []
    config = dataclasses.replace(tiny_config, num_epochs=1)
    thread = threading.Thread(target=lambda: results.append(train_and_evaluate(config, tiny_dataset)))
    thread.start()
    thread.join()
    assert results[0]["epochs"] == 1
    assert capsys.readouterr().err.count("no locks available") == 1


def test_another_default_generator_changes_nothing(tiny_config, tiny_dataset, run_command, use_tiny_dataset, capsys):
    """A run under JAX_DEFAULT_PRNG_IMPL=rbg is the same, and can be evaluated and resumed without it."""
    expected = dataclasses.replace(tiny_config, num_epochs=1)
    train_and_evaluate(expected, tiny_dataset)
    config = dataclasses.replace(tiny_config, workdir=f"{tiny_config.workdir}-rbg", num_epochs=1)
    with jax.default_prng_impl("rbg"):
        train_and_evaluate(config, tiny_dataset)
    assert untimed_rows(config) == untimed_rows(expected)
    capsys.readouterr()
    status, output, _ = run_command(evaluate.main, "--workdir", config.workdir, "--json")
    row = read_metrics(Path(config.workdir))[-1]
    assert (status, json.loads(output)["test_accuracy"]) == (0, pytest.approx(row.test_accuracy))
    with jax.default_prng_impl("rbg"):
        assert run_command(evaluate.main, "--workdir", expected.workdir)[0] == 0


# --- Lost or damaged logs: the checkpoint has their content ---


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "metrics.csv").unlink(),
        lambda run: (run / "metrics.csv").write_text("epoch\ninf\n"),
        lambda run: (run / "batch_loss.npy").unlink(),
        lambda run: (run / "batch_loss.npy").write_bytes(b""),
        lambda run: (run / "batch_loss.npy").write_bytes((run / "batch_loss.npy").read_bytes()[:-9]),
        lambda run: np.save(run / "batch_loss.npy", np.zeros((18, 2))),
    ],
)
def test_a_damaged_log_is_rebuilt(damage, complete, copied, uninterrupted, tiny_dataset):
    workdir = Path(copied.workdir)
    before = {name: (workdir / name).read_bytes() for name in ("metrics.csv", "batch_loss.npy")}
    damage(workdir)
    if not complete:
        (workdir / "summary.json").unlink()
    summary = train_and_evaluate(copied, tiny_dataset)
    assert {name: (workdir / name).read_bytes() for name in before} == before
    assert [row["epoch"] for row in summary["metrics"]] == [1, 2, 3]


def test_checkpoints_without_their_config_are_refused(copied, tiny_dataset):
    (Path(copied.workdir) / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json.* --workdir"):
        train_and_evaluate(copied, tiny_dataset)


def test_a_damaged_checkpoint_costs_its_epoch_alone(copied, uninterrupted, tiny_dataset, capsys):
    """The run resumes from the previous checkpoint, ends with the same bits, and keeps the damaged one."""
    workdir = Path(copied.workdir)
    file = max((workdir / "checkpoints" / "3").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    (workdir / "summary.json").unlink()
    capsys.readouterr()
    train_and_evaluate(copied, tiny_dataset)
    output = capsys.readouterr()
    assert output.err.count("warning: ") == 1
    assert "2 epochs" in output.err
    assert (workdir / "checkpoints" / "damaged-3").is_dir()
    assert untimed_rows(copied) == untimed_rows(uninterrupted)
    for resumed, expected in zip(latest_state(copied), latest_state(uninterrupted)):
        np.testing.assert_array_equal(resumed, expected)
