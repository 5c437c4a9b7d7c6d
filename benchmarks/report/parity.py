"""Parity tables: every check of the two scripts, a summary, and whole runs in both frameworks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.report.results import FRAMEWORKS, Results, environment, mean_and_deviation, percent, table

Check = dict[str, Any]


def _number(value: float | None) -> str:
    if value is None:
        return "NaN"
    return f"{value:.1e}" if value else "0"


def parity_table(result: dict[str, Any]) -> str:
    """All checks of a parity script. The checks of a model's initial tensors become one row, the worst of them."""
    rows = [check for check in result["checks"] if ": initial " not in check["name"]]
    for model in ("all_cnn", "lenet5"):
        checks = [check for check in result["checks"] if check["name"].startswith(f"{model}: initial ")]
        share = lambda check: math.inf if check["error"] is None else check["error"] / (check["tolerance"] or 1)
        nearest = max(checks, key=share)
        name = f"{model}: {len(checks)} checks of initial distributions; nearest to its tolerance: "
        name += nearest["name"].removeprefix(f"{model}: initial ")
        rows.append(nearest | {"name": name, "passed": all(check["passed"] for check in checks)})
    cells = [
        [row["name"], _number(row["error"]), _number(row["tolerance"]), row["why"], "pass" if row["passed"] else "FAIL"]
        for row in rows
    ]
    summary = f"{_passed(result)} checks passed. {environment(result)}"
    return f"{table(['check', 'error', 'tolerance', 'why this tolerance', ''], cells)}\n\n{summary}"


def _passed(result: dict[str, Any]) -> str:
    return f"{sum(check['passed'] for check in result['checks'])} of {len(result['checks'])}"


def _largest(*parts: str) -> Callable[[dict[str, Any]], str]:
    """Returns a cell: the largest error of the checks whose names contain all parts, or a dash if there are none."""

    def cell(result: dict[str, Any]) -> str:
        errors = [check["error"] for check in result["checks"] if all(part in check["name"] for part in parts)]
        return _number(None if None in errors else max(errors)) if errors else "–"

    return cell


SUMMARY: dict[str, Callable[[dict[str, Any]], str]] = {
    "checks passed": _passed,
    "logits of both networks, relative": _largest(": logits of"),
    "gradients in float32, relative": _largest(": gradients, float32"),
    "gradients in float64, relative": _largest(": gradients, float64"),
    "optimizer, 100 steps of given gradients": _largest("optimizer of", "float32"),
    "augmentation in float64, pixels from 0 to 1": _largest("augmentation of", "float64"),
    "predictions of released networks that differ, of 10,000": _largest("differing arg-max"),
}


def parity_summary(results: Results) -> str:
    """The largest errors in comparison with each framework, and whole runs of LeNet-5."""
    scripts = {"PyTorch": results.load("parity_pytorch"), "Keras": results.load("parity_keras")}
    rows = [[title, *(cell(result) for result in scripts.values())] for title, cell in SUMMARY.items()]
    training = results.load("parity_lenet5")
    ours, theirs = (mean_and_deviation(training["last_epoch"][name]) for name in FRAMEWORKS)
    note = (
        f"`lenet5_reference` trained with the seeds {', '.join(map(str, training['seeds']))} in both frameworks: "
        f"{ours} % here, {theirs} % in PyTorch. Difference of the means {_difference(training['last_epoch'])}."
    )
    return f"{table(['largest error', *(f'beside {name}' for name in scripts)], rows)}\n\n{note}"


def _difference(last: dict[str, Any]) -> str:
    """Formats the difference of the frameworks' means in percentage points, with Welch's interval and test."""
    test = "not tested, as no seed differs"
    if last["p_value"] is not None:
        low, high = last["confidence_interval_95"]
        test = f"95 % confidence interval {100 * low:+.2f} to {100 * high:+.2f}, p = {last['p_value']:.2f} (Welch)"
    return f"{100 * last['difference']:+.2f}, {test}"


def parity_lenet5(results: Results) -> str:
    result = results.load("parity_lenet5")
    last, rows = result["last_epoch"], []
    for name, title in FRAMEWORKS.items():
        by_seed = ", ".join(percent(run[-1]) for run in result["test_accuracy_by_epoch"][name])
        rows.append([title, by_seed, mean_and_deviation(last[name])])
    columns = ["", f"test accuracy after epoch {result['num_epochs']}, by seed", "mean ± standard deviation"]
    difference = f"Difference of the means {_difference(last)}."
    return f"{table(columns, rows)}\n\n{difference} Seeds {result['seeds']}; {environment(result)}"


def early_training(results: Results) -> str:
    result = results.load("early_training")
    rows = []
    for run in result["runs"]:
        losses = run["batch_loss"]
        smooth = [sum(losses[i : i + 5]) / 5 for i in range(len(losses) - 4)]
        low = smooth.index(min(smooth))
        numbers = [f"{smooth[low]:.3f}", f"{low + 2}", f"{max(smooth[low:]):.3f}"]
        rows.append([str(run["seed"]), FRAMEWORKS[run["framework"]], *numbers])
    columns = ["seed", "", "lowest loss, mean of 5 steps", "near step", "highest afterwards"]
    return f"{table(columns, rows)}\n\n{environment(result)}"
