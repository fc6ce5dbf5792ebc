"""The core of the suite with the newest or the oldest libraries that `pyproject.toml` allows.

    python -m tests.versions oldest
    python -m tests.versions newest --keep DIR

Builds an environment in a temporary folder (or in DIR, which stays), installs the project, and runs the tests in `CORE`
that are not slow. Torch is the one of `constraints.txt` in both. Prints a row for the table in `docs/versions.md`; the
exit status is pytest's. Some minutes; needs pip's index.
"""

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tests.environments import REPOSITORY, Environment, torch_pin

CORE = (
    "l2d/test_fixed_grid", "l2d/test_sampler_config", "l2d/test_sampling", "l2d/test_model", "l2d/test_architectures",
    "l2d/test_edge_cases", "l2d/test_trace", "l2d/test_warm_start", "l2d/test_hub", "training/test_config",
    "training/test_data", "training/test_losses", "training/test_mixture", "training/test_recipes",
    "training/test_trainer", "training/test_entry", "lm_eval_ext/test_arguments", "lm_eval_ext/test_plugin",
    "lm_eval_ext/test_parts", "lm_eval_ext/test_model", "lm_eval_ext/test_released",
)  # fmt: skip
TOOLS = ("aiohttp", "hatchling", "hypothesis", "pytest", "tensorboard")
"""Of the extra `test`, what the core needs."""
NAMED = ("transformers", "trl", "peft", "lm-eval", "accelerate", "datasets")


def requirements(which: str) -> list[str]:
    """What pip is asked for: every dependency at its lower bound (`oldest`), or as it stands (`newest`)."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = [text for text in project["optional-dependencies"]["test"] if Requirement(text).name in TOOLS]
    found = []
    for text in [*project["dependencies"], *tools]:
        asked = Requirement(text)
        if asked.name == "torch":
            continue
        if which == "oldest":
            (lower,) = (bound.version for bound in asked.specifier if bound.operator == ">=")
            extras = f"[{','.join(sorted(asked.extras))}]" if asked.extras else ""
            text = f"{asked.name}{extras}=={lower}"
        found.append(text)
    return [torch_pin(), *found]


def row(which: str, environment: Environment, summary: str, seconds: float) -> str:
    """A line of the table in `docs/versions.md`."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions(*NAMED).items())
    python = ".".join(map(str, sys.version_info[:3]))
    return f"| {datetime.date.today()} | {which} | {python} | {versions} | {summary} | {seconds:.0f} s |"


def main(arguments: list[str] | None = None) -> int:
    """Build, run, report; pytest's exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("oldest", "newest"))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the environment here and leave it")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="l2d-versions-") as temporary:
        environment = Environment(given.keep or Path(temporary))
        environment.install(*requirements(given.which))
        environment.install("--no-deps", str(REPOSITORY))
        tests = [f"tests/{name}.py" for name in CORE]
        start = time.monotonic()
        done = subprocess.run(
            [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests],
            cwd=REPOSITORY, env=environment.variables(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        print(done.stdout)
        summary = re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1].strip("= "))
        print(row(given.which, environment, summary, time.monotonic() - start))
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
