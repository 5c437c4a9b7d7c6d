import dataclasses
import itertools
import json
import os
import signal

import numpy as np
import pytest
import scipy.stats
from frameworks import ABSENT, torch

from benchmarks import ablation, accuracy, parity_training, pytorch_training, seeds, workloads
from cifar_jax import trainer
from cifar_jax.batches import epoch_order
from cifar_jax.configs import RECIPES
from cifar_jax.datasets import DATASETS
from cifar_jax.errors import UserError
from cifar_jax.outcomes import FailedTraining
from cifar_jax.train import train_and_evaluate
from cifar_jax.train_step import create_train_state

pytestmark = pytest.mark.usefixtures("direct_convolutions", "no_figures")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On a busy machine PyTorch's threads spend most of their time waiting for each other."""
    if ABSENT:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick_recipe(monkeypatch, tiny_dataset, use_tiny_dataset):
    recipe = dataclasses.replace(RECIPES["lenet5_reference"], learning_rate=0.02, num_devices=1, eval_batch_size=30)
    for module in (seeds, workloads):
        monkeypatch.setattr(module, "RECIPES", {"lenet5_reference": recipe})
    for module in (accuracy, ablation, parity_training):
        named = lambda name, data_dir: dataclasses.replace(tiny_dataset, info=DATASETS[name])
        monkeypatch.setattr(module, "load_dataset", named)


def never():
    return False


def test_compare_is_welchs_test():
    ours, theirs = [0.70, 0.72, 0.71], [0.69, 0.70, 0.695]
    result = parity_training.compare({"jax": ours, "pytorch": theirs})
    assert result["jax"] == {"mean": pytest.approx(0.71), "std": pytest.approx(0.01), "n": 3}
    assert result["difference"] == pytest.approx(0.015)
    assert result["p_value"] == pytest.approx(scipy.stats.ttest_ind(ours, theirs, equal_var=False).pvalue)
    low, high = result["confidence_interval_95"]
    bounds = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert (low, high) == pytest.approx((bounds.low, bounds.high))


def test_seeds_that_do_not_differ_have_no_p_value():
    result = parity_training.compare({"jax": [0.5, 0.5], "pytorch": [0.5, 0.5]})
    assert result["difference"] == 0
    assert result["p_value"] is result["confidence_interval_95"] is None


def test_parity_asks_for_pytorch_before_it_trains(quick_recipe, tmp_path, run_command, monkeypatch):
    def absent():
        raise UserError("PyTorch is not installed")

    monkeypatch.setattr(pytorch_training.pytorch, "import_torch", absent)
    monkeypatch.setitem(parity_training.TRAINERS, "jax", None)
    status, _, errors = run_command(accuracy.main, "--parity", "lenet5", "--out", tmp_path)
    assert (status, errors) == (2, "error: PyTorch is not installed\n")


def test_parity_in_parts_and_together(quick_recipe, tiny_dataset, tmp_path, run_command, monkeypatch):
    """PyTorch's part in two calls, stopped between epochs, equals one call. Then both frameworks are compared."""
    trained = {}

    def train_once(config, dataset, stop):
        """JAX's part is the same each time."""
        if config.seed not in trained:
            trained[config.seed] = seeds.train_in_jax(config, dataset, stop)
        return trained[config.seed]

    monkeypatch.setitem(parity_training.TRAINERS, "jax", train_once)
    flags = ("--seeds", "0", "1", "--num-epochs", "2")
    parts = ("--parity", "lenet5", "--out", tmp_path / "parts", "--runs", tmp_path / "parts")
    status, _, _ = run_command(accuracy.main, *parts, "--seeds", "0", "--num-epochs", "1", "--frameworks", "pytorch")
    assert status == 0
    assert not (tmp_path / "parts" / "parity_lenet5.json").exists()
    results = []
    for folder in ("parts", "whole"):
        out = tmp_path / folder
        status, _, errors = run_command(accuracy.main, "--parity", "lenet5", "--out", out, "--runs", out, *flags)
        assert (status, errors) == (0, "")
        results.append(json.loads((out / "parity_lenet5.json").read_text()))
    assert results[0]["test_accuracy_by_epoch"] == results[1]["test_accuracy_by_epoch"]
    curves = results[0]["test_accuracy_by_epoch"]
    checkpoint = torch.load(
        tmp_path / "whole" / "parity_lenet5" / "pytorch_seed0" / "checkpoint.pth", weights_only=True
    )
    (tmp_path / "whole" / "parity_lenet5" / "pytorch_seed1" / "checkpoint.pth").write_bytes(b"PK")
    whole = ("--parity", "lenet5", "--out", tmp_path / "new", "--runs", tmp_path / "whole", "--frameworks", "pytorch")
    status, _, errors = run_command(accuracy.main, *whole, *flags)
    assert status == 2
    assert "checkpoint.pth: damaged: remove it" in errors
    torch.save(checkpoint | {"recipe": "another"}, tmp_path / "parts" / "parity_lenet5/pytorch_seed0/checkpoint.pth")
    status, _, errors = run_command(accuracy.main, *parts, *flags)
    assert status == 2
    assert "another recipe" in errors
    shorter = seeds.configure(seeds.Arguments(tmp_path, num_epochs=1, runs=tmp_path), "lenet5_reference", "", 0)
    shorter = dataclasses.replace(shorter, workdir=str(tmp_path / "whole" / "parity_lenet5" / "pytorch_seed0"))
    metrics = pytorch_training.train_in_pytorch(shorter, tiny_dataset, never)["metrics"]
    assert len(metrics) == 1  # the checkpoint has two
    assert np.shape(curves["jax"]) == np.shape(curves["pytorch"]) == (2, 2)
    assert min(run[-1] for runs in curves.values() for run in runs) > 0.2  # both learn
    assert results[0]["last_epoch"]["jax"]["mean"] == pytest.approx(np.mean([run[-1] for run in curves["jax"]]))


def test_a_recipe_over_seeds(quick_recipe, tmp_path, run_command):
    flags = ("--recipe", "lenet5_reference", "--seeds", "0", "1", "--num-epochs", "2", "--runs", tmp_path)
    status, _, errors = run_command(accuracy.main, *flags, "--out", tmp_path)
    assert (status, errors) == (0, "")
    content = json.loads((tmp_path / "accuracy_lenet5_reference.json").read_text())
    curves = content["test_accuracy_by_epoch"]
    assert np.shape(curves) == (2, 2)
    last = [curve[-1] for curve in curves]
    assert content["test_accuracy"] == {"mean": np.mean(last), "std": pytest.approx(np.std(last, ddof=1)), "n": 2}
    runs = [json.loads((tmp_path / f"accuracy_lenet5_reference/seed{n}/summary.json").read_text()) for n in (0, 1)]
    assert content["train_accuracy"]["mean"] == pytest.approx(np.mean([run["train_accuracy"] for run in runs]))
    assert content["training_seconds"] == [run["training_seconds"] for run in runs]
    assert content["seconds_to"]["0.70"] == [accuracy.time_to(run["metrics"], 0.7) for run in runs]
    assert content["test_loss_by_epoch"] == [[row["test_loss"] for row in run["metrics"]] for run in runs]
    assert content["cost"]["images"] == 2 * 90
    assert content["command"].startswith(
        "python -m benchmarks.accuracy --recipe lenet5_reference --seeds 0 1 --num-epochs 2 --runs test_"
    )
    assert (content["dataset"], content["config"]["dtype"]) == ("cifar10", "float32")
    status, _, _ = run_command(accuracy.main, *flags, "--name", "again", "--out", tmp_path)
    again = json.loads((tmp_path / "again.json").read_text())
    assert (status, again["test_accuracy_by_epoch"]) == (0, curves)
    status, _, errors = run_command(accuracy.main, *flags, "--dtype", "bfloat16", "--out", tmp_path)
    assert status == 2
    assert errors.endswith("(dtype float32 → bfloat16): name another --runs\n")
    status, _, errors = run_command(accuracy.main, *flags, "--num-epochs", "3", "--out", tmp_path)
    assert status == 2
    assert errors.endswith("(num_epochs 2 → 3): name another --runs\n")


@pytest.mark.parametrize(("dropout", "rate"), [(0.0, 0.02), (0.5, 1e-12)])
def test_pytorch_trains_the_recipe(dropout, rate, quick_recipe, tiny_dataset, tmp_path, monkeypatch):
    """With JAX's weights and order, losses without dropout agree. With dropout and no steps, evaluations agree."""
    config = seeds.configure(seeds.Arguments(tmp_path, num_epochs=2), "lenet5_reference", "", 0)
    config = dataclasses.replace(config, dropout_rates=(dropout, dropout), learning_rate=rate)
    ours = train_and_evaluate(dataclasses.replace(config, workdir=str(tmp_path / "jax")))
    create_model = pytorch_training.pytorch.create_model

    def from_jax(*arguments, **options):
        network = create_model(*arguments, **options)
        pytorch_training.pytorch.load_params(network, create_train_state(config, 1).params)
        return network

    orders = iter(range(2))
    monkeypatch.setattr(pytorch_training.pytorch, "create_model", from_jax)
    in_order = lambda count: torch.tensor(np.array(epoch_order(config.seed, next(orders), count)))
    monkeypatch.setattr("torch.randperm", in_order)
    config = dataclasses.replace(config, workdir=str(tmp_path / "pytorch"))
    theirs = pytorch_training.train_in_pytorch(config, tiny_dataset, never)
    for field in ("test_loss", "test_accuracy", *([] if dropout else ["train_loss"])):
        values = [[row[field] for row in result["metrics"]] for result in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=field)


def test_an_ablation(quick_recipe, tmp_path, run_command, monkeypatch):
    """It holds images out. A variant that diverges does not stop it."""
    monkeypatch.setattr(ablation, "HOLDOUT", 10)
    variants = {"the recipe": {}, "no dropout": {"dropout_rates": (0.0, 0.0)}, "wild": {"learning_rate": 1e30}}
    monkeypatch.setattr(ablation, "ABLATIONS", {"lenet5_reference": variants})
    flags = ("--ablation", "lenet5_reference", "--seeds", "0", "--num-epochs", "1", "--runs", tmp_path)
    status, output, errors = run_command(accuracy.main, *flags, "--out", tmp_path)
    assert (status, errors) == (0, "")
    assert "wild: training diverged" in output
    content = json.loads((tmp_path / "ablation_lenet5_reference.json").read_text())["variants"]
    assert {name: variant["changes"] for name, variant in content.items()} == {
        "the recipe": {},
        "no dropout": {"dropout_rates": [0.0, 0.0]},
        "wild": {"learning_rate": 1e30},
    }
    wild = content.pop("wild")
    assert wild["holdout_accuracy"] is wild["train_accuracy"] is None
    runs = tmp_path / "ablation_lenet5_reference"
    for name, variant in content.items():
        folder = runs / name.replace(" ", "_") / "seed0"
        summary, config = (json.loads((folder / f"{file}.json").read_text()) for file in ("summary", "config"))
        assert variant["holdout_accuracy"] == {"mean": summary["test_accuracy"], "std": None, "n": 1}
        assert variant["train_accuracy"]["mean"] == summary["train_accuracy"]
        assert config["holdout"] == 10
        assert config["dropout_rates"] == ([0.2, 0.2] if name == "the recipe" else [0.0, 0.0])
    del variants["the recipe"], variants["no dropout"]  # diverging variants alone must not crash either
    assert run_command(accuracy.main, *flags, "--out", tmp_path)[0] == 0
    assert "jax" in json.loads((tmp_path / "ablation_lenet5_reference.json").read_text())["versions"]


def test_a_shorter_training_has_fewer_epochs_of_each_image_size(tmp_path):
    for num_epochs in range(1, RECIPES["all_cnn"].num_epochs + 1):
        arguments = seeds.Arguments(out=tmp_path, num_epochs=num_epochs)
        sizes = seeds.configure(arguments, "all_cnn", "run", 0).image_sizes
        assert sum(epochs for _, epochs in sizes) < num_epochs
    assert sizes == RECIPES["all_cnn"].image_sizes
    assert seeds.configure(arguments, "all_cnn", "run", 0, image_sizes=()).image_sizes == ()


def test_a_recipes_dataset_is_its_own(tmp_path):
    datasets = [
        seeds.configure(seeds.Arguments(tmp_path, dataset=dataset), recipe, "run", 0).dataset
        for recipe, dataset in (("quickstart", None), ("lenet5", None), ("lenet5", "digits"))
    ]
    assert datasets == ["digits", "cifar10", "digits"]


def test_an_ablations_hardware_is_that_of_its_trainings(quick_recipe, tmp_path, monkeypatch):
    """The runs may have been made by another process."""
    monkeypatch.setattr(ablation, "HOLDOUT", 10)
    monkeypatch.setattr(ablation, "ABLATIONS", {"lenet5_reference": {"the recipe": {}, "SAM": {"sam_rho": 0.05}}})
    summaries = iter([("an abacus", "2026-01-02"), ("a quipu", "2026-01-01")])

    def train(config, dataset, stop):
        hardware, date = next(summaries)
        origin = {"hardware": hardware, "versions": {"jax": "1"}, "date": date}
        return {"test_accuracy": 0.5, "train_accuracy": 0.75} | origin

    monkeypatch.setattr(ablation, "train_and_evaluate", train)
    content = ablation.run_ablation(seeds.Arguments(tmp_path, seeds=(0,)), "lenet5_reference", never)
    assert [variant["holdout_accuracy"]["mean"] for variant in content["variants"].values()] == [0.5, 0.5]
    assert [variant["train_accuracy"]["mean"] for variant in content["variants"].values()] == [0.75, 0.75]
    assert content["hardware"] == "a quipu; an abacus"
    assert (content["versions"], content["date"]) == ({"jax": "1"}, "2026-01-01 and 2026-01-02")


@pytest.mark.parametrize(
    ("mode", "number", "saved"),
    [
        (("--recipe", "lenet5_reference"), signal.SIGTERM, "1 epochs and 16/23 steps"),
        (("--ablation", "lenet5_reference"), signal.SIGINT, "1 epochs and 16/20 steps"),
        (("--parity", "lenet5", "--frameworks", "pytorch"), signal.SIGHUP, "1 epochs and 0/23 steps"),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    mode, number, saved, quick_recipe, tmp_path, run_command, monkeypatch, request
):
    """JAX stops within an epoch, PyTorch after a complete epoch. The exit status is the signal's."""
    monkeypatch.setattr(ablation, "HOLDOUT", 10)
    monkeypatch.setattr(ablation, "ABLATIONS", {"lenet5_reference": {"the recipe": {}}})
    previous = signal.signal(number, signal.SIG_DFL)  # it may be ignored in the process that starts the tests
    request.addfinalizer(lambda: signal.signal(number, previous))

    def signal_in(function, call_number):
        calls = itertools.count(1)

        def call(*arguments):
            result = function(*arguments)
            if next(calls) == call_number:
                os.kill(os.getpid(), number)
            return result

        return call

    monkeypatch.setattr(pytorch_training.Run, "save", signal_in(pytorch_training.Run.save, 1))
    monkeypatch.setattr(trainer.Trainer, "run_steps", signal_in(trainer.Trainer.run_steps, 3))
    flags = (*mode, "--seeds", "0", "--num-epochs", "2", "--runs", tmp_path, "--out", tmp_path)
    status, _, errors = run_command(accuracy.main, *flags)
    assert status == 128 + number
    assert errors.splitlines()[-1].startswith(f"saved after {saved}")
    assert not list(tmp_path.glob("*.json"))
    status, output, _ = run_command(accuracy.main, *flags)
    assert status == 0
    assert ("epoch  2 test" if "pytorch" in mode else f"resuming after {saved}") in output
    assert "epoch  1 test" not in output


@pytest.mark.parametrize("mode", [("--recipe", "lenet5_reference"), ("--parity", "lenet5")])
def test_a_diverged_seed_is_one_line(mode, quick_recipe, tmp_path, run_command, monkeypatch):
    def diverge(config, dataset, stop):
        raise FailedTraining("training diverged in epoch 1", config)

    monkeypatch.setattr(seeds, "train_and_evaluate", diverge)
    status, _, errors = run_command(accuracy.main, *mode, "--out", tmp_path)
    assert status == 2
    assert errors == "error: seed 0: training diverged in epoch 1: change the recipe\n"


def test_every_ablations_variants_are_valid():
    for recipe, variants in ablation.ABLATIONS.items():
        configs = [dataclasses.replace(RECIPES[recipe], **changes) for changes in variants.values()]
        assert configs.count(RECIPES[recipe]) == 1  # each other variant changes something


def test_time_and_cost():
    metrics = [{"test_accuracy": value, "seconds": 2.0} for value in (0.5, 0.7, 0.69, 0.8)]
    assert [accuracy.time_to(metrics, value) for value in (0.5, 0.7, 0.75, 0.81)] == [2.0, 4.0, 8.0, None]
    config = dataclasses.replace(RECIPES["all_cnn_reference"], num_epochs=3, image_sizes=((16, 1),))
    cost = accuracy.training_cost(config, 10)
    flops = lambda size: workloads.flops_per_image(config, size)["training"]
    assert cost == {"images": 30, "flops": 10 * (flops(16) + 2 * flops(32))}
    assert 0.15 < flops(16) / flops(32) < 0.25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--recipe"),
        (("--recipe", "resnet"), "'resnet'"),
        (("--ablation", "quickstart"), "choose one of lenet5"),
        (("--parity", "lenet5", "--seeds", "1", "1"), "each once"),
        (
            ("--parity", "lenet5", "--dtype", "bfloat16"),
            "--dtype bfloat16: --parity",
        ),
        (("--parity", "all_cnn"), "optimizer, nesterov, schedule, lr_decay, rotation_degrees"),
        (("--parity", "lenet5", "--frameworks", "jax", "jax"), "--frameworks jax jax: "),
        (("--recipe", "lenet5", "--frameworks", "pytorch"), "--frameworks needs --parity"),
        (("--parity", "lenet5", "--frameworks"), "--frameworks : "),
        (("--recipe", "lenet5", "--name", "a/b"), "a/b.json: "),
        (("--ablation", "lenet5", "--seeds", "0", "4294967296"), "--seeds 4294967296: "),
        (("--ablation", "lenet5", "--dataset", "digits"), "--dataset digits: "),
        (("--recipe", "lenet5", "--num-epochs", "0"), "--num-epochs 0: "),
        (("--recipe", "lenet5", "--out", "/dev/null/x"), "/dev/null/x: Not a directory"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, run_command):
    status, _, errors = run_command(accuracy.main, "--out", tmp_path / "new" / "out", *flags)
    assert status == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert [*tmp_path.iterdir(), *(name for name in os.listdir() if name == "runs")] == []


def test_one_seed_is_no_comparison(run_command, tmp_path):
    status, _, errors = run_command(accuracy.main, "--parity", "lenet5", "--out", tmp_path, "--seeds", "0")
    assert status == 2
    assert "two or more" in errors
