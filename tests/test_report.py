import dataclasses
import importlib
import json
import shutil

import pytest

from benchmarks import report
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import EXECUTION_FIELDS, Config
from cifar_jax.errors import UserError


def test_the_readmes_tables_are_those_of_the_results():
    readme = (report.ROOT / "README.md").read_text()
    assert report.render(readme) == readme


def test_a_changed_result_changes_the_readme(monkeypatch):
    readme = (report.ROOT / "README.md").read_text()
    result = report.load("quickstart")
    changed = result | {"test_accuracy": 0.1234}
    original = report.load
    monkeypatch.setattr(report, "load", lambda name: changed if name == "quickstart" else original(name))
    assert "12.34 % of 360 test images" in report.render(readme)
    with pytest.raises(UserError, match="no place for quickstart"):
        report.render("# README")


def test_a_missing_result_is_one_line(monkeypatch, tmp_path, run_command):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    status, _, errors = run_command(report.main, "--check")
    assert (status, errors.count("\n")) == (2, 1)
    assert "quickstart.json" in errors


@pytest.mark.parametrize("name", ["kernels", "parity_lenet5", "all_cnn_reference_seed0", "accuracy_lenet5"])
def test_a_partial_result_or_one_of_other_data_is_one_line(name, monkeypatch, tmp_path, run_command):
    results = tmp_path / "results"
    shutil.copytree(report.RESULTS, results)
    monkeypatch.setattr(report, "RESULTS", results)
    assert run_command(report.main, "--check")[0] == 0
    whole = report.load(name)
    cut = {"results": {}, "seeds": [7], "metrics": [], "config": {}}
    partial = whole | {field: value for field, value in cut.items() if field in whole}
    digits = {"config": {"dataset": "digits"}} if name.startswith("all_cnn") else {"dataset": "digits"}
    for content in (partial, digits):
        (results / f"{name}.json").write_text(json.dumps(content))
        status, _, errors = run_command(report.main, "--check")
        assert (status, errors.count("\n")) == (2, 1)
        assert "measure " in errors


def test_a_reference_run_that_was_cut_off_is_one_line(monkeypatch, run_command):
    original = report.load
    cut = original("lenet5_reference") | {"metrics": original("lenet5_reference")["metrics"][:9]}
    monkeypatch.setattr(report, "load", lambda name: cut if name == "lenet5_reference" else original(name))
    status, _, errors = run_command(report.main, "--check")
    assert (status, errors.count("\n")) == (2, 1)
    assert "lenet5_reference.json: has 9 epochs" in errors


def test_the_ablations_table(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.ablation() == "Not run yet."
    value = lambda mean, std: {"mean": mean, "std": std, "n": 1 if std is None else 2}
    variant = lambda changes, mean, std: {
        "changes": changes,
        "holdout_accuracy": value(mean, std),
        "train_accuracy": value(0.9, std),
    }
    variants = {"the recipe": variant({}, 0.8, 0.01), "no flip": variant({"random_flip": False}, 0.79, None)}
    variants["wild"] = {"changes": {"learning_rate": 9}, "holdout_accuracy": None, "train_accuracy": None}
    content = {"recipe": "lenet5", "num_epochs": 8, "seeds": [0, 1], "variants": variants, "command": "python x"}
    content |= {"hardware": "an abacus", "versions": {"jax": "1"}, "date": "2026-01-01", "note": "Slowly."}
    (tmp_path / "ablation_lenet5.json").write_text(json.dumps(content))
    text = report.ablation()
    assert "| the recipe |  | 80.00 ± 1.00 |  | 90.00 |" in text
    assert "| no flip | random_flip = false | 79.00 | -1.00 | 90.00 |" in text
    assert "| wild | learning_rate = 9 | diverged |  |  |" in text
    content["variants"]["the recipe"] = variants["wild"] | {"changes": {}}
    (tmp_path / "ablation_wild.json").write_text(json.dumps(content))
    assert "| no flip | random_flip = false | 79.00 |  | 90.00 |" in report.ablation()
    assert text.endswith("`python x`: seeds 0, 1; an abacus; jax 1; 2026-01-01. Slowly.")


@pytest.mark.parametrize("name", report.result_names("accuracy_"))
def test_the_results_are_of_the_recipes_as_they_are(name):
    """A field that a result does not have came later: the recipe must have its default."""
    result = report.load(name)
    if name == f"accuracy_{result['recipe']}":  # else of another type or machine
        text = importlib.import_module(f"cifar_jax.configs.{result['recipe']}").__doc__
        assert f"{report.mean_and_deviation(result['test_accuracy'])} % on the test set" in text
    recipe = json.loads(json.dumps(dataclasses.asdict(RECIPES[result["recipe"]])))
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for field in recipe.keys() - {"seed", "dtype", *EXECUTION_FIELDS}:
        assert result["config"].get(field, defaults[field]) == recipe[field], field


def test_three_digits():
    assert [report.three_digits(value) for value in (0.1234, 1.4, 52.04, 178.2, 1200)] == [
        "0.123",
        "1.4",
        "52",
        "178",
        "1,200",
    ]


def test_a_parity_whose_seeds_do_not_differ(monkeypatch):
    result = report.load("parity_lenet5")
    result["last_epoch"] |= {"p_value": None, "confidence_interval_95": None}
    monkeypatch.setattr(report, "load", lambda name: result)
    assert "Difference of the means -0.30, not tested, as no seed differs." in report.parity_lenet5()
