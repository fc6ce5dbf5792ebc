"""Environments of their own, for checks that need other versions or no repository.

- `Environment`: a new virtual environment; installs with pip, runs its Python
- `torch_pin`: the torch that `constraints.txt` names
"""

import dataclasses
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
CONSTRAINTS = REPOSITORY / "constraints.txt"


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`, made when it is not there."""

    folder: Path

    def __post_init__(self) -> None:
        if not self.python.exists():
            venv.create(self.folder, with_pip=False, symlinks=True)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def install(self, *requirements: str) -> None:
        """`pip install` with the indexes that pip is configured with."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        subprocess.run([*pip, *requirements], check=True)

    def versions(self, *names: str) -> dict[str, str]:
        """Installed versions by name."""
        code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
        done = subprocess.run([self.python, "-c", code, *names], check=True, capture_output=True, text=True)
        return dict(zip(names, done.stdout.split(), strict=True))

    def variables(self, **more: str) -> dict[str, str]:
        """Environment variables: offline, one thread, the environment's own commands first, no other packages."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
        path = os.pathsep.join([str(self.folder / "bin"), kept.get("PATH", "")])
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**kept, **quiet, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path, **more}


def torch_pin() -> str:
    """The requirement `torch==VERSION` of `constraints.txt`."""
    return re.search(r"^torch==\S+", CONSTRAINTS.read_text(encoding="utf-8"), re.M)[0]
