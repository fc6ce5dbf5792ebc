"""Do the tests notice what is wrong? `python -m tests.mutations [--only WORDS] [--jobs N] [--seconds S]`

Every mutation is made in a copy of the repository, and its tests run there. One of them must fail: it is caught. If all
pass it survived. The last line is `N caught, M survived`; the exit status is 1 unless all are caught.

- Before anything else all named tests must pass on a copy without an edit.
- The libraries are imported once. Each mutation runs in a fork, which imports our modules from its own copy.
- An edit that does not fit its file, tests that cannot be collected, and a run over the time limit are errors: they
  count as neither, and the exit status is 1.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.mutations import Mutation, bases, evaluation, mutated, network, sampling, training

REPOSITORY = Path(__file__).resolve().parents[2]
MUTATIONS = [*sampling.MUTATIONS, *network.MUTATIONS, *training.MUTATIONS, *evaluation.MUTATIONS, *bases.MUTATIONS]
_PROJECT = ("l2d", "training", "lm_eval_ext", "tests")
_LIBRARIES = (
    "pytest", "hypothesis", "torch", "scipy.stats", "torchdiffeq", "transformers", "transformers.models.llama",
    "transformers.models.auto.tokenization_auto", "transformers.generation", "peft", "datasets", "trl", "accelerate",
    "lm_eval.models.huggingface", "lm_eval.evaluator",
)  # fmt: skip
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def preload() -> None:
    """Import the libraries, and none of our modules; the hook that waits for lm-eval is one of them."""
    os.environ.update(_ENVIRONMENT)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_ours(getattr(finder, "__module__", ""))]
    for name in _LIBRARIES:
        importlib.import_module(name)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in _PROJECT


@contextlib.contextmanager
def snapshot() -> Iterator[Path]:
    """A copy of the repository's files, tracked and new, as they are now, in a temporary folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        for name in filter(None, listed.stdout.split("\0")):
            source, target = REPOSITORY / name, Path(folder, name)
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield Path(folder)


def _be_pytest(root: Path, tests: list[str]) -> None:
    """Run `tests` in `root` and end this process with pytest's status."""
    status = 70
    try:
        os.setsid()
        os.chdir(root)
        log = os.open(root.parent / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["PYTHONPATH"] = str(root)
        sys.path[:] = [str(root), *(entry for entry in sys.path if Path(entry or ".").resolve() != REPOSITORY)]
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        importlib.import_module("lm_eval_ext.harness.plugin")  # as at the start of an ordinary process
        import pytest

        base = root.parent / "pytest"
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={base}", *tests]))
    finally:
        sys.stdout.flush()
        os._exit(status)


class Run:
    """One fork with a copy of its own of `source`: the tests of a mutation, or all tests without one."""

    def __init__(self, source: Path, mutation: Mutation | None, tests: list[str]):
        self.mutation, self.start = mutation, time.monotonic()
        self.folder = tempfile.TemporaryDirectory(prefix="mutation-")
        self.root = Path(self.folder.name, "repository")
        shutil.copytree(source, self.root)
        if mutation is not None:
            (self.root / mutation.file).write_text(mutated(mutation, self.root), encoding="utf-8")
        self.pid = os.fork()
        if not self.pid:
            _be_pytest(self.root, tests)

    def verdict(self, limit: float) -> str | None:
        """`"caught"`, `"survived"` or what went wrong; `None` while the tests run."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and self.seconds < limit:
            return None
        if not pid:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status) if pid else None
        self.said = (self.root.parent / "log").read_text(errors="replace")
        self.folder.cleanup()
        outcomes = {0: "survived", 1: "caught", None: f"not ended within {limit:.0f} s"}
        return outcomes.get(code, f"pytest ended with status {code}")

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.start


def check_tests(source: Path, mutations: list[Mutation], limit: float) -> None:
    """Raise `SystemExit` unless the tests pass without an edit."""
    run = Run(source, None, sorted({test for mutation in mutations for test in mutation.tests.split()}))
    while (verdict := run.verdict(limit)) is None:
        time.sleep(0.05)
    if verdict != "survived":
        raise SystemExit(f"the tests do not pass without a mutation ({verdict}):\n{run.said[-6000:]}")
    print(f"without a mutation all tests pass ({run.seconds:.0f} s)", flush=True)


def try_all(source: Path, mutations: list[Mutation], jobs: int, limit: float) -> dict[str, str]:
    """Verdict of each mutation by name, printed as they come."""
    waiting, running, verdicts = list(mutations), [], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutation = waiting.pop(0)
            try:
                running.append(Run(source, mutation, mutation.tests.split()))
            except ValueError as error:
                verdicts[mutation.name] = str(error)
                print(f"ERROR     {error}", flush=True)
        for run in list(running):
            if (verdict := run.verdict(limit)) is not None:
                running.remove(run)
                verdicts[run.mutation.name] = verdict
                print(f"{verdict:9} {run.mutation.name} ({run.seconds:.0f} s)", flush=True)
                if verdict not in ("caught", "survived"):
                    print(run.said[-3000:], flush=True)
        time.sleep(0.02)
    return verdicts


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose name has these words")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of each mutation")
    given = parser.parse_args(arguments)
    chosen = [mutation for mutation in MUTATIONS if given.only in mutation.name]
    if not chosen:
        parser.error(f"no mutation has {given.only!r} in its name.")
    preload()
    with snapshot() as source:
        check_tests(source, chosen, given.seconds * 10)
        verdicts = list(try_all(source, chosen, given.jobs, given.seconds).values())
    caught, survived = verdicts.count("caught"), verdicts.count("survived")
    errors = len(verdicts) - caught - survived
    print(f"{caught} caught, {survived} survived" + (f", {errors} without a verdict" if errors else ""))
    return int(caught < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
