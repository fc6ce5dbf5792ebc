"""Training that is killed with SIGKILL again and again, and then finished, equals a run that nobody disturbed.

Run: `python -m pytest tests/faults/test_killed_training.py`; with `-s` it prints what was killed.
"""

import filecmp
import random
import shutil
from pathlib import Path

import pytest

from l2d import L2DForCausalLM
from tests.faults.conftest import STEPS, TRAIN
from tests.faults.nursery import KillTimes
from tests.training_runs import logged, same_bits, train_in_process, weights, write_recipe
from training.checkpointing.resume import missing_parts

KILLS = 20


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


def moment_of_kill(kind: str, out: Path, chance: random.Random) -> tuple[str, int] | None:
    """What `kill_while` is told; a checkpoint takes some 50,000 calls here, the final model 70,000."""
    if kind == "saving":
        return r"unfinished-checkpoint-\d+", chance.randint(100, 70_000)
    return (f"{out.name}/config.json", chance.randint(1, 60_000)) if kind == "final" else None


@pytest.mark.slow
def test_killed_at_twenty_moments(nursery, training_settings, undisturbed, tmp_path):
    whole, seconds = undisturbed
    chance = random.Random(7)
    kinds = ["any time", "saving", "any time", "saving", "final"] * (KILLS // 5)
    killed, number, finished, times = 0, 0, 0, KillTimes(seconds, chance, tries=3 * KILLS)
    while killed < KILLS:
        out, kind = tmp_path / f"out-{number}", kinds[killed]
        recipe = write_recipe(tmp_path / "recipe.yaml", output_dir=out, **training_settings)
        arguments = ["--config", recipe, "--resume_from_checkpoint", "auto"]
        command = nursery.start(TRAIN, *arguments, kill=moment_of_kill(kind, out, chance))
        status = times.kill(command) if kind == "any time" else command.wait()
        if status == -9:
            killed += 1
            assert kind != "saving" or len(list(out.glob("unfinished-checkpoint-*"))) == 1
            assert kind != "final" or (out / "config.json").exists()
            check_left(out, whole)
        else:
            assert status == 0, command.text
            check_finished(out, whole)
            shutil.rmtree(out)
            number, finished = number + 1, finished + 1
    done = nursery.run(TRAIN, "--config", recipe, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.text
    check_finished(out, whole)
    print(f"{killed} kills, {finished + 1} runs finished")


@pytest.mark.slow
def test_killed_through_the_real_command(training_settings, undisturbed, tmp_path):
    """The same with `python -m training.train` in a process of its own, killed while it writes its third checkpoint."""
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "recipe.yaml", output_dir=out, **training_settings)
    arguments = ["--config", str(recipe), "--resume_from_checkpoint", "auto"]
    one_thread = {"OMP_NUM_THREADS": "1"}  # as the undisturbed run
    killing = ["unfinished-checkpoint-6", "30000", TRAIN, *arguments]
    killed = train_in_process(killing, code="from tests.faults.kills import main; main()", env=one_thread)
    assert killed.returncode == -9, killed.stderr
    assert sorted(folder.name for folder in out.glob("*checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "unfinished-checkpoint-6",
    ]
    check_left(out, undisturbed[0])
    done = train_in_process(arguments, env=one_thread)
    assert done.returncode == 0, done.stderr[-2000:]
    check_finished(out, undisturbed[0])
