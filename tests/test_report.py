import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest

from benchmarks.report import __main__ as report
from benchmarks.report import accuracy, commands, parity, performance, tutorial
from benchmarks.report.pages import PAGES, render
from benchmarks.report.results import MEASURED, ROOT, Results, mean_and_deviation, three_digits
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import EXECUTION_FIELDS, Config
from cifar_jax.errors import UserError


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the pages and results for the command to change."""
    for page in PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    for page in (tutorial.NOTEBOOK, *tutorial.files(ROOT)):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(MEASURED.folder, tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def change(root, name, **fields):
    path = root / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = (ROOT / page).read_text()
    assert render(page, text, MEASURED) == text


def test_a_changed_result_is_found_and_written(copy, run_command):
    change(copy, "quickstart", test_accuracy=0.1234)
    status, _, errors = run_command(report.main, "--check")
    assert status == 1
    assert "docs/results.md" in errors
    assert "README.md" not in errors
    assert run_command(report.main)[0] == 0
    assert "12.34 % of 360 test images" in (copy / "docs/results.md").read_text()
    drawn = {"accuracy.png", "parity_lenet5.png", "processes.png", "throughput.png", "throughput_avx2.png"}
    shown = {Path(path).name for path in tutorial.files(copy) if path.endswith(".png")}
    assert {path.name for path in (copy / "docs/figures").iterdir()} == drawn | shown
    assert run_command(report.main, "--check")[0] == 0


def test_the_help_of_commands_depends_on_no_terminal(monkeypatch):
    for name, value in {"COLUMNS": "50", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    text = commands.help_text.__wrapped__("predict")
    assert text == commands.help_text("predict")
    frames = {len(line) for line in text.splitlines() if line.startswith("╭")}
    assert (frames, "\x1b" in text) == ({commands.WIDTH}, False)
    assert "--top" in text


def test_a_changed_notebook_is_found_and_written(copy, run_command):
    notebook = copy / tutorial.NOTEBOOK
    notebook.write_text(notebook.read_text().replace("# Tutorial", "# Changed"))
    (copy / "docs/figures/tutorial_6_0.png").unlink()
    status, _, errors = run_command(report.main, "--check")
    assert (status, "docs/tutorial.md" in errors, "tutorial_6_0.png" in errors) == (1, True, True)
    assert run_command(report.main)[0] == 0
    assert (copy / "docs/tutorial.md").read_text().startswith("# Changed")
    assert run_command(report.main, "--check")[0] == 0


@pytest.mark.parametrize("old", ["<!-- begin quickstart -->", "<!-- end quickstart -->"])
def test_a_page_without_a_sections_place_is_refused(old):
    text = (ROOT / "docs/results.md").read_text()
    with pytest.raises(UserError, match="quickstart"):
        render("docs/results.md", text.replace(old, ""), MEASURED)
    with pytest.raises(UserError, match="nothing_makes_this"):
        render("docs/results.md", text + "<!-- begin nothing_makes_this -->", MEASURED)


def test_a_missing_result_is_one_line(copy, run_command):
    (copy / "benchmarks/results/quickstart.json").unlink()
    status, _, errors = run_command(report.main, "--check")
    assert (status, errors.count("\n")) == (2, 1)
    assert "quickstart.json" in errors


@pytest.mark.parametrize("name", ["kernels", "parity_lenet5", "all_cnn_reference_seed0", "accuracy_lenet5"])
def test_a_partial_result_or_one_of_other_data_is_one_line(name, copy, run_command):
    assert run_command(report.main, "--check")[0] == 0
    whole = MEASURED.load(name)
    cut = {"results": {}, "seeds": [7], "metrics": [], "config": {}}
    partial = {field: value for field, value in cut.items() if field in whole}
    digits = {"config": {"dataset": "digits"}} if name.startswith("all_cnn") else {"dataset": "digits"}
    for fields in (partial, digits):
        change(copy, name, **fields)
        status, _, errors = run_command(report.main, "--check")
        assert (status, errors.count("\n")) == (2, 1)
        assert "measure " in errors


def test_a_reference_run_that_was_cut_off_is_one_line(copy, run_command):
    change(copy, "lenet5_reference", metrics=MEASURED.load("lenet5_reference")["metrics"][:9])
    status, _, errors = run_command(report.main, "--check")
    assert (status, errors.count("\n")) == (2, 1)
    assert "lenet5_reference.json: has 9 epochs" in errors


def test_the_headline_follows_the_reference_run(copy):
    results = Results(copy / "benchmarks" / "results")
    assert "| only 3 of 200 epochs were run |" in accuracy.headline(results)
    run = results.load("all_cnn_reference_seed0")
    change(copy, "all_cnn_reference_seed0", metrics=run["metrics"] * 100, epochs=200, test_accuracy=0.8991)
    assert "| 89.91 (one seed) |" in accuracy.headline(results)
    assert "\n| 200 | 89.9 | 34.99 |  |" in accuracy.all_cnn_reference(results)
    assert "over the seeds 0, 1, 2, one model" in accuracy.headline(results)
    change(copy, "accuracy_lenet5", seeds=[7, 8])
    assert "over the seeds 0, 1, 2 or 7, 8, one model" in accuracy.headline(results)


def test_the_summaries_show_the_largest_error_and_the_ratio(copy):
    results = Results(copy / "benchmarks" / "results")
    checks = [dict(check) for check in results.load("parity_keras")["checks"]]
    for check in checks:
        if check["name"].startswith("lenet5: logits of"):
            check |= {"error": 0.25, "passed": False}
    change(copy, "parity_keras", checks=checks)
    text = parity.parity_summary(results)
    assert "| checks passed | 92 of 92 | 101 of 102 |" in text
    assert "| logits of both networks, relative | 6.9e-07 | 2.5e-01 |" in text
    workload = results.load("throughput")["workloads"]["lenet5_batch4"]
    ours, theirs = (
        workload["contenders"][name]["phases"]["training"]["images_per_second"]
        for name in ("jax", workload["best_pytorch"]["training"]["contender"])
    )
    assert f"| LeNet-5, batch 4 | {ours:,.0f} ({ours / theirs:.2f}×) |" in performance.throughput_summary(results)


def test_the_ablations_table(tmp_path):
    results = Results(tmp_path)
    assert accuracy.ablation(results) == "Not run yet."
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
    text = accuracy.ablation(results)
    assert "| the recipe |  | 80.00 ± 1.00 |  | 90.00 |" in text
    assert "| no flip | random_flip = false | 79.00 | -1.00 | 90.00 |" in text
    assert "| wild | learning_rate = 9 | diverged |  |  |" in text
    assert text.endswith("`python x`: seeds 0, 1; an abacus; jax 1; 2026-01-01. Slowly.")
    content["variants"]["the recipe"] = variants["wild"] | {"changes": {}}
    (tmp_path / "ablation_wild.json").write_text(json.dumps(content))
    assert "| no flip | random_flip = false | 79.00 |  | 90.00 |" in accuracy.ablation(results)


@pytest.mark.parametrize("name", MEASURED.names("accuracy_"))
def test_the_results_are_of_the_recipes_as_they_are(name):
    """A field that a result lacks was added later, so the recipe must have its default."""
    result = MEASURED.load(name)
    if name == f"accuracy_{result['recipe']}":  # others have another dtype or machine
        text = importlib.import_module(f"cifar_jax.configs.{result['recipe']}").__doc__
        assert f"{mean_and_deviation(result['test_accuracy'])} % on the test set" in text
    recipe = json.loads(json.dumps(dataclasses.asdict(RECIPES[result["recipe"]])))
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for field in recipe.keys() - {"seed", "dtype", *EXECUTION_FIELDS}:
        assert result["config"].get(field, defaults[field]) == recipe[field], field


def test_small_images_count_by_their_pixels():
    curves = [[0.7, 0.8, 0.9, 0.91], [0.6, 0.9, 0.91, 0.91]]
    result = {"config": {"image_sizes": [[16, 1], [24, 1]]}, "test_accuracy_by_epoch": curves}
    assert accuracy.epochs_of_32_pixels(result, 0.7) == 0.25 + 0.5625
    assert accuracy.epochs_of_32_pixels(result, 0.9) == 0.25 + 0.5625 + 1
    assert accuracy.epochs_of_32_pixels(result, 0.95) is None


def test_three_digits():
    assert [three_digits(value) for value in (0.1234, 1.4, 52.04, 178.2, 1200)] == [
        "0.123",
        "1.4",
        "52",
        "178",
        "1,200",
    ]


def test_a_parity_whose_seeds_do_not_differ(copy):
    last = MEASURED.load("parity_lenet5")["last_epoch"] | {"p_value": None, "confidence_interval_95": None}
    change(copy, "parity_lenet5", last_epoch=last)
    text = parity.parity_lenet5(Results(copy / "benchmarks" / "results"))
    assert "Difference of the means -0.30, not tested, as no seed differs." in text
