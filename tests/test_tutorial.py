"""The tutorial's notebook. test_report.py checks that docs/tutorial.md is made from it."""

import json
import os
import re

import pytest

from benchmarks.report.results import ROOT

nbformat = pytest.importorskip("nbformat")
tutorial = pytest.importorskip("benchmarks.report.tutorial")


FEW_DIGITS = """
import sklearn.datasets
from cifar_jax.ops import winograd
winograd.pays = lambda *_: False  # compiles faster
all_digits = sklearn.datasets.load_digits
sklearn.datasets.load_digits = lambda **options: [array[:300] for array in all_digits(**options)]
"""


def cells():
    notebook = nbformat.read(ROOT / tutorial.NOTEBOOK, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell):
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def wording(cell):
    """Returns the words of a cell's output with 0 for every number, and without the epochs after the first."""
    return re.sub(r"[\d.,e-]+", "0", re.sub(r"^epoch [2-9].*\n", "", text_of(cell), flags=re.MULTILINE)).split()


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
    """From top to bottom, with the backend for figures that Jupyter and Colab set, and the outputs that it shows. It
    trains one epoch on 240 digits, and its report disturbs no image."""
    pytest.importorskip("nbclient")
    pytest.importorskip("torch")
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(ROOT / tutorial.NOTEBOOK, as_version=4)
    shorter = {"num_epochs=4": "num_epochs=1", '"--disturbed-images", "30"': '"--disturbed-images", "0"'}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            for long in [long for long in shorter if long in cell.source]:
                cell.source = cell.source.replace(long, shorter.pop(long))
    assert not shorter
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEW_DIGITS))
    tutorial.executed(notebook, tmp_path)
    executed = [cell for cell in notebook.cells if cell.cell_type == "code"][1:]
    for cell, shown in zip(executed, cells(), strict=True):
        assert wording(cell) == wording(shown)
        assert [output.output_type for output in cell.outputs] == [output.output_type for output in shown.outputs]
    assert (tmp_path / "report" / "report.html").exists()
