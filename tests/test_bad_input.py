"""Bad input to every command: one sentence with the argument's name and a remedy, soon, and nothing is written.

Run: `python -m pytest tests/test_bad_input.py` (about a minute)

The table is `bad_input_cases`. Every case runs the real command to its exit. Starting a process with torch and TRL
takes seconds, so all cases run in forks of one server that has imported the libraries (`fork_server`), and some of
each command also as ordinary processes. How soon these end depends on what else the machine does, so it is only judged
on request, on a quiet one, where they run one after the other:

    JUDGE_SECONDS=1 python -m pytest tests/test_bad_input.py -k test_as_a_process_of_its_own -rP
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.bad_input_cases import CASES, FILES, Case
from tests.conftest import JUDGE_SECONDS, REPOSITORY
from tests.fork_server import Outcome, changes, run_all, snapshot

ENVIRONMENT = {
    **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
ALONE = [case for case in CASES if case.alone]


@pytest.fixture(scope="module")
def work(tmp_path_factory, base_dir, make_l2d, l2d_dir):
    """A folder with everything that the cases name."""
    work = tmp_path_factory.mktemp("work")
    for name, text in FILES.items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(text.encode(errors="surrogateescape"))
    for name, source in {
        "base": base_dir,
        "l2d": l2d_dir,
        "guided": make_l2d(base_dir, classes=["math", "coding"]),
    }.items():
        shutil.copytree(source, work / name)
    for name in ("hollow", "lost", "mute"):
        shutil.copytree(l2d_dir, work / name)
    (work / "hollow" / "model.safetensors").unlink()
    (work / "mute" / "chat_template.jinja").unlink()
    config = json.loads((work / "lost" / "config.json").read_text())
    config["base_name_or_path"] = "/nowhere/gone"
    (work / "lost" / "config.json").write_text(json.dumps(config))
    return work


@pytest.fixture(scope="module")
def forked(work) -> dict[Case, Outcome]:
    """All cases, in forks."""
    jobs = [{"words": case.argv, "cwd": str(work)} for case in CASES]
    return dict(zip(CASES, run_all(jobs, ENVIRONMENT), strict=True))


@pytest.fixture(scope="module")
def started(work) -> dict[Case, Outcome]:
    """Some cases, as processes of their own."""

    def run(case: Case) -> Outcome:
        start = time.perf_counter()
        command = [sys.executable, "-m", *case.argv]
        done = subprocess.run(
            command, cwd=work, env=ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        return Outcome(done.returncode, done.stdout, done.stderr, time.perf_counter() - start, [])

    before = snapshot(work)
    with ThreadPoolExecutor(1 if JUDGE_SECONDS else 2) as pool:
        outcomes = dict(zip(ALONE, pool.map(run, ALONE), strict=True))
    assert changes(before, snapshot(work)) == []
    return outcomes


OTHERS = re.compile(r"Failed to load |W\d{4} \d\d:")  # torchao and bitsandbytes, where peft imports them


def check(case: Case, outcome: Outcome) -> None:
    assert outcome.status not in (0, None), outcome.out
    ours = [line for line in outcome.err.splitlines() if not OTHERS.match(line)]
    assert len(ours) == 1 and "Traceback" not in outcome.err, outcome.err
    assert case.names in outcome.err and case.remedy in outcome.err, outcome.err
    assert outcome.changed == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words)
def test_one_sentence_and_nothing_written(forked, case):
    check(case, forked[case])


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.words)
def test_as_a_process_of_its_own(started, case):
    check(case, started[case])
    print(f"{started[case].seconds:.1f} s")
    assert not JUDGE_SECONDS or started[case].seconds < 5


def test_the_table_covers_every_command():
    commands = {case.argv[0] if case.argv[0] != "l2d" else " ".join(case.argv[:2]) for case in CASES}
    assert commands >= {
        "training.train", "lm_eval_ext", "lm_eval_ext.leaderboard", "lm_eval_ext.sweep", "l2d trace", "l2d chat"
    }  # fmt: skip
    assert len({case.words for case in CASES}) == len(CASES) >= 60
