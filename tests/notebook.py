"""The notebook in docs/: run as a reader would.

python -m tests.notebook        runs it and keeps its outputs; look at them before you commit them
"""

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "first-search.ipynb"
TIMEOUT = 300  # seconds for a cell


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def executed(notebook: Any) -> Any:
    """The notebook with the outputs that it has now, in a process of its own."""
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("image/jpeg", None)  # beside the PNG
    return notebook


def kinds(notebook: Any) -> list[list[list[str]]]:
    """For every cell of code, of every output which forms it has."""
    return [
        [sorted(output.get("data", {output.output_type: None})) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


if __name__ == "__main__":
    nbformat.write(executed(read()), NOTEBOOK)
