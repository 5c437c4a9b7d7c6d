"""The tutorial's notebook. test_report.py checks that docs/tutorial.md is made from it."""

import json
import re

import pytest

from benchmarks.report.results import ROOT

nbformat = pytest.importorskip("nbformat")
tutorial = pytest.importorskip("benchmarks.report.tutorial")


def cells():
    notebook = nbformat.read(ROOT / tutorial.NOTEBOOK, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def test_the_notebook_is_executed_small_and_of_no_machine():
    assert [cell.execution_count for cell in cells()] == list(range(1, len(cells()) + 1))
    content = (ROOT / tutorial.NOTEBOOK).read_text()
    assert len(content) < 150_000
    for cell in cells():
        assert "warning" not in text_of(cell).lower()
        assert not re.search(r"(^|[\s'\"])/\w+/", text_of(cell)), text_of(cell)
    assert set(json.loads(content)["metadata"]["language_info"]) == {"name"}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """From top to bottom, with the backend for figures that Jupyter and Colab set, and the outputs that it shows."""
    pytest.importorskip("nbclient")
    pytest.importorskip("torch")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / tutorial.NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    tutorial.executed(notebook, tmp_path)
    for cell, shown in zip([cell for cell in notebook.cells if cell.cell_type == "code"], cells(), strict=True):
        numbers = lambda cell: re.sub(r"[\d.,e-]+", "0", text_of(cell))
        assert numbers(cell).split() == numbers(shown).split()
        assert [output.output_type for output in cell.outputs] == [output.output_type for output in shown.outputs]
    assert (tmp_path / "report" / "report.html").exists()
