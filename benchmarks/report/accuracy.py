"""Accuracy tables: headline, recipes over seeds, ablations, released weights, reference recipes."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.report.results import (
    KERAS_CURVE,
    KERAS_LABEL,
    NETWORKS,
    NOTEBOOK_LABEL,
    NOTEBOOK_LOG,
    ORIGINALS,
    Results,
    environment,
    mean_and_deviation,
    measured_by,
    percent,
    recipe_and_type,
    table,
    three_digits,
)
from cifar_jax.errors import UserError

RELEASED = {"float32": "float32", "bfloat16": "bfloat16", "flip_tta": "float32, `--flip-tta`"}


def headline(results: Results) -> str:
    """One row per network: the original, its recipe here, the best recipe here."""
    parity = results.load("parity_lenet5")
    rows, hardware, seeds = [], set(), {tuple(parity["seeds"])}
    reference = {"lenet5": mean_and_deviation(parity["last_epoch"]["jax"]), "all_cnn": _all_cnn_reference_cell(results)}
    sizes = {"lenet5": "lenet5_reference", "all_cnn": "all_cnn_reference_seed0"}
    for model, title in NETWORKS.items():
        best = max(_recipes_of(results, model), key=lambda result: result["test_accuracy"]["mean"])
        hardware |= set(map(_machine, best["hardware"].split("; ")))
        seeds.add(tuple(best["seeds"]))
        cells = [title, f"{results.load(sizes[model])['num_parameters']:,}", ORIGINALS[model], reference[model]]
        value = f"**{mean_and_deviation(best['test_accuracy'])}** (`{best['recipe']}`)"
        minutes = three_digits(min(best["training_seconds"]) / 60)
        rows.append([*cells, value, str(best["config"]["num_epochs"]), minutes])
    columns = ["network", "parameters", "original program", "its recipe, here", "best recipe here", "epochs", "minutes"]
    names = " or ".join(", ".join(map(str, own)) for own in sorted(seeds))
    note = (
        "Test accuracy in percent after the last epoch: mean ± sample standard deviation (n − 1) over the seeds "
        f"{names}, one model, one view of each image. Minutes of training of the fastest seed; they are rough, as "
        f"other work ran on the machine. Hardware: {'; '.join(sorted(hardware))}."
    )
    return f"{table(columns, rows)}\n\n{note}"


def _machine(hardware: str) -> str:
    """Returns the machine without the number of devices that its CPU was divided into."""
    devices, _, machine = hardware.partition(", ")
    return machine if devices.endswith("× cpu") else hardware


def _recipes_of(results: Results, model: str) -> list[dict[str, Any]]:
    return [result for result in results.all("accuracy_") if result["config"]["model"] == model]


def _all_cnn_reference_cell(results: Results) -> str:
    run = results.load("all_cnn_reference_seed0")
    if run["epochs"] == run["config"]["num_epochs"]:
        return f"{percent(run['test_accuracy'])} (one seed)"
    return f"only {run['epochs']} of {run['config']['num_epochs']} epochs were run"


def quickstart(results: Results) -> str:
    result = results.load("quickstart")
    return (
        f"{percent(result['test_accuracy'])} % of 360 test images after {result['epochs']} epochs, "
        f"{result['training_seconds']:.0f} s of training. Seed {result['config']['seed']}; {environment(result)}"
    )


def epochs_of_32_pixels(result: dict[str, Any], accuracy: float) -> float | None:
    """Returns how many epochs of 32×32 pixels have as many pixels as those in which every seed passes an accuracy."""
    sizes = [size for size, epochs in result["config"]["image_sizes"] for _ in range(epochs)]
    needed = 0
    for curve in result["test_accuracy_by_epoch"]:
        passed = next((epoch for epoch, reached in enumerate(curve, 1) if reached >= accuracy), None)
        if passed is None:
            return None
        needed = max(needed, passed)
    return sum((size / 32) ** 2 for size in sizes[:needed]) + max(0, needed - len(sizes))


def accuracy(results: Results) -> str:
    """Every recipe over its seeds, then the minutes and the pixels in which it reached given accuracies."""
    rows, times, pixels, notes = [], [], [], []
    measured = results.all("accuracy_")
    thresholds = list(dict.fromkeys(name for result in measured for name in result["seconds_to"]))
    for result in measured:
        model = result["config"]["model"]
        seconds = min(result["training_seconds"])
        fastest = result["training_seconds"].index(seconds)  # other seeds may have shared the machine
        value = mean_and_deviation(result["test_accuracy"])
        cost = [f"{result['cost']['images'] / 1e6:.2f} M", f"{result['cost']['flops'] / 1e15:.2f}"]
        seeds = ", ".join(map(str, result["seeds"]))
        epochs = str(result["config"]["num_epochs"])
        row = [NETWORKS[model], recipe_and_type(result), ORIGINALS[model], value, seeds, epochs]
        rows.append([*row, three_digits(seconds / 60), *cost])
        reached = [result["seconds_to"].get(name, [None]) for name in thresholds]
        cells = ["–" if None in passed else three_digits(passed[fastest] / 60) for passed in reached]
        times.append([NETWORKS[model], recipe_and_type(result), *cells])
        epochs_to = [epochs_of_32_pixels(result, float(name)) for name in thresholds]
        cells = ["–" if number is None else f"{number:.1f}" for number in epochs_to]
        pixels.append([NETWORKS[model], recipe_and_type(result), *cells])
        notes.append(measured_by(result))
    columns = ["network", "recipe", "original", "test accuracy", "seeds", "epochs", "minutes", "images", "PFLOP"]
    reached = [f"{100 * float(name):.0f} %" for name in thresholds]
    to = ["minutes of the fastest seed to", "", *reached]
    cost = ["epochs of 32×32 pixels, of the slowest seed, to", "", *reached]
    return "\n\n".join([table(columns, rows), table(to, times), table(cost, pixels), *notes])


def _changes(variant: dict[str, Any]) -> str:
    return " ".join(f"{field} = {json.dumps(value)}" for field, value in variant["changes"].items())


def ablation(results: Results) -> str:
    parts = []
    for result in results.all("ablation_"):
        rows, recipe = [], result["variants"]["the recipe"]["holdout_accuracy"]
        for name, variant in result["variants"].items():
            held_out, trained = variant["holdout_accuracy"], variant["train_accuracy"]
            if held_out is None:
                rows.append([name, _changes(variant), "diverged", "", ""])
                continue
            compared = variant["changes"] and recipe is not None
            difference = f"{100 * (held_out['mean'] - recipe['mean']):+.2f}" if compared else ""
            rows.append([name, _changes(variant), mean_and_deviation(held_out), difference, percent(trained["mean"])])
        title = f"{recipe_and_type(result)}, {result['num_epochs']} epochs"
        columns = [title, "changed", "5,000 held-out images", "difference", "training images"]
        seeds = ", ".join(map(str, result["seeds"]))
        parts += [table(columns, rows), f"`{result['command']}`: seeds {seeds}; {environment(result)}"]
    return "\n\n".join(parts) or "Not run yet."


def pretrained(results: Results) -> str:
    columns = [*RELEASED.values(), "expected calibration error"]
    scaled = "calibration error with the temperature"
    rows: list[list[str]] = []
    measured: dict[str, dict[str, list[str]]] = {}  # by environment, the columns of each network
    for name in results.names("pretrained_"):
        if name.endswith("_float32"):
            *runs, report = (results.load(name.removesuffix("float32") + kind) for kind in (*RELEASED, "report"))
            cells = [run["test_accuracy"] for run in runs] + [report["calibration_error"]]
            network = f"`{report['weights']}`"
            temperature = report.get("temperature")
            told = f"{percent(temperature['calibration_error'])} ({temperature['value']:.3f})" if temperature else ""
            rows.append([network, *map(percent, cells), told])
            for column, result in zip(columns, (*runs, report), strict=True):
                measured.setdefault(environment(result), {}).setdefault(network, []).append(column)
    lines = []
    for where, networks in sorted(measured.items()):
        parts = [f"{network}: {'; '.join(names)}." for network, names in networks.items()]
        lines.append(" ".join([*parts, where]))
    return "\n\n".join([table(["network", *columns, scaled], rows), *lines])


def exports(results: Results) -> str:
    rows, measured = [], set()
    for name in results.names("export_"):
        result = results.load(name)
        images, share = f"{result['num_examples']:,}", f"{result['difference']:.1e}"
        difference = share if result["difference"] else "0"
        rows.append([f"`{result['weights']}`", result["format"], result["runtime"], images, difference])
        measured.add(environment(result))
    columns = ["network", "format", "runtime", "test images", "largest difference of logits / largest logit"]
    return "\n\n".join([table(columns, rows), *sorted(measured)])


def lenet5_reference(results: Results) -> str:
    result, dropout = results.load("lenet5_reference"), results.load("lenet5_reference_eval_dropout")
    parity = results.load("parity_lenet5")
    pytorch = parity["test_accuracy_by_epoch"]["pytorch"][parity["seeds"].index(0)]
    if len(result["metrics"]) != len(NOTEBOOK_LOG):
        epochs = f"{len(result['metrics'])} epochs, and the notebook's log {len(NOTEBOOK_LOG)}"
        raise UserError(f"{results.folder / 'lenet5_reference.json'}: has {epochs}: use the result of a complete run")
    columns = ["epoch", NOTEBOOK_LABEL, "PyTorch, seed 0", "cifar_jax, seed 0", "cifar_jax, training images"]
    rows = [
        [str(row["epoch"]), f"{log:.2f}", percent(again), percent(row["test_accuracy"]), percent(row["train_accuracy"])]
        for row, log, again in zip(result["metrics"], NOTEBOOK_LOG, pytorch, strict=True)
    ]
    last = (
        f"With dropout left on, as the notebook tests, this run's weights, the released `{dropout['weights']}`, have "
        f"{percent(dropout['test_accuracy'])} %: {environment(dropout)}\n\n"
        f"{result['training_seconds']:.0f} s of training. Seed {result['config']['seed']}; {environment(result)}"
    )
    return f"{table(columns, rows)}\n\n{last}"


def all_cnn_reference(results: Results) -> str:
    """The epochs at which the original's curve is known, up to the longest run's last epoch."""
    runs = results.all("all_cnn_reference_seed")
    longest = max(len(run["metrics"]) for run in runs)
    rows = []
    for epoch in (epoch for epoch in KERAS_CURVE if epoch <= longest):
        reached = [run["metrics"][epoch - 1 : epoch] for run in runs]
        cells = [percent(row[0]["test_accuracy"]) if row else "" for row in reached]
        rows.append([f"{epoch}", f"{KERAS_CURVE[epoch]}", *cells])
    columns = ["epoch", KERAS_LABEL, *(f"cifar_jax, seed {run['config']['seed']}" for run in runs)]
    notes = [f"Seed {run['config']['seed']}; {environment(run)}" for run in runs]
    return "\n\n".join([table(columns, rows), *notes])
