"""Runs the harness's command line in processes of their own, several at once, and reads what it wrote."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

TASKS = Path(__file__).parent / "tasks"


@dataclasses.dataclass
class Run:
    """A started command and the folder that it writes to."""

    process: subprocess.Popen
    output: Path

    def finish(self) -> "Run":
        """Wait; fail with the command's own words if it did."""
        stdout, stderr = self.process.communicate(timeout=900)
        assert self.process.returncode == 0, f"{stdout}\n{stderr}"
        return self

    @property
    def results(self) -> dict[str, Any]:
        """The results file."""
        (file,) = self.output.glob("*/results_*.json")
        return json.loads(file.read_text())

    def samples(self, task: str) -> list[dict[str, Any]]:
        """The samples file of `task`."""
        (file,) = self.output.glob(f"*/samples_{task}_[0-9]*.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]

    def compute(self, task: str) -> list[dict[str, Any]]:
        """The compute file of `task`."""
        (file,) = self.output.glob(f"*/compute_{task}_[0-9]*.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]


def start(command: list[str], output: Path, *arguments: str, cwd: Path | None = None) -> Run:
    """Start `command` with `arguments`, one thread, offline, without a GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    full = [*command, *arguments, "--output_path", str(output), "--device", "cpu"]
    return Run(
        subprocess.Popen(
            full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd or REPOSITORY, env=environment
        ),
        output,
    )


def module(name: str) -> list[str]:
    """The command `python -m name`."""
    return [sys.executable, "-m", name]
