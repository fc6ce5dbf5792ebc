"""Training that is killed with SIGKILL again and again, and then finished, equals a run that nobody disturbed.

Run: `python -m pytest tests/faults/test_killed_training.py` (about half a minute); with `-s` it prints what was killed.
"""

import collections
import filecmp
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2d import L2DForCausalLM
from tests.conftest import REPOSITORY
from tests.faults.conftest import STEPS, TRAIN
from tests.faults.nursery import Command
from tests.training_runs import logged, same_bits, train_in_process, weights, write_recipe
from training.checkpoints import missing_parts

KILLS = 20


def kill_at(moment: str, command: Command, out: Path, seconds: float, chance: random.Random) -> bool:
    """Kill the command at a moment; whether it was still running then."""
    started, looked = time.time_ns(), time.monotonic()
    stop = looked + (0.6 * seconds * chance.random() if moment == "any time" else 600)
    seen, steps = {path.name for path in out.glob("unfinished-*")}, chance.randint(1, 2)
    while time.monotonic() < stop:
        if moment == "saving":  # after the folder of the second checkpoint appeared, say
            new = {path.name for path in out.glob("unfinished-*")} - seen
            seen, steps = seen | new, steps - len(new)
        final = out / "config.json"
        if not steps or moment == "final" and final.exists() and final.stat().st_mtime_ns > started:
            time.sleep(chance.random() * 0.02)
            break
        if time.monotonic() > looked + 0.02:
            looked = time.monotonic()
            if command.poll() is not None:
                break
        time.sleep(0.001)
    return command.kill() == -9


def check_left(out: Path, whole: Path) -> None:
    """All that looks like a whole checkpoint is one, and equals the undisturbed run's, file by file."""
    for folder in out.glob("checkpoint-*"):
        assert missing_parts(str(folder)) == [], folder
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"):
            assert filecmp.cmp(folder / name, whole / folder.name / name, shallow=False), (folder, name)
    try:
        final = L2DForCausalLM.from_pretrained(out)
    except ValueError:
        return  # not there yet, or files of it that do not belong together
    assert all((weights(whole)[name] == value).all() for name, value in final.trained_parameters())


def check_finished(out: Path, whole: Path) -> None:
    """The same as the undisturbed run, to the bit."""
    assert same_bits(weights(whole), weights(out))
    assert logged(whole) == logged(out) and len(logged(out)) == STEPS
    assert logged(whole, "eval_loss") == logged(out, "eval_loss")
    assert not list(out.glob("unfinished-*"))


@pytest.mark.slow
def test_killed_at_twenty_moments(nursery, training_settings, undisturbed, tmp_path):
    whole, seconds = undisturbed
    chance = random.Random(7)
    moments = ["any time", "saving", "any time", "saving", "final"] * (KILLS // 5)
    killed, left, number, finished = 0, collections.Counter(), 0, 0
    while killed < KILLS:
        out = tmp_path / f"out-{number}"
        recipe = write_recipe(tmp_path / "recipe.yaml", output_dir=out, **training_settings)
        command = nursery.start(TRAIN, "--config", recipe, "--resume_from_checkpoint", "auto")
        moment = moments[killed]
        if kill_at(moment, command, out, seconds, chance):
            killed += 1
            left[f"{moment}, {'half a checkpoint left' if list(out.glob('unfinished-*')) else 'nothing half'}"] += 1
            check_left(out, whole)
        else:
            assert command.wait() == 0, command.text
            check_finished(out, whole)
            shutil.rmtree(out)
            number, finished = number + 1, finished + 1
    done = nursery.run(TRAIN, "--config", recipe, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.text
    check_finished(out, whole)
    print(f"{killed} kills, {finished + 1} runs finished: {dict(left)}")
    assert sum(count for name, count in left.items() if name.startswith("saving, half")) >= 5


def test_killed_through_the_real_command(training_settings, undisturbed, tmp_path):
    """The same with `python -m training.train` in a process of its own, killed while it writes its third checkpoint."""
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "recipe.yaml", output_dir=out, **training_settings)
    command = [sys.executable, "-m", TRAIN, "--config", str(recipe), "--resume_from_checkpoint", "auto"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (out / "unfinished-checkpoint-6").exists():
        assert process.poll() is None, process.stderr.read()
    process.kill()
    process.communicate()
    check_left(out, undisturbed[0])
    assert not (out / "checkpoint-8").exists()
    done = train_in_process(command[3:])
    assert done.returncode == 0, done.stderr[-2000:]
    check_finished(out, undisturbed[0])
