"""The notebooks run from a clean kernel, in miniature, and hold the outputs of a whole run.

Run: `python -m pytest tests/test_notebooks.py` (about 40 seconds)
"""

from pathlib import Path

import nbformat
import pytest

from tests.notebooks import NOTEBOOKS, execute

IDS = [path.stem for path in NOTEBOOKS]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_runs(path, tmp_path):
    notebook = execute(path, tmp_path, quick=True)
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("T = 15" in text and "exact match" in text for text in printed)
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert {"image/png", "text/html"} <= shown
    assert [path.name for path in Path(tmp_path).iterdir()] == ["quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_a_notebook_holds_outputs_of_a_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = path.read_text(encoding="utf-8")
    assert text.count("image/png") == 2 and "srcdoc" in text and '"output_type": "error"' not in text
    assert "/home/" not in text and "site-packages" not in text and '"name": "stderr"' not in text


def test_there_is_a_notebook():
    assert IDS == ["quickstart"]
