"""The demo's output folder, its runner and its plan.

    pytest tests/training/test_demo_run.py

* nothing is overwritten without being asked; an interrupted run continues; a failing step shows the end of its log
* the recipes are ones that the trainer's entry point accepts; the harness's command lines are complete
"""

import json
import sys
import time
from pathlib import Path

import pytest

from tests.training_runs import BASELINE, SMALL, sums, write_jsonl, write_recipe
from training.demo import __main__ as demo
from training.demo import timing
from training.demo.evaluate import evaluate
from training.demo.plan import CONTROLS, GATED, LAYOUT, SETTINGS, build_steps, lm_eval_command, recipes, write_recipes
from training.demo.runner import OutOfTime, Step, StepFailed, run_steps
from training.demo.workspace import LOCK, open_workspace
from training.recipe import read_recipe

SETTING = {"recipes": 1}
STATE = LAYOUT.state


def python_step(name, code, output, **options):
    return Step(name, (sys.executable, "-c", code), output, **options)


def write(path, text="done"):
    return f"open({str(path)!r}, 'w').write({text!r})"


def test_new_and_empty_folders_are_taken(tmp_path):
    assert open_workspace(tmp_path / "new", SETTING, False, LAYOUT).seconds == {}
    (tmp_path / "empty").mkdir()
    assert open_workspace(tmp_path / "empty", SETTING, False, LAYOUT).seconds == {}


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folders_and_files_are_refused(tmp_path, overwrite):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="holds 'data', which is no demo's: choose another folder with OUT="):
        open_workspace(tmp_path, SETTING, overwrite, LAYOUT)
    assert (tmp_path / "data").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: choose a folder with OUT="):
        open_workspace(tmp_path / "file", SETTING, overwrite, LAYOUT)


def test_finished_demo_is_overwritten_only_when_asked(tmp_path):
    out = tmp_path / "demo"
    workspace = open_workspace(out, SETTING, False, LAYOUT)
    workspace.record("data", 1.0)
    workspace.finish()
    (out / "report.md").touch()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"finished demo .*OUT=, or replace it with OVERWRITE=1 \(--overwrite\)\.$"):
        open_workspace(out, SETTING, False, LAYOUT)
    assert open_workspace(out, SETTING, True, LAYOUT).seconds == {}
    assert sorted(path.name for path in out.iterdir()) == [LOCK, STATE, "notes.txt"]


def test_folder_in_use_is_refused(tmp_path):
    workspace = open_workspace(tmp_path / "demo", SETTING, False, LAYOUT)
    with pytest.raises(ValueError, match="in use by a demo that still runs"):
        open_workspace(tmp_path / "demo", SETTING, True, LAYOUT)
    workspace.lock.close()
    open_workspace(tmp_path / "demo", SETTING, False, LAYOUT)


def test_comma_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="holds a comma"):
        open_workspace(tmp_path / "a,b", SETTING, False, LAYOUT)
    assert not (tmp_path / "a,b").exists()


def test_unfinished_demo_continues_only_with_its_own_settings(tmp_path):
    open_workspace(tmp_path / "demo", SETTING, False, LAYOUT).record("data", 1.0)
    assert open_workspace(tmp_path / "demo", SETTING, False, LAYOUT).seconds == {"data": 1.0}
    with pytest.raises(ValueError, match="unfinished demo of other settings"):
        open_workspace(tmp_path / "demo", {"recipes": 2}, False, LAYOUT)
    with pytest.raises(ValueError, match="unfinished demo of other settings"):
        open_workspace(tmp_path / "demo", {}, False, LAYOUT)
    assert open_workspace(tmp_path / "demo", {**SETTING, "another": 3}, False, LAYOUT).seconds == {"data": 1.0}


def test_unreadable_state_is_one_sentence(tmp_path):
    (tmp_path / STATE).write_text("{")
    with pytest.raises(ValueError, match=f"unreadable {STATE}"):
        open_workspace(tmp_path, SETTING, False, LAYOUT)


def test_steps_run_in_order_and_only_once(tmp_path, capsys):
    workspace = open_workspace(tmp_path / "demo", SETTING, False, LAYOUT)
    out = workspace.folder
    steps = [
        python_step(
            "second", f"open({str(out / 'first')!r}); {write(out / 'second')}", out / "second", needs=("first",)
        ),
        python_step("first", f"import time; time.sleep(0.2); {write(out / 'first')}", out / "first"),
    ]
    run_steps(steps, workspace, {}, tmp_path)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["[ 1/2] first", "[ 2/2] second"]
    assert set(json.loads((out / STATE).read_text())["seconds"]) == {"first", "second"}

    (out / "second").unlink()
    workspace.lock.close()
    run_steps(steps, open_workspace(out, SETTING, False, LAYOUT), {}, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 of 2 steps were complete already"
    assert [line.split(",")[0] for line in lines[1:]] == ["[ 2/2] second"]


def test_output_of_an_interrupted_step_is_removed_first(tmp_path):
    workspace = open_workspace(tmp_path / "demo", SETTING, False, LAYOUT)
    folder = workspace.folder / "step"
    folder.mkdir()
    (folder / "half").touch()
    run_steps([python_step("step", f"import os; os.mkdir({str(folder)!r})", folder)], workspace, {}, tmp_path)
    assert not list(folder.iterdir())


def test_failing_step_ends_the_others_and_shows_its_log(tmp_path):
    workspace = open_workspace(tmp_path / "demo", SETTING, False, LAYOUT)
    slow = python_step("slow", "import time; time.sleep(600)", tmp_path / "slow")
    bad = python_step("bad", "print('working', flush=True); raise SystemExit('it broke')", tmp_path / "bad")
    started = time.monotonic()
    with pytest.raises(StepFailed, match=r"(?s)bad failed \(exit status 1\).*bad\.log:.*working\n *it broke"):
        run_steps([slow, bad], workspace, {}, tmp_path)
    assert time.monotonic() - started < 300
    assert workspace.seconds == {}


def test_time_that_is_over_ends_steps_with_sigterm(tmp_path, capsys):
    """A step that saves itself on SIGTERM is waited for, and is not complete; the next run begins with it."""
    workspace = open_workspace(tmp_path / "demo", SETTING, False, LAYOUT)
    saved, begun = tmp_path / "saved", tmp_path / "begun"
    code = (
        f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: ({write(saved)}, sys.exit(0))); "
        f"{write(begun)}; time.sleep(600)"
    )
    steps = [
        python_step("first", write(tmp_path / "first"), tmp_path / "first"),
        python_step("long", code, tmp_path / "long", needs=("first",)),
        python_step("last", write(tmp_path / "last"), tmp_path / "last", needs=("first",)),
    ]

    class OnceItRuns(float):
        """A time that is over as soon as the long step runs."""

        def __le__(self, now):
            return begun.exists()

        def __gt__(self, now):
            return not begun.exists()

    with pytest.raises(OutOfTime, match="the time is over with 1 of 3 steps complete; ended: long"):
        run_steps(steps, workspace, {}, tmp_path, slots=1, until=OnceItRuns())
    assert saved.exists() and not (tmp_path / "last").exists()
    assert set(workspace.seconds) == {"first"}
    assert "[ 1/3] first" in capsys.readouterr().out


def test_step_that_would_overrun_is_not_begun(tmp_path):
    """The first of its kind took an hour: another one is begun only where there is more time than that."""
    workspace = open_workspace(tmp_path / "demo", SETTING, False, LAYOUT)
    (tmp_path / "first").touch()
    workspace.record("first", 3600.0)
    names = {"first": "long", "second": "long", "third": None, "fourth": "short"}
    steps = [python_step(name, write(tmp_path / name), tmp_path / name, kind=kind) for name, kind in names.items()]
    with pytest.raises(OutOfTime, match="the time is over with 3 of 4 steps complete; ended: nothing"):
        run_steps(steps, workspace, {}, tmp_path, until=time.monotonic() + 3000)
    assert not (tmp_path / "second").exists() and (tmp_path / "fourth").exists()
    run_steps(steps, workspace, {}, tmp_path, until=time.monotonic() + 4000)
    assert (tmp_path / "second").exists()


def test_step_without_its_output_has_failed(tmp_path):
    workspace = open_workspace(tmp_path / "demo", SETTING, False, LAYOUT)
    with pytest.raises(StepFailed, match="lazy failed"):
        run_steps([python_step("lazy", "pass", tmp_path / "nothing")], workspace, {}, tmp_path)


@pytest.mark.parametrize("name", ["l2d", "corrupted", "warm", "noise_free", "lora_sft", "full_sft"])
def test_recipes_are_accepted_by_the_entry_point(tmp_path, name):
    write_recipes(tmp_path)
    for folder in ("base", "data"):  # what the steps before leave
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "products_train.jsonl").write_text("{}\n")
    recipe = read_recipe(["--config", str(tmp_path / "configs" / f"{name}.yaml")])
    assert recipe.model.method == (name if name.endswith("_sft") else "l2d")
    assert recipe.settings == recipes(tmp_path)[name] and len(recipes(tmp_path)) == 6
    assert (recipe.training.corruption_rate > 0) == (name == "corrupted")
    assert recipe.model.noise_free == (name == "noise_free") and recipe.model.warm_start == (name == "warm")


def test_every_setting_is_evaluated_in_both_ways(tmp_path, monkeypatch, capsys):
    steps = {step.name: step for step in build_steps(tmp_path)}
    assert {need for step in steps.values() for need in step.needs} <= set(steps)
    evaluations = [step for name, step in steps.items() if name.startswith("evaluate")]
    assert [step.output for step in evaluations] == [
        tmp_path / "results" / name for name in ("base", *recipes(tmp_path))
    ]
    run: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: run.append(sys.argv))
    monkeypatch.setattr(sys, "argv", [])
    for folder, control in CONTROLS.items():
        choice, step = steps[f"choose time {folder}"], steps[f"evaluate {folder}"]
        assert str(tmp_path / "data" / "products_validation.jsonl") in choice.command
        assert step.needs == (choice.name,) and choice.needs == (f"train {folder}",)
        (tmp_path / f"{folder}_controls.json").write_text('{"best_time": 0.1, "model_args": "pretrained=X,seed=1"}')
        run.clear()
        evaluate(Path(step.command[-2]), step.command[-1])
        assert capsys.readouterr().out.splitlines() == [f"$ {' '.join(words)}" for words in run]
        own = [setting for setting in SETTINGS if setting.folder == folder]
        assert len(run) == 2 * len(own) and len({words[words.index("--output_path") + 1] for words in run}) == len(run)
        assert all(any(word.startswith(str(step.output)) for word in words) for words in run)
        greedy, sampled = (" ".join(words) for words in run if any(f"/{control}/" in word for word in words))
        assert "--model_args pretrained=X,seed=1 --tasks" in greedy and "--gen_kwargs" not in greedy
        assert "--gen_kwargs do_sample=true,temperature=1.0" in sampled


def test_gated_settings_name_their_gate(tmp_path):
    gated = [setting for setting in SETTINGS if setting.method in GATED.values()]
    assert [setting.folder for setting in gated] == list(GATED)
    for setting in SETTINGS:
        words = lm_eval_command(tmp_path, setting, "greedy") if not setting.at_best_time else []
        assert any("diffusion_budget=15,skip_confidence=0.9" in word for word in words) == (setting in gated)


@pytest.mark.parametrize("alone", [False, True])
def test_steps_are_timed_in_turns_without_touching_the_run(tmp_path, base_dir, monkeypatch, alone):
    """Every recipe takes its turns, whatever it says of steps and folder; steps that warm up do not count."""
    common = {"base": base_dir, "dataset": write_jsonl(tmp_path / "rows.jsonl", sums(8)), "max_steps": 10**6}
    common |= {"output_dir": tmp_path / "run", "report_to": "none"}
    plain = write_recipe(tmp_path / "plain.yaml", **{**SMALL, **common})
    lora = write_recipe(tmp_path / "lora.yaml", **{**BASELINE, **common, "method": "lora_sft", "lora_rank": 2})
    clock, reads = [0.0], []

    def process_time():
        """Every step takes a second, those that warm up a thousand."""
        reads.append(None)
        step = (len(reads) - 1) // 2 % 6
        clock[0] += (1000.0 if step < timing.WARM_UP else 1.0) * (len(reads) % 2 == 0)
        return clock[0]

    monkeypatch.setattr(timing.time, "process_time", process_time)
    configs = {"plain": Path(plain), "lora": Path(lora)}
    built, build = [], timing.build_trainer
    monkeypatch.setattr(timing, "build_trainer", lambda job: built.append(None) or build(job))
    assert timing.seconds_per_step(configs, turns=2, steps=2, alone=alone) == {"plain": 1.0, "lora": 1.0}
    assert len(built) == (4 if alone else 2)
    assert len(reads) == 2 * 2 * 2 * 6  # start and end of six steps in two turns of two recipes
    assert not (tmp_path / "run").exists()


def test_refusal_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "something").touch()
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_status:
        demo.main()
    output = capsys.readouterr()
    assert exit_status.value.code == 2
    assert output.out == "" and output.err.startswith("error: OUT=") and output.err.count("\n") == 1
