"""The command: python -m benchmarks.report [--check]"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.report import tutorial
from benchmarks.report.figures import draw_all
from benchmarks.report.pages import PAGES, render
from benchmarks.report.results import ROOT, Results, whole_results
from cifar_jax.cli import command


def report(root: Path, check: bool) -> int:
    """Writes the pages and figures below `root`, or with `check` only compares the pages. Returns: the exit status."""
    results = Results(root / "benchmarks" / "results")
    after = {page: render(page, (root / page).read_text(), results).encode() for page in PAGES}
    after |= tutorial.files(root)
    changed = [page for page, content in after.items() if _content(root / page) != content]
    if check:
        for page in changed:
            print(f"{page} differs from what it is generated from: run python -m benchmarks.report", file=sys.stderr)
        return int(bool(changed))
    with whole_results("the figures"):
        draw_all(results, root / "docs" / "figures")
    for page in changed:
        (root / page).write_bytes(after[page])
    return 0


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@command
def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        print("usage: python -m benchmarks.report [--check]", file=sys.stderr)
        return 2
    return report(ROOT, check="--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
