"""Writes the README's tables of results from benchmarks/results/*.json.

python -m benchmarks.report [--check]

Each table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; with --check nothing is written, and the exit
status is 1 if the README differs from what the results say. The JSON files are summary.json files of cifar_jax.train
and the output of cifar_jax.evaluate --json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Test accuracy in percent by epoch: the notebook's log, and the notebook's recipe run again in PyTorch 2.13 (seed 0).
NOTEBOOK_LOG = (39.51, 48.87, 52.37, 56.81, 60.08, 60.89, 62.53, 66.1, 67.48, 67.8, 68.2, 69.47, 70.12, 70.54, 70.2)
PYTORCH_AGAIN = (39.05, 49.11, 52.36, 57.99, 60.43, 63.28, 64.36, 65.72, 66.64, 69.46, 70.32, 68.88, 71.44, 71.84, 71.5)
KERAS_CURVE = {1: "31", 2: "46"}  # read off the original's plotted curve, in percent


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(result: dict[str, Any]) -> str:
    """Hardware, versions, seed and date of a run, and what its note says."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "cifar_jax")
    note = f" {result['note']}" if "note" in result else ""
    return f"Seed {result['config']['seed']}; {result['hardware']}; {versions}; {result['date']}.{note}"


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f}"


def lenet5_reference() -> str:
    result, dropout = load("lenet5_reference"), load("lenet5_reference_eval_dropout")
    columns = ["epoch", "the notebook's log (dropout on)", "the notebook again, PyTorch 2.13", "cifar_jax", "train"]
    rows = [
        [str(row["epoch"]), f"{log:.2f}", f"{again:.2f}", percent(row["test_accuracy"]), percent(row["train_accuracy"])]
        for row, log, again in zip(result["metrics"], NOTEBOOK_LOG, PYTORCH_AGAIN, strict=True)
    ]
    last = (
        f"With dropout left on, as the notebook tests, the last epoch has {percent(dropout['test_accuracy'])} % "
        f"(PyTorch again: 71.12 %). {result['training_seconds']:.0f} s of training. {conditions(result)}"
    )
    return f"{table(columns, rows)}\n\n{last}"


def all_cnn_reference() -> str:
    results = [load(f"all_cnn_reference_seed{seed}") for seed in (0, 1)]
    rows = [
        [str(epoch), curve, *(percent(result["metrics"][epoch - 1]["test_accuracy"]) for result in results)]
        for epoch, curve in KERAS_CURVE.items()
    ]
    columns = ["epoch", "the original's curve", *(f"cifar_jax, seed {r['config']['seed']}" for r in results)]
    return f"{table(columns, rows)}\n\n" + "\n\n".join(conditions(result) for result in results)


def quickstart() -> str:
    result = load("quickstart")
    return (
        f"{percent(result['test_accuracy'])} % of 360 test images after {result['epochs']} epochs, "
        f"{result['training_seconds']:.0f} s of training. {conditions(result)}"
    )


def kernels() -> str:
    result = load("kernels")
    names = {"lenet5_batch4": "LeNet-5, batch 4", "lenet5_batch128": "LeNet-5, batch 128"}
    names["all_cnn_batch64"] = "All-CNN, batch 64"
    forms = list(result["results"]["lenet5_batch4"])
    rows = [
        [title, *(f"{form['ms_per_step']:.2f} ({form['speedup']:.2f}×)" for form in result["results"][name].values())]
        for name, title in names.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{table(['ms a step', *forms], rows)}\n\n{result['hardware']}; {versions}; {result['date']}."


SECTIONS: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (quickstart, lenet5_reference, all_cnn_reference, kernels)
}


def render(readme: str) -> str:
    """The README with every section written anew. Raises ValueError if a section has no place in it."""
    for name, section in SECTIONS.items():
        place = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not place.search(readme):
            raise ValueError(f"README.md has no place for {name}")
        text = section()
        readme = place.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme)
    return readme


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
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
