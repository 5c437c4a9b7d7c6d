"""Writes the README's tables of results from benchmarks/results/*.json.

python -m benchmarks.report [--check]

Each table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; with --check nothing is written, and the exit
status is 1 if the README differs from what the results say. The JSON files are summary.json files of cifar_jax.train,
the output of cifar_jax.evaluate --json, and what the benchmarks and the parity scripts write. Of each throughput*.json
a chart is drawn too.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cifar_jax.cli import command
from cifar_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# The notebook's log: test accuracy in percent by epoch.
NOTEBOOK_LOG = (39.51, 48.87, 52.37, 56.81, 60.08, 60.89, 62.53, 66.1, 67.48, 67.8, 68.2, 69.47, 70.12, 70.54, 70.2)
NOTEBOOK_LABEL = "the notebook's log (dropout on)"
KERAS_CURVE = {1: 31, 2: 46, 15: 80, 55: 88, 200: 89.9}  # read off the original's plotted curve, in percent
KERAS_LABEL = "the original's curve"
ORIGINALS = {"lenet5": "70.20 with dropout on (74 claimed)", "all_cnn": "89.9"}  # the last epoch's
NETWORKS = {"lenet5": "LeNet-5", "all_cnn": "All-CNN"}
FRAMEWORKS = {"jax": "cifar_jax", "pytorch": "PyTorch"}


def load(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}: measure it anew, or take it from the repository") from error
    if name != "quickstart" and setting(result, "dataset") not in (None, "cifar10"):
        raise UserError(f"{path}: is of {setting(result, 'dataset')}: measure it anew on CIFAR-10")
    return result


def setting(result: dict[str, Any], field: str) -> Any:
    """What a result or else its config says; None if neither."""
    return result.get(field) or result.get("config", {}).get(field)


def recipe_and_type(result: dict[str, Any]) -> str:
    return f"`{result['recipe']}`" + (", bfloat16" if setting(result, "dtype") == "bfloat16" else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment(result: dict[str, Any]) -> str:
    """Hardware, versions and date of a measurement, and what its note says."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "cifar_jax")
    note = f" {result['note']}" if "note" in result else ""
    return f"{result['hardware']}; {versions}; {result['date']}.{note}"


def conditions(result: dict[str, Any]) -> str:
    """Those of a run, with its seed."""
    return f"Seed {result['config']['seed']}; {environment(result)}"


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f}"


def three_digits(value: float) -> str:
    """Three or more: a GPU takes seconds where a CPU takes hours."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mean_and_deviation(spread: dict[str, Any]) -> str:
    """An accuracy over seeds in percent; without a deviation if it is of one."""
    return percent(spread["mean"]) + (f" ± {percent(spread['std'])}" if spread["std"] is not None else "")


def result_names(prefix: str) -> list[str]:
    return sorted(path.stem for path in RESULTS.glob(f"{prefix}*.json"))


def lenet5_reference() -> str:
    result, dropout = load("lenet5_reference"), load("lenet5_reference_eval_dropout")
    parity = load("parity_lenet5")
    pytorch = parity["test_accuracy_by_epoch"]["pytorch"][parity["seeds"].index(0)]
    if len(result["metrics"]) != len(NOTEBOOK_LOG):
        epochs = f"{len(result['metrics'])} epochs, and the notebook's log {len(NOTEBOOK_LOG)}"
        raise UserError(f"{RESULTS / 'lenet5_reference.json'}: has {epochs}: take it from a whole run")
    columns = ["epoch", NOTEBOOK_LABEL, "PyTorch, seed 0 (see parity)", "cifar_jax", "train"]
    rows = [
        [str(row["epoch"]), f"{log:.2f}", percent(again), percent(row["test_accuracy"]), percent(row["train_accuracy"])]
        for row, log, again in zip(result["metrics"], NOTEBOOK_LOG, pytorch, strict=True)
    ]
    last = (
        f"With dropout left on, as the notebook tests, the last epoch has {percent(dropout['test_accuracy'])} %. "
        f"{result['training_seconds']:.0f} s of training. {conditions(result)}"
    )
    return f"{table(columns, rows)}\n\n{last}"


def all_cnn_reference() -> str:
    results = [load(f"all_cnn_reference_seed{seed}") for seed in (0, 1)]
    rows = [
        [str(epoch), f"{KERAS_CURVE[epoch]}", *(percent(run["metrics"][epoch - 1]["test_accuracy"]) for run in results)]
        for epoch in (1, 2)
    ]
    columns = ["epoch", KERAS_LABEL, *(f"cifar_jax, seed {r['config']['seed']}" for r in results)]
    return f"{table(columns, rows)}\n\n" + "\n\n".join(conditions(result) for result in results)


def accuracy() -> str:
    rows, notes = [], []
    for result in map(load, result_names("accuracy_")):
        model = result["config"]["model"]
        seconds = min(result["training_seconds"])
        fastest = result["training_seconds"].index(seconds)  # others may have had company
        reached = [
            f"{100 * float(name):.0f} %: {three_digits(times[fastest] / 60)}"
            for name, times in result["seconds_to"].items()
            if None not in times
        ]
        value = mean_and_deviation(result["test_accuracy"])
        cost = f"{result['cost']['images'] / 1e6:.2f} M, {result['cost']['flops'] / 1e15:.2f}"
        seeds = ", ".join(map(str, result["seeds"]))
        epochs = str(result["config"]["num_epochs"])
        row = [NETWORKS[model], ORIGINALS[model], recipe_and_type(result), value, seeds, epochs]
        rows.append([*row, three_digits(seconds / 60), "; ".join(reached), cost])
        notes.append(f"`{result['command']}`: {environment(result)}")
    columns = ["network", "original", "recipe", "test accuracy, last epoch", "seeds", "epochs", "minutes, fastest seed"]
    header = [*columns, "minutes to", "images, PFLOP"]
    return "\n\n".join([table(header, rows), *notes])


def changed(variant: dict[str, Any]) -> str:
    return " ".join(f"{field} = {json.dumps(value)}" for field, value in variant["changes"].items())


def ablation() -> str:
    parts = []
    for result in map(load, result_names("ablation_")):
        rows, recipe = [], result["variants"]["the recipe"]["holdout_accuracy"]
        for name, variant in result["variants"].items():
            held_out, trained = variant["holdout_accuracy"], variant["train_accuracy"]
            if held_out is None:
                rows.append([name, changed(variant), "diverged", "", ""])
                continue
            compared = variant["changes"] and recipe is not None
            difference = f"{100 * (held_out['mean'] - recipe['mean']):+.2f}" if compared else ""
            rows.append([name, changed(variant), mean_and_deviation(held_out), difference, percent(trained["mean"])])
        title = f"{recipe_and_type(result)}, {result['num_epochs']} epochs"
        columns = [title, "changed", "5,000 held-out images", "difference", "training images"]
        seeds = ", ".join(map(str, result["seeds"]))
        parts += [table(columns, rows), f"`{result['command']}`: seeds {seeds}; {environment(result)}"]
    return "\n\n".join(parts) or "Not run yet."


def draw_accuracy(path: Path) -> None:
    """Learning curves of every recipe, over what is on record of the originals'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    charts = dict(zip(("lenet5", "all_cnn"), figure.subplots(1, 2)))
    originals = {
        "lenet5": (NOTEBOOK_LABEL, dict(enumerate(NOTEBOOK_LOG, 1))),
        "all_cnn": (KERAS_LABEL, KERAS_CURVE),
    }
    for model, axes in charts.items():
        label, curve = originals[model]
        axes.plot(list(curve), list(curve.values()), "k.--", lw=1, label=label)
        axes.set(xlabel="epoch", ylabel="test accuracy, %", xscale="log", title=model)
        axes.grid(alpha=0.3)
    for number, result in enumerate(map(load, result_names("accuracy_"))):
        for index, run in enumerate(result["test_accuracy_by_epoch"]):
            charts[result["config"]["model"]].plot(
                range(1, len(run) + 1),
                [100 * value for value in run],
                color=f"C{number}",
                lw=1,
                label=f"{result['recipe']} {result['config']['dtype']}, {len(run)} epochs" if index == 0 else None,
            )
    for axes in charts.values():
        axes.legend()
    figure.savefig(path, dpi=120)


def pretrained() -> str:
    rows, measured = [], set()
    for path in sorted(RESULTS.glob("pretrained_*_float32.json")):
        runs = [load(path.stem.replace("float32", kind)) for kind in ("float32", "bfloat16", "mirror")]
        name = runs[0]["weights"]
        rows.append([f"[{name}](cifar_jax/pretrained/{name}.md)", *(percent(run["test_accuracy"]) for run in runs)])
        measured |= {environment(run) for run in runs}
    header = ["network", "test accuracy, float32", "bfloat16", "float32, averaged with the mirror image"]
    return "\n\n".join([table(header, rows), *sorted(measured)])


def early_training() -> str:
    result = load("early_training")
    rows = []
    for run in result["runs"]:
        losses = run["batch_loss"]
        smooth = [sum(losses[i : i + 5]) / 5 for i in range(len(losses) - 4)]
        low = smooth.index(min(smooth))
        numbers = [f"{smooth[low]:.3f}", f"{low + 2}", f"{max(smooth[low:]):.3f}"]
        rows.append([str(run["seed"]), FRAMEWORKS[run["framework"]], *numbers])
    columns = ["seed", "", "lowest loss, mean of 5 steps", "near step", "highest afterwards"]
    return f"{table(columns, rows)}\n\n{environment(result)}"


def quickstart() -> str:
    result = load("quickstart")
    return (
        f"{percent(result['test_accuracy'])} % of 360 test images after {result['epochs']} epochs, "
        f"{result['training_seconds']:.0f} s of training. {conditions(result)}"
    )


def kernels() -> str:
    result = load("kernels")
    forms, rows, ranges = list(next(iter(result["results"].values()))), [], []
    for name, measured in result["results"].items():
        model, _, batch_size = name.rpartition("_batch")
        cells = [f"{three_digits(form['ms_per_step'])} ({form['speedup']:.2f}×)" for form in measured.values()]
        title = f"{NETWORKS[model]}, batch {batch_size}"
        rows.append([title, *cells])
        ratios = [plain / ours for plain, ours in zip(measured["plain"]["rounds_ms"], measured["all"]["rounds_ms"])]
        ranges.append(f"{title} {min(ratios):.2f} to {max(ratios):.2f}")
    spread = f"Ratio of plain to all in single rounds, lowest to highest: {'; '.join(ranges)}."
    return f"{table(['ms a step', *forms], rows)}\n\n{spread}\n\n`{result['command']}`: {environment(result)}"


PHASE_TITLES = {"training": "training", "training_augmented": "training, augmented", "inference": "inference"}


def workload_title(workload: dict[str, Any]) -> str:
    return f"{NETWORKS[workload['model']]}, batch {workload['batch_size']}"


def throughput_table(result: dict[str, Any]) -> str:
    """The table of a throughput*.json, the contenders that are absent, and the conditions."""
    workloads = result["workloads"].values()
    phases = [phase for phase in PHASE_TITLES if phase in next(iter(workloads))["contenders"]["jax"]["phases"]]
    rows = []
    for workload in workloads:
        for name, contender in workload["contenders"].items():
            cells = []
            for phase in phases:
                values, best = contender["phases"][phase], workload["best_pytorch"].get(phase)
                rate, share = values["images_per_second"], f"{100 * values['share_of_matrix_rate']:.0f} %"
                if best is None:
                    cells.append(f"{rate:,.0f} ({share})")
                else:
                    pytorch = workload["contenders"][best["contender"]]["phases"][phase]["images_per_second"]
                    cells.append(f"{rate:,.0f} ({rate / pytorch:.2f}×, {share})")
            seconds = sum(contender["phases"][phase]["first_call_seconds"] for phase in phases)
            memory = f"{contender['peak_memory_bytes'] / 2**20:,.0f}"
            rows.append([workload_title(workload), name, *cells, f"{seconds:.1f}", memory])
    header = ["", "", *(PHASE_TITLES[phase] for phase in phases), "first calls, s", "peak memory, MiB"]
    absent = [
        f"Absent from {workload_title(workload)}: {name} ({reason})."
        for workload in workloads
        for name, reason in workload["absent"].items()
    ]
    notes = (
        f"`{result['command']}`: images a second (× the best PyTorch, % of the matrix-product rate, "
        f"{result['matrix_flops_per_second'] / 1e9:,.0f} GFLOP/s), {result['dtype']}; medians of {result['rounds']} "
        f"rounds of {result['seconds_per_round']:g} s; load average before {result['load_average_before']:.2f}. "
        f"{environment(result)}"
    )
    return "\n\n".join([table(header, rows), *absent, *single_rounds(result, phases), notes])


def single_rounds(result: dict[str, Any], phases: list[str]) -> list[str]:
    """How far the ratio of jax to the best PyTorch goes from round to round: at most one line."""
    ranges = []
    for workload in result["workloads"].values():
        rounds = lambda name, phase, all=workload["contenders"]: all[name]["phases"][phase]["rounds"]
        for phase in filter(workload["best_pytorch"].get, phases):
            pairs = zip(rounds("jax", phase), rounds(workload["best_pytorch"][phase]["contender"], phase))
            ratios = [ours / theirs for ours, theirs in pairs]
            title = f"{workload_title(workload)}: {PHASE_TITLES[phase]}"
            ranges.append(f"{title} {min(ratios):.2f} to {max(ratios):.2f}")
    text = f"Ratio of jax to the best PyTorch in single rounds, lowest to highest: {'; '.join(ranges)}."
    return [text] if ranges else []


def draw_throughput(result: dict[str, Any], path: Path) -> None:
    """Bars of images a second: a row of charts for each workload, a chart for each phase."""
    from matplotlib.figure import Figure

    workloads = list(result["workloads"].values())
    phases = list(workloads[0]["contenders"]["jax"]["phases"])
    lines = sum(len(workload["contenders"]) + 2 for workload in workloads)
    figure = Figure(figsize=(4 * len(phases), 0.28 * lines + 0.5), layout="constrained")
    heights = [len(workload["contenders"]) for workload in workloads]
    charts = figure.subplots(len(workloads), len(phases), squeeze=False, sharey="row", height_ratios=heights)
    for row, workload in zip(charts, workloads):
        names = list(workload["contenders"])
        for axes, phase in zip(row, phases):
            rates = [workload["contenders"][name]["phases"][phase]["images_per_second"] for name in names]
            bars = axes.barh(names, rates, color=["tab:blue" if name == "jax" else "silver" for name in names])
            axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=2, fontsize=8)
            axes.set_title(f"{workload_title(workload)}: {PHASE_TITLES[phase]}", fontsize=9)
            axes.margins(x=0.2)
            axes.set_xticks([])
        row[0].invert_yaxis()
    figure.supxlabel(f"images/s, {result['dtype']}, {result['hardware']}", fontsize=9)
    figure.savefig(path, dpi=120)


def throughput() -> str:
    return "\n\n".join(throughput_table(load(name)) for name in result_names("throughput"))


def parity_table(result: dict[str, Any]) -> str:
    """The checks of a parity script; of those of a model's initial tensors the one nearest to its tolerance."""
    rows = [check for check in result["checks"] if ": initial " not in check["name"]]
    for model in ("all_cnn", "lenet5"):
        checks = [check for check in result["checks"] if check["name"].startswith(f"{model}: initial ")]
        nearest = max(checks, key=lambda check: (check["error"] or 0) / (check["tolerance"] or 1))
        name = f"{model}: {len(checks)} checks of initial distributions; nearest to its tolerance: "
        name += nearest["name"].removeprefix(f"{model}: initial ")
        rows.append(nearest | {"name": name, "passed": all(check["passed"] for check in checks)})
    as_text = lambda number: "NaN" if number is None else f"{number:.1e}"
    cells = [
        [row["name"], as_text(row["error"]), as_text(row["tolerance"]), row["why"], "pass" if row["passed"] else "FAIL"]
        for row in rows
    ]
    count = sum(check["passed"] for check in result["checks"])
    summary = f"{count} of {len(result['checks'])} checks passed. {environment(result)}"
    return f"{table(['check', 'error', 'tolerance', 'why this tolerance', ''], cells)}\n\n{summary}"


def parity_lenet5() -> str:
    result = load("parity_lenet5")
    last, rows = result["last_epoch"], []
    for name, title in FRAMEWORKS.items():
        by_seed = ", ".join(percent(run[-1]) for run in result["test_accuracy_by_epoch"][name])
        rows.append([title, by_seed, mean_and_deviation(last[name])])
    test = "not tested, as no seed differs"
    if last["p_value"] is not None:
        low, high = last["confidence_interval_95"]
        interval = f"95 % confidence interval {100 * low:+.2f} to {100 * high:+.2f}"
        test = f"{interval}, p = {last['p_value']:.2f} (Welch)"
    difference = f"Difference of the means {100 * last['difference']:+.2f}, {test}."
    columns = ["", f"test accuracy after epoch {result['num_epochs']}, by seed", "mean ± standard deviation"]
    return f"{table(columns, rows)}\n\n{difference} Seeds {result['seeds']}; {environment(result)}"


def draw_parity_lenet5(path: Path) -> None:
    """Every run's test accuracy by epoch, over the notebook's log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves = load("parity_lenet5")["test_accuracy_by_epoch"]
    for name, color in (("jax", "tab:blue"), ("pytorch", "tab:orange")):
        for number, run in enumerate(curves[name]):
            label = f"{FRAMEWORKS[name]}, {len(curves[name])} seeds" if number == 0 else None
            axes.plot(range(1, len(run) + 1), [100 * value for value in run], color=color, lw=1, label=label)
    axes.plot(range(1, 16), NOTEBOOK_LOG, "k--", lw=1, label=NOTEBOOK_LABEL)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="LeNet-5, reference recipe")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


SECTIONS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "lenet5_reference": lenet5_reference,
    "all_cnn_reference": all_cnn_reference,
    "accuracy": accuracy,
    "ablation": ablation,
    "pretrained": pretrained,
    "early_training": early_training,
    "parity_pytorch": lambda: parity_table(load("parity_pytorch")),
    "parity_keras": lambda: parity_table(load("parity_keras")),
    "parity_lenet5": parity_lenet5,
    "throughput": throughput,
    "kernels": kernels,
}


@contextlib.contextmanager
def whole_results(name: str) -> Iterator[None]:
    """While entered, what partial results lead to is a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
        raise UserError(f"the results for {name} lack something ({error!r}): measure them anew, whole") from error


def render(readme: str) -> str:
    """The README with every section written anew. Raises UserError if a section has no place in it."""
    for name, section in SECTIONS.items():
        place = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not place.search(readme):
            raise UserError(f"README.md has no place for {name}: put back its <!-- begin {name} --> and end")
        with whole_results(name):
            text = section()
        readme = place.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme)
    return readme


@command
def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        print("usage: python -m benchmarks.report [--check]", file=sys.stderr)
        return 2
    path = ROOT / "README.md"
    before = path.read_text()
    after = render(before)
    if "--check" in sys.argv:
        if after != before:
            print("README.md is not what benchmarks/results say: run python -m benchmarks.report", file=sys.stderr)
        return int(after != before)
    with whole_results("the figures"):
        for name in result_names("throughput"):
            draw_throughput(load(name), RESULTS / f"{name}.png")
        draw_parity_lenet5(RESULTS / "parity_lenet5.png")
        draw_accuracy(RESULTS / "accuracy.png")
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
