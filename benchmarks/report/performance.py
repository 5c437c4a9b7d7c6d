"""Performance tables: throughput in comparison with other frameworks, and the CPU kernels."""

from __future__ import annotations

from typing import Any

from benchmarks.report.results import NETWORKS, Results, environment, hardware, measured_by, table, three_digits

PHASE_TITLES = {"training": "training", "training_augmented": "training, augmented", "inference": "inference"}
Workload = dict[str, Any]


def backends(workload: Workload) -> dict[str, Any]:
    """Returns the measurements of a workload by backend."""
    return workload["contenders"]


def best_pytorch(workload: Workload, phase: str) -> str | None:
    """Returns the fastest form of PyTorch in a phase; None without PyTorch."""
    best = workload["best_pytorch"].get(phase)
    return None if best is None else best["contender"]


def images_per_second(workload: Workload, backend: str, phase: str) -> float:
    return backends(workload)[backend]["phases"][phase]["images_per_second"]


def workloads_of(result: dict[str, Any]) -> list[Workload]:
    """Returns the workloads of a throughput*.json, ordered by network and batch size."""
    return sorted(result["workloads"].values(), key=lambda workload: (workload["model"], workload["batch_size"]))


def phases_of(result: dict[str, Any]) -> list[str]:
    first = workloads_of(result)[0]
    return [phase for phase in PHASE_TITLES if phase in backends(first)["jax"]["phases"]]


def workload_title(workload: Workload) -> str:
    return f"{NETWORKS[workload['model']]}, batch {workload['batch_size']}"


def throughput_table(result: dict[str, Any]) -> str:
    """The table of a throughput*.json, with absent backends and the conditions of the measurement."""
    workloads, phases = workloads_of(result), phases_of(result)
    rows = [_backend_row(workload, name, phases) for workload in workloads for name in backends(workload)]
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
    return "\n\n".join([table(header, rows), *absent, *_single_rounds(result, phases), notes])


def _backend_row(workload: Workload, name: str, phases: list[str]) -> list[str]:
    backend, cells = backends(workload)[name], []
    for phase in phases:
        rate, best = images_per_second(workload, name, phase), best_pytorch(workload, phase)
        share = f"{100 * backend['phases'][phase]['share_of_matrix_rate']:.0f} %"
        ratio = "" if best is None else f"{rate / images_per_second(workload, best, phase):.2f}×, "
        cells.append(f"{rate:,.0f} ({ratio}{share})")
    seconds = sum(backend["phases"][phase]["first_call_seconds"] for phase in phases)
    memory = f"{backend['peak_memory_bytes'] / 2**20:,.0f}"
    return [workload_title(workload), name, *cells, f"{seconds:.1f}", memory]


def _single_rounds(result: dict[str, Any], phases: list[str]) -> list[str]:
    """The range over the rounds of the ratio of jax to the best PyTorch, in at most one line."""
    ranges = []
    for workload in workloads_of(result):
        for phase in phases:
            best = best_pytorch(workload, phase)
            if best is not None:
                ours, theirs = (backends(workload)[name]["phases"][phase]["rounds"] for name in ("jax", best))
                ratios = [a / b for a, b in zip(ours, theirs)]
                title = f"{workload_title(workload)}: {PHASE_TITLES[phase]}"
                ranges.append(f"{title} {min(ratios):.2f} to {max(ratios):.2f}")
    text = f"Ratio of jax to the best PyTorch in single rounds, lowest to highest: {'; '.join(ranges)}."
    return [text] if ranges else []


def throughput(results: Results) -> str:
    return "\n\n".join(throughput_table(result) for result in results.all("throughput"))


def throughput_summary(results: Results) -> str:
    """Images per second of jax, with the ratio to the best PyTorch."""
    result = results.load("throughput")
    phases, rows = phases_of(result), []
    for workload in workloads_of(result):
        cells = []
        for phase in phases:
            rate, best = images_per_second(workload, "jax", phase), best_pytorch(workload, phase)
            ratio = "" if best is None else f" ({rate / images_per_second(workload, best, phase):.2f}×)"
            cells.append(f"{rate:,.0f}{ratio}")
        rows.append([workload_title(workload), *cells])
    torch = result["versions"].get("torch", "").partition("+")[0]
    note = (
        f"Images a second, {result['dtype']} (ratio to the fastest form of PyTorch {torch} in the same run). "
        f"Hardware: {hardware(result)}; jax {result['versions']['jax']}; {result['date']}."
    )
    return f"{table(['', *(PHASE_TITLES[phase] for phase in phases)], rows)}\n\n{note}"


def kernels(results: Results) -> str:
    result = results.load("kernels")
    forms, rows, ranges = list(next(iter(result["results"].values()))), [], []
    for name, measured in result["results"].items():
        model, _, batch_size = name.rpartition("_batch")
        cells = [f"{three_digits(form['ms_per_step'])} ({form['speedup']:.2f}×)" for form in measured.values()]
        title = f"{NETWORKS[model]}, batch {batch_size}"
        rows.append([title, *cells])
        ratios = [plain / ours for plain, ours in zip(measured["plain"]["rounds_ms"], measured["all"]["rounds_ms"])]
        ranges.append(f"{title} {min(ratios):.2f} to {max(ratios):.2f}")
    spread = f"Ratio of plain to all in single rounds, lowest to highest: {'; '.join(ranges)}."
    return f"{table(['ms a step', *forms], rows)}\n\n{spread}\n\n{measured_by(result)}"
