"""Runs the notebooks, each from a clean kernel.

- `execute`: run a notebook, in miniature or whole, and return it with its outputs
- `python -m tests.notebooks` runs all of them whole (some minutes) and writes their outputs into them
"""

import os
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path, quick: bool) -> nbformat.NotebookNode:
    """The notebook at `path`, run in `folder` with this Python; raises where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "L2D_QUICK": "1" if quick else ""}
    environment.pop("MPLBACKEND", None)
    client = NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute(env=environment)


def clean(notebook: nbformat.NotebookNode, folder: str) -> nbformat.NotebookNode:
    """The notebook without what belongs to one machine: metadata, standard error, the folder, terminal colours."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                held = output.get("data", output)
                for kind in ("text", "text/plain", "text/html"):
                    if kind in held:
                        held[kind] = re.sub(r"\x1b\[[0-9;]*m", "", held[kind].replace(f"{folder}/", ""))
    return notebook


if __name__ == "__main__":
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(clean(execute(path, Path(folder), quick=False), folder), path)
        print(path)
