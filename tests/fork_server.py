"""Runs many commands quickly: imports the libraries once, then forks a process for every command.

`python -m tests.fork_server < jobs > outcomes`: a line of JSON each way. A job is `{"words": [...], "cwd": ...}` with
the words of `python -m`; its module runs as `__main__` in a fork, with file descriptors of its own, so that exit
status and output are those of the command. `Outcome` and `run_all` are the other side.
"""

import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HEAVY = (
    "torch", "trl", "peft", "datasets", "transformers.models.auto.tokenization_auto", "l2d.modeling", "l2d.cli.session",
    "training.config", "training.data.loading", "training.planning.dry_run",
    "lm_eval._cli.run", "lm_eval.config.evaluate_config",
    "lm_eval_ext.harness.plugin", "lm_eval_ext.harness.preflight", "lm_eval_ext.leaderboard.board",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did: exit status, standard output and error, what it made or changed below its folder."""

    status: int
    out: str
    err: str
    seconds: float
    changed: list[str]


def snapshot(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below `folder`."""
    found = {}
    for path in Path(folder).rglob("*"):
        stat = path.lstat()
        found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return found


def changes(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """Paths that are new, gone, or not what they were."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def run_all(jobs: list[dict], environment: dict[str, str]) -> list[Outcome]:
    """Run `jobs` one after the other in a server of their own."""
    text = "".join(json.dumps(job) + "\n" for job in jobs)
    command = [sys.executable, "-m", "tests.fork_server"]
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=900)
    lines = done.stdout.splitlines()
    assert len(lines) == len(jobs), done.stderr
    return [Outcome(**json.loads(line)) for line in lines]


def _child(words: list[str], cwd: str, out: int, err: int) -> None:
    """Be the command `python -m WORDS`; never returns."""
    status = 1
    try:
        os.chdir(cwd)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdin = open(0, closefd=False)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:  # as the interpreter does it
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(words: list[str], cwd: str) -> Outcome:
    before, start = snapshot(cwd), time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _child(words, cwd, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - start
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Outcome(os.waitstatus_to_exitcode(status), *texts, seconds, changes(before, snapshot(cwd)))


def main() -> None:
    """Answer the jobs of standard input."""
    for name in HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(dataclasses.asdict(_run(job["words"], job["cwd"]))), flush=True)


if __name__ == "__main__":
    main()
