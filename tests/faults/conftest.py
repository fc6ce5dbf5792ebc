"""What the fault tests share.

- `nursery`: starts our commands without importing the libraries each time
- `small_disk`: a file system of a chosen size, where this process may mount one
- `training_settings`, `undisturbed`: a small training run, and what it gives
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery
from tests.training_runs import SMALL, sums, write_jsonl, write_recipe

TRAIN, SWEEP, REPORT, TOOL = "training.train", "lm_eval_ext.sweep", "lm_eval_ext.leaderboard.__main__", "l2d.__main__"
EVALUATE = "lm_eval_ext.__main__"
_MODULES = [
    TRAIN,
    SWEEP,
    REPORT,
    TOOL,
    EVALUATE,
    "training.trainer",
    "training.data.loading",
    "l2d.modeling",
    "datasets",
]
_MODULES += [
    "lm_eval_ext.model",
    "lm_eval._cli",
    "lm_eval_ext.leaderboard.page",
    "jinja2",
    "matplotlib.backends.backend_svg",
]
# The harness's own tasks are left out: looking through them takes most of a short run's time.
_FEW_TASKS = """
import functools, lm_eval.tasks.manager as manager
init = manager.TaskManager.__init__
def few(self, *args, **kwargs):
    kwargs["include_defaults"] = False
    init(self, *args, **kwargs)
manager.TaskManager.__init__ = functools.wraps(init)(few)
"""
STEPS = 12


@pytest.fixture(scope="session")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    """One for all tests."""
    with Nursery(tmp_path_factory.mktemp("said"), _MODULES, _FEW_TASKS) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def training_settings(base_dir, tmp_path_factory) -> dict:
    """A checkpoint after every second step, with an optimizer's state and evaluation."""
    data = write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", sums(44))
    more = {"save_strategy": "steps", "save_steps": 2, "eval_holdout": 4, "eval_strategy": "steps", "eval_steps": 4}
    more |= {"lr_scheduler_type": "constant"}  # so that a step too many would show
    return {**SMALL, "base": base_dir, "dataset": data, "max_steps": STEPS, "gradient_accumulation_steps": 2, **more}


@pytest.fixture(scope="session")
def undisturbed(nursery, training_settings, tmp_path_factory) -> tuple[Path, float]:
    """Folder of the run, and how many seconds it took."""
    work = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    recipe = write_recipe(work / "recipe.yaml", output_dir=work / "out", **training_settings)
    done = nursery.run(TRAIN, "--config", recipe)
    assert done.returncode == 0, done.text
    return work / "out", time.monotonic() - start


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """`small_disk(kilobytes, *options)`: folder of a mounted file system; called again, its size or options change.

    Skips where this process may not mount.
    """
    place = tmp_path / "disk"

    def mount(kilobytes: int, *options: str) -> Path:
        again = ["remount"] if place.exists() else []
        place.mkdir(exist_ok=True)
        words = ",".join([*again, f"size={kilobytes}k", *options])
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", words, "tmpfs", place], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this process may not mount a file system")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", place], check=True)
    shutil.rmtree(place, ignore_errors=True)
