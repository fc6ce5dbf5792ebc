"""What the wheel holds: packages with their data, the entry point, and the hook at its root.

Run: `python -m pytest tests/lm_eval_ext/test_packaging.py` (needs hatchling, which the extra `test` brings)
"""

import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["standard", "editable"])
def wheel(request, tmp_path_factory) -> zipfile.ZipFile:
    """A wheel of a copy of the tree, as `pip install .` and `pip install -e .` build it."""
    pytest.importorskip("hatchling", reason="hatchling is not installed in this environment")
    work = tmp_path_factory.mktemp("wheel")
    for name in ("l2d", "lm_eval_ext", "training"):
        shutil.copytree(REPOSITORY / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, work / name)
    build = (
        "from hatchling.builders.wheel import WheelBuilder\n"
        f"print(*WheelBuilder('.').build(directory='dist', versions=['{request.param}']), sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", build], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (work / "dist").glob("*.whl")
    archive = zipfile.ZipFile(file)
    archive.kind = request.param
    return archive


def test_hook_and_entry_point(wheel):
    assert wheel.read("l2d_lm_eval.pth").decode().strip() == "import lm_eval_ext.harness.plugin"
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    assert "[lm_eval.models]" in text
    assert "l2d = lm_eval_ext.model:L2DLM" in text
    hooks = sorted(name for name in wheel.namelist() if name.endswith(".pth"))
    assert hooks[-1] == "l2d_lm_eval.pth"  # after the editable install's own, which makes the bridge importable
    assert len(hooks) == (2 if wheel.kind == "editable" else 1)


def test_packages_and_their_data(wheel):
    if wheel.kind == "editable":
        pytest.skip("an editable wheel holds no packages")
    names = set(wheel.namelist())
    tracked = [file for top in ("l2d", "lm_eval_ext", "training") for file in (REPOSITORY / top).rglob("*.*")]
    data = (".py", ".yaml", ".json", ".md")
    wanted = {str(file.relative_to(REPOSITORY)) for file in tracked if file.suffix in data}
    assert wanted <= names
    assert not any(name.startswith(("tests/", "demo/")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
