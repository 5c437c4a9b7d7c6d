"""Draws figures of the results: learning curves of the recipes, parity of whole runs, throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.performance import (
    PHASE_TITLES,
    backends,
    images_per_second,
    phases_of,
    workload_title,
    workloads_of,
)
from benchmarks.report.results import (
    FRAMEWORKS,
    KERAS_CURVE,
    KERAS_LABEL,
    NETWORKS,
    NOTEBOOK_LABEL,
    NOTEBOOK_LOG,
    Results,
    hardware,
)


def draw_all(results: Results, folder: Path) -> None:
    """Draws every figure of the pages as PNG."""
    for name in results.names("throughput"):
        draw_throughput(results.load(name), folder / f"{name}.png")
    draw_parity_lenet5(results, folder / "parity_lenet5.png")
    draw_accuracy(results, folder / "accuracy.png")
    draw_processes(results, folder / "processes.png")


def draw_processes(results: Results, path: Path) -> None:
    """Draws the test accuracy of runs in one process and in several."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    styles = (("o", 10, "-"), ("s", 6, "--"), ("x", 5, ":"))  # the curves lie on top of each other
    for run, (marker, size, line) in zip(results.load("processes")["runs"], styles):
        label = f"{run['processes']} × {run['devices_each']} devices"
        values = [100 * value for value in run["test_accuracy"]]
        epochs = range(1, len(values) + 1)
        axes.plot(epochs, values, marker=marker, ms=size, ls=line, markerfacecolor="none", label=label)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="quickstart in one process and in several")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_accuracy(results: Results, path: Path) -> None:
    """Draws learning curves of every recipe, and the originals' recorded curves."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    charts = dict(zip(("lenet5", "all_cnn"), figure.subplots(1, 2)))
    originals = {
        "lenet5": (NOTEBOOK_LABEL, dict(enumerate(NOTEBOOK_LOG, 1))),
        "all_cnn": (KERAS_LABEL, KERAS_CURVE),
    }
    for model, axes in charts.items():
        label, curve = originals[model]
        axes.plot(list(curve), list(curve.values()), "k.--", lw=1, label=label)
        axes.set(xlabel="epoch", ylabel="test accuracy, %", xscale="log", title=NETWORKS[model])
        axes.grid(alpha=0.3)
    for number, result in enumerate(results.all("accuracy_")):
        for index, run in enumerate(result["test_accuracy_by_epoch"]):
            label = f"{result['recipe']} {result['config']['dtype']}, {len(run)} epochs" if index == 0 else None
            values = [100 * value for value in run]
            charts[result["config"]["model"]].plot(
                range(1, len(run) + 1), values, color=f"C{number}", lw=1, label=label
            )
    for axes in charts.values():
        axes.legend()
    figure.savefig(path, dpi=120)


def draw_parity_lenet5(results: Results, path: Path) -> None:
    """Draws every run's test accuracy by epoch, and the notebook's log."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves = results.load("parity_lenet5")["test_accuracy_by_epoch"]
    for name, color in (("jax", "tab:blue"), ("pytorch", "tab:orange")):
        for number, run in enumerate(curves[name]):
            label = f"{FRAMEWORKS[name]}, {len(curves[name])} seeds" if number == 0 else None
            axes.plot(range(1, len(run) + 1), [100 * value for value in run], color=color, lw=1, label=label)
    axes.plot(range(1, 16), NOTEBOOK_LOG, "k--", lw=1, label=NOTEBOOK_LABEL)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="LeNet-5, reference recipe")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_throughput(result: dict[str, Any], path: Path) -> None:
    """Draws bars of images per second: one row of charts per workload, one chart per phase."""
    workloads = workloads_of(result)
    phases = phases_of(result)
    heights = [len(backends(workload)) for workload in workloads]
    size = (4 * len(phases), 0.28 * sum(height + 2 for height in heights) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    charts = figure.subplots(len(workloads), len(phases), squeeze=False, sharey="row", height_ratios=heights)
    for row, workload in zip(charts, workloads):
        names = list(backends(workload))
        for axes, phase in zip(row, phases):
            rates = [images_per_second(workload, name, phase) for name in names]
            bars = axes.barh(names, rates, color=["tab:blue" if name == "jax" else "silver" for name in names])
            axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=2, fontsize=8)
            axes.set_title(f"{workload_title(workload)}: {PHASE_TITLES[phase]}", fontsize=9)
            axes.margins(x=0.2)
            axes.set_xticks([])
        row[0].invert_yaxis()
    figure.supxlabel(f"images/s, {result['dtype']}, {hardware(result)}", fontsize=9)
    figure.savefig(path, dpi=120)
