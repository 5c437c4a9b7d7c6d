"""Maps pages to their tables, and updates the tables of a page."""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.report import accuracy, commands, parity, performance, processes, reliability, scaling
from benchmarks.report.results import Results, whole_results
from cifar_jax.errors import UserError

Section = Callable[[Results], str]

PAGES: dict[str, dict[str, Section]] = {
    "README.md": {
        "headline": accuracy.headline,
        "parity_summary": parity.parity_summary,
        "throughput_summary": performance.throughput_summary,
    },
    "docs/results.md": {
        "accuracy": accuracy.accuracy,
        "pretrained": accuracy.pretrained,
        "ablation": accuracy.ablation,
        "lenet5_reference": accuracy.lenet5_reference,
        "all_cnn_reference": accuracy.all_cnn_reference,
        "quickstart": accuracy.quickstart,
    },
    "docs/parity.md": {
        "parity_pytorch": lambda results: parity.parity_table(results.load("parity_pytorch")),
        "parity_keras": lambda results: parity.parity_table(results.load("parity_keras")),
        "parity_lenet5": parity.parity_lenet5,
        "early_training": parity.early_training,
    },
    "docs/performance.md": {
        "throughput": performance.throughput,
        "kernels": performance.kernels,
    },
    "docs/scaling.md": {
        "processes": processes.processes,
        "kills": processes.kills,
        "programs": scaling.programs,
        "bfloat16": scaling.bfloat16,
        "collectives": scaling.collectives,
        "loops": scaling.loops,
        "strong": scaling.strong,
        "weak": scaling.weak,
        "dispatch": scaling.dispatch,
    },
    "docs/weights.md": {
        "exports": accuracy.exports,
    },
    "docs/commands.md": {
        "commands": commands.commands,
    },
    "docs/reliability.md": {
        "reliability": reliability.reliability,
    },
}


def render(page: str, text: str, results: Results) -> str:
    """Returns the text of a page with updated sections.

    Raises: UserError if the page's markers differ from its sections, or results are missing or incomplete.
    """
    sections = PAGES[page]
    places = re.findall(r"<!-- begin (\w+) -->", text)
    if sorted(places) != sorted(sections):
        raise UserError(
            f"{page}: has markers for {sorted(places)}: needs <!-- begin NAME --> for each of {list(sections)}"
        )
    for name, section in sections.items():
        place = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not place.search(text):
            raise UserError(f"{page}: <!-- begin {name} --> has no <!-- end {name} -->: restore it")
        with whole_results(name):
            table = section(results)
        text = place.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text
