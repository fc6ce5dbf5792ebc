"""Sweeps: the grid of a YAML file, controls and what the leaderboard makes of them, resuming after SIGKILL, refusals.

Run: `python -m pytest tests/lm_eval_ext/test_sweep.py`
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval._cli import HarnessCLI

from lm_eval_ext import sweep
from lm_eval_ext.arguments import UsageError
from lm_eval_ext.leaderboard.__main__ import write_leaderboard
from tests.conftest import REPOSITORY
from tests.integration.harness import TASKS


def write(folder: Path, l2d_dir: Path, **changes) -> Path:
    """A sweep file: the base and two budgets on one task."""
    content = {
        "output": str(folder / "out"),
        "tasks": ["l2d_test_choice"],
        "base": True,
        "model_args": {"pretrained": str(l2d_dir), "device": "cpu"},
        "grid": {"diffusion_budget": [3, 15]},
        "run": {"include_path": str(TASKS), "batch_size": 8},
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return file


def run(file: Path, *start: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *(start or ["-m", "lm_eval_ext.sweep"]), str(file)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_killed_sweep_is_completed(l2d_dir, tmp_path):
    file, out = write(tmp_path, l2d_dir), tmp_path / "out"
    choice = out / "l2d_test_choice"
    moment = ["diffusion_budget=3.partial", "1000"]  # the base is complete, the next one is running
    killed = run(file, "-c", "from tests.faults.kills import main; main()", *moment, "lm_eval_ext.sweep")
    assert killed.returncode == -9, killed.stderr
    assert sorted(path.name for path in choice.iterdir()) == ["base", "diffusion_budget=3.partial"]
    (base,) = choice.glob("base/*/results_*.json")
    before = base.stat().st_mtime_ns
    second = run(file)
    assert second.returncode == 0, second.stderr
    assert "3 settings, 1 of them complete\n[1/3] l2d_test_choice base: complete\n[2/3]" in second.stdout
    assert base.stat().st_mtime_ns == before
    assert sorted(path.name for path in choice.iterdir()) == ["base", "diffusion_budget=15", "diffusion_budget=3"]
    assert second.stdout.endswith((out / "table.md").read_text() + "\n")

    plan = sweep.read_plan(file)
    whole = sweep.table(plan)
    assert whole == (out / "table.md").read_text()
    (out / "table.md").write_text("of a run that was killed between its last setting and the table\n")
    assert sweep.run_plan(plan) == [] and whole == (out / "table.md").read_text()
    for setting in plan.settings:
        (results,) = plan.folder(setting).glob("*/results_*.json")
        budget = setting.model_args["diffusion_budget"]
        assert json.loads(results.read_text())["config"]["l2d"]["nfe_requested_per_token"]["mean"] == budget
        assert f"| l2d_test_choice | {setting.name} | acc |" in whole
        assert len(list(plan.folder(setting).glob("*/compute_l2d_test_choice_*.jsonl"))) == 1
        assert "l2d_test_choice" in (plan.folder(setting) / "log.txt").read_text()
    with pytest.raises(UsageError, match="was written with other settings: give another output folder"):
        sweep.run_plan(sweep.read_plan(write(tmp_path, l2d_dir, run={"batch_size": 4})))


def test_a_failing_setting_does_not_stop_the_others(l2d_dir, tmp_path, monkeypatch, capsys):
    ran = []

    def lm_eval(words):
        args = json.loads(words[words.index("--model_args") + 1])
        ran.append(args["diffusion_budget"])
        if args["diffusion_budget"] == 3:
            raise RuntimeError("no\nmemory")
        folder = Path(words[words.index("--output_path") + 1]) / "model"
        folder.mkdir()
        (folder / "results_x.json").write_text('{"config": {}, "results": {"task": {"acc,none": 0.5}}}')

    monkeypatch.setattr("lm_eval_ext.__main__.main", lm_eval)
    file = str(write(tmp_path, l2d_dir))
    assert sweep.main([file]) == 1
    assert ran == [1, 3, 15]
    assert "[2/3] l2d_test_choice diffusion_budget=3: failed, no memory (see " in capsys.readouterr().out
    assert sweep.main([file]) == 1
    assert ran == [1, 3, 15, 3]
    with pytest.raises(UsageError, match="run: .*unrecognized arguments: --fewshots 3"):
        sweep.main([str(write(tmp_path, l2d_dir, run={"fewshots": 3}))])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(task=["x"]), "the key 'task', which is not known: use output, tasks"),
        (dict(output=3), "output=3 must be the name of a folder"),
        (dict(tasks="gsm8k"), "tasks='gsm8k' must be a list of names"),
        (dict(base="yes"), "base='yes' must be true or false"),
        (dict(grid={"diffusion_budget": 15}), "grid: diffusion_budget=15 must be a list of values"),
        (dict(grid={"diffusion_budget": [3, 14]}), "diffusion_budget=14 cannot be met"),
        (dict(grid={"guidance_scale": [1.0, 1.5]}), "guidance_scale=1.5 needs a model that was trained with"),
        (dict(grid=[1]), "grid=[1] must be a mapping"),
        (dict(run={"output_path": "x"}), "run: 'output_path' is set by the sweep itself"),
        (dict(run={"gen_kwargs": {"diffusion_budget": 3}}), "gen_kwargs sets 'diffusion_budget' for every setting"),
        (dict(run={"gen_kwargs": "temperature=0, seed=3"}), "gen_kwargs sets 'seed' for every setting"),
        (dict(run={"gen_kwargs": ["token_search=beam_2"]}), "gen_kwargs sets 'token_search' for every setting"),
        (dict(model_args={}), "'pretrained' is missing"),
        (dict(controls=[0.1]), "controls=[0.1] must be a mapping"),
        (dict(controls={"once": 0.1}), "controls has the key 'once', which is not known: use one_evaluation"),
        (dict(controls={"one_evaluation": [0]}), "one_evaluation=[0] must be times above 0 and up to 1"),
        (dict(controls={"one_evaluation": []}), "one_evaluation=[] must be times"),
        (dict(controls={"one_evaluation": [0.1, 0.1]}), "'one_evaluation,t=0.1' is listed twice"),
        (dict(controls={"one_evaluation": "absent.json"}), "'absent.json' is not a file with a best_time"),
        (dict(controls={"noise_free": "absent"}), "pretrained='absent' is neither a directory nor"),
        (dict(controls={"noise_free": 3}), "noise_free=3 must be the folder"),
        (dict(controls={"finetuned": "absent"}), "finetuned='absent' holds no model's config.json"),
    ],
)
def test_refusals(l2d_dir, tmp_path, changes, sentence):
    with pytest.raises(UsageError) as caught:
        sweep.read_plan(write(tmp_path, l2d_dir, **changes))
    assert sentence in str(caught.value)


def test_unreadable_files(tmp_path):
    for text, sentence in [(None, "cannot be read"), ("[1", "cannot be read"), ("- 1", "must hold a mapping")]:
        file = tmp_path / "bad.yaml"
        if text is not None:
            file.write_text(text)
        with pytest.raises(UsageError, match=sentence):
            sweep.read_plan(file)


def test_grid_and_command(l2d_dir, tmp_path):
    grid = {"diffusion_budget": [3, 7], "seed": [0, 1]}
    run = {"num_fewshot": 2, "log_samples": False, "gen_kwargs": {"max_gen_toks": 4}, "apply_chat_template": True}
    plan = sweep.read_plan(write(tmp_path, l2d_dir, grid=grid, tasks=["a", "b"], run=run))
    assert [(setting.task, setting.name) for setting in plan.settings][:6] == [
        ("a", "base"),
        ("a", "diffusion_budget=3,seed=0"),
        ("a", "diffusion_budget=3,seed=1"),
        ("a", "diffusion_budget=7,seed=0"),
        ("a", "diffusion_budget=7,seed=1"),
        ("b", "base"),
    ]
    words = plan.settings[1].command(Path("x"))
    assert words[-5:] == ["--num_fewshot", "2", "--gen_kwargs", '{"max_gen_toks": 4}', "--apply_chat_template"]


def test_options_that_are_0_or_false_reach_the_harness(l2d_dir, tmp_path, monkeypatch):
    run = {
        "log_samples": False,
        "num_fewshot": 0,
        "seed": 0,
        "apply_chat_template": True,
        "fewshot_as_multiturn": False,
    }
    words = sweep.read_plan(write(tmp_path, l2d_dir, run=run)).settings[0].command(Path("x"))
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    given = HarnessCLI().parse_args()
    assert (given.num_fewshot, given.seed, given.apply_chat_template) == (0, [0, 0, 0, 0], True)
    assert given.fewshot_as_multiturn is False and not hasattr(given, "log_samples")


@pytest.fixture
def controls(make_l2d, base_dir, tmp_path) -> dict[str, object]:
    """All three controls: a time from a file of `training.compare_budgets`, a noise-free path, a finetuned model."""
    chosen, finetuned = tmp_path / "controls.json", tmp_path / "finetuned"
    chosen.write_text('{"best_time": 0.2}')
    shutil.copytree(base_dir, finetuned)
    (finetuned / "recipe.yaml").write_text(f"method: lora_sft\nbase: {base_dir}\n")
    noise_free = make_l2d(base_dir, noise_free=True)
    return {"one_evaluation": str(chosen), "noise_free": str(noise_free), "finetuned": [str(finetuned)]}


def test_controls_are_settings(l2d_dir, tmp_path, controls):
    args = {"pretrained": str(l2d_dir), "device": "cpu", "seed": 3, "mc_samples": 2}
    plan = sweep.read_plan(write(tmp_path, l2d_dir, model_args=args, controls=controls))
    once, noise_free, finetuned = plan.settings[-3:]
    assert once.name == "one_evaluation,t=0.2" and noise_free.name.startswith("noise_free,")
    sampler = {"diffusion_budget": 2, "solver": "euler", "final_time": 0.2}
    assert once.model_args == {"pretrained": str(l2d_dir), "device": "cpu", "seed": 3, **sampler}
    assert noise_free.model_args == {"device": "cpu", "pretrained": controls["noise_free"]}
    assert finetuned.command(Path("x"))[1:3] == ["--model", "hf"] and once.command(Path("x"))[2] == "l2d"
    assert finetuned.model_args == {"pretrained": controls["finetuned"][0]} and finetuned.run["device"] == "cpu"
    for name, folder, sentence in (
        ("noise_free", l2d_dir, "is a path with noise: give a checkpoint trained with noise_free"),
        ("finetuned", l2d_dir, "is an L2D checkpoint: put it under pretrained or noise_free"),
    ):
        with pytest.raises(UsageError, match=sentence):
            sweep.read_plan(write(tmp_path, l2d_dir, controls={name: str(folder)}))


@pytest.mark.slow
def test_the_leaderboard_knows_what_a_sweep_ran(l2d_dir, make_l2d, base_dir, tmp_path, controls):
    """Real runs: controls as kinds of rows, carried state in the labels, and nothing missing."""
    grid = {"diffusion_budget": [3]}
    for name, changes in (
        ("curve", {"grid": grid, "controls": controls}),
        ("carried", {"base": False, "model_args": {"pretrained": str(make_l2d(base_dir, carried_state=True))}}),
    ):
        (tmp_path / name).mkdir()
        file = write(tmp_path / name, l2d_dir, **{"grid": {"diffusion_budget": [3]}, **changes})
        assert sweep.main([str(file)]) == 0
    board = write_leaderboard([tmp_path / "curve" / "out", tmp_path / "carried" / "out"], tmp_path / "report")
    assert not board.skipped
    assert [row.setting.label for row in board.rows] == [
        *("L2D at T = 1", "L2D (lora), T = 3", "L2D (lora), T = 3, carried state"),
        *("control: one evaluation, t = 0.2", "control: noise-free path", "LoRA finetuning"),
    ]
    assert board.controls == {str(base_dir): ["one-evaluation", "noise-free", "lora-ft"]}
    page = (tmp_path / "report" / "leaderboard.html").read_text()
    assert "none missing" in page and "missing:" not in page and "Not measured here" not in page
    assert all(f'class="swatch line {kind}' in page for kind in ("one-evaluation", "noise-free", "lora-ft", "base"))
