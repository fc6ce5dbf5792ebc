"""Sweeps and reports that are killed with SIGKILL at random moments, and run again, give what undisturbed ones give.

Run: `python -m pytest tests/faults/test_killed_evaluation.py`; with `-s` it prints what was killed.
"""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import yaml

from lm_eval_ext.leaderboard.files import read_runs
from lm_eval_ext.sweep import read_plan, table
from tests.faults.conftest import REPORT, SWEEP
from tests.faults.nursery import KillTimes
from tests.integration.harness import TASKS
from tests.lm_eval_ext.test_leaderboard import write_demo

SWEEP_KILLS, REPORT_KILLS = 6, 20


def write_sweep(file: Path, output: Path, l2d_dir: Path) -> Path:
    """The base and a budget on two tasks, of which one generates."""
    content = {
        "output": str(output),
        "tasks": ["l2d_test_choice", "l2d_test_generate"],
        "base": True,
        "model_args": {"pretrained": str(l2d_dir), "device": "cpu"},
        "grid": {"diffusion_budget": [3]},
        "run": {"include_path": str(TASKS), "batch_size": 8, "limit": 4, "gen_kwargs": {"max_gen_toks": 4}},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def answers(output: Path) -> dict[str, list]:
    """Samples and costs without seconds of all settings, by place."""
    found = {}
    for file in sorted(output.glob("*/*/*/*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        name = f"{file.relative_to(output).parent} {file.name.rsplit('_', 1)[0]}"
        assert name not in found
        found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return found


@pytest.mark.slow
def test_a_sweep_killed_again_and_again(nursery, l2d_dir, tmp_path):
    whole, out, chance = tmp_path / "whole", tmp_path / "out", random.Random(3)
    start = time.monotonic()
    done = nursery.run(SWEEP, write_sweep(tmp_path / "whole.yaml", whole, l2d_dir))
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.text
    file, killed, finished = write_sweep(tmp_path / "sweep.yaml", out, l2d_dir), 0, 0
    times = KillTimes(seconds, chance, tries=4 * SWEEP_KILLS)
    while killed < SWEEP_KILLS:
        command = nursery.start(SWEEP, file)
        status = times.kill(command)
        if status != -9:
            assert status == 0, command.text
            assert answers(out) == answers(whole)
            shutil.rmtree(out)
            finished += 1
            continue
        killed += 1
        runs, skipped = read_runs([out]) if out.exists() else ([], [])
        assert all(".partial" in item.reason for item in skipped)
        complete = [folder for folder in out.glob("*/*") if folder.suffix != ".partial"]
        assert len(runs) == len(complete)  # what looks complete can be read
    done = nursery.run(SWEEP, file)
    assert done.returncode == 0, done.text
    assert answers(out) == answers(whole) and len(answers(out)) == 8
    assert table(read_plan(file)) == table(read_plan(tmp_path / "whole.yaml")) == (out / "table.md").read_text()
    assert not list(out.rglob("*.partial"))
    print(f"{killed} kills of a sweep, {finished + 1} sweeps finished")


@pytest.mark.slow
def test_a_report_killed_again_and_again(nursery, tmp_path):
    """Every file is at any time an old one or a new one."""
    results, out, chance = write_demo(tmp_path / "results"), tmp_path / "out", random.Random(5)
    arguments = [results, "--out", out]

    def contents() -> dict[str, str]:
        return {file.name: _undated(file.read_text()) for file in out.glob("*") if not file.name.startswith(".")}

    start = time.monotonic()
    done = nursery.run(REPORT, *arguments, "--title", "old")
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.text
    old = contents()
    assert nursery.run(REPORT, *arguments, "--title", "new").returncode == 0
    new = contents()
    assert old["leaderboard.html"] != new["leaderboard.html"] and len(new) == 4
    shutil.rmtree(out)
    killed, tried, times = 0, 0, KillTimes(seconds, chance, tries=4 * REPORT_KILLS)
    while killed < REPORT_KILLS:
        command = nursery.start(REPORT, *arguments, "--title", ("old", "new")[tried % 2])
        status = times.kill(command)
        tried, killed = tried + 1, killed + (status == -9)
        for name, text in contents().items():
            assert text in (old[name], new[name]), name
    assert nursery.run(REPORT, *arguments, "--title", "new").returncode == 0
    assert contents() == new and not list(out.glob(".*"))
    print(f"{killed} kills of a report")


class _Ended:
    """A command that has ended by itself."""

    def poll(self) -> int:
        return 0

    kill = poll


def test_kills_by_the_clock_have_a_bound():
    times = KillTimes(8.0, random.Random(0), tries=12)
    assert [times.kill(_Ended()) for _ in range(12)] == [0] * 12 and times.seconds == 2.0
    with pytest.raises(AssertionError, match="12 commands were not enough"):
        times.kill(_Ended())


def _undated(page: str) -> str:
    head, built, rest = page.partition("Built ")
    return head + rest[len("2026-01-01 00:00 UTC") :] if built else page
