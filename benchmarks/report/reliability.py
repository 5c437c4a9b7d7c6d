"""Reliability table: injected faults and their outcomes."""

from __future__ import annotations

from typing import Any

from benchmarks.report.results import Results, measured_by, table


def reliability(results: Results) -> str:
    """One row per fault: how it is injected, how often, and what happens."""
    result = results.load("faults")
    rows = [[row["name"], row["injected"], f"{row['times']:,}", _what_happens(row)] for row in result["faults"]]
    times, failed = (sum(row[field] for row in result["faults"]) for field in ("times", "failed"))
    summary = (
        f"{times - failed:,} of {times:,} injections end as they must. Seed {result['seed']}; {measured_by(result)}"
    )
    return f"{table(['fault', 'how it is injected', 'times', 'what happens'], rows)}\n\n{summary}"


def _what_happens(row: dict[str, Any]) -> str:
    """Formats the outcomes, with their counts if there are several."""
    if row["skipped"]:
        return f"not injected: {row['skipped']}"
    outcomes = sorted(row["outcomes"].items(), key=lambda pair: -pair[1])
    if len(outcomes) == 1 and not row["failed"]:
        return outcomes[0][0]
    parts = [f"{number:,} × {outcome}" for outcome, number in outcomes]
    return "; ".join([*parts, *([f"**{row['failed']:,} fail**"] if row["failed"] else [])])
