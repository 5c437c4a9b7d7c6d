"""The tutorial: python -m benchmarks.report.tutorial executes docs/tutorial.ipynb and keeps its outputs.

docs/tutorial.md is made from the notebook, with its figures in docs/figures, by python -m benchmarks.report.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from benchmarks.report.results import ROOT
from cifar_jax.cli import command

NOTEBOOK = Path("docs/tutorial.ipynb")
PAGE = "docs/tutorial.md"
SECONDS = 300  # for one cell


def executed(notebook: Any, folder: Path) -> Any:
    """Returns the notebook with the outputs of all its cells, executed in a folder.

    Raises: nbclient.exceptions.CellExecutionError if a cell fails.
    """
    from nbclient import NotebookClient  # imported here because converting needs no kernel

    client = NotebookClient(notebook, timeout=SECONDS, record_timing=False, resources={"metadata": {"path": folder}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.clear()
        _join_streams(cell)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # otherwise the version of this machine's Python
    return notebook


def _join_streams(cell: Any) -> None:
    """Joins the pieces in which a cell's text arrived, which vary."""
    joined: list[Any] = []
    for output in cell.get("outputs", []):
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    if joined:
        cell.outputs = joined


def files(root: Path) -> dict[str, bytes]:
    """Returns the notebook below `root` as a page with its figures: their contents by path."""
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(root / NOTEBOOK, as_version=4)
    options = {"unique_key": "tutorial", "output_files_dir": "figures"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=options)
    text = text.replace("![png](", "![Output of this cell](")
    page = "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"
    figures = {f"docs/{name}": content for name, content in resources.get("outputs", {}).items()}
    parts = re.split(r"(^```.*?^```$)", page, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"\n{3,}", "\n\n", text) for text in parts[::2]]  # not in code
    return {PAGE: "".join(parts).encode(), **figures}


@command
def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(nbformat.read(ROOT / NOTEBOOK, as_version=4), Path(folder))
    nbformat.write(notebook, ROOT / NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
