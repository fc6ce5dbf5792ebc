"""The real command line, each run in a process of its own: `lm_eval`, `python -m lm_eval_ext`, results and refusals.

Run: `python -m pytest tests/test_lm_eval_cli.py` (about 40 seconds; most of it is lm-eval reading its own tasks)
"""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from tests.integration.harness import TASKS, Run, module, start

TWO_PROCESSES = [*module("torch.distributed.run"), "--standalone", "--nproc-per-node", "2", "-m", "lm_eval_ext"]
SCRIPT = Path(sys.executable).parent / "lm_eval"
ALL = ("--tasks", "l2d_test_generate,l2d_test_choice,l2d_test_rolling", "--log_samples", "--batch_size", "4")
INCLUDE = ("--include_path", str(TASKS))


def installed() -> bool:
    """Whether the package, and with it the hook for lm-eval 0.4.13, is installed in this environment."""
    try:
        return any(f.name == "l2d_lm_eval.pth" for f in importlib.metadata.distribution("l2d").files or [])
    except importlib.metadata.PackageNotFoundError:
        return False


def harness() -> list[str]:
    """The plain command where our hook is installed, else our own way into the same command line."""
    return [str(SCRIPT)] if installed() else module("lm_eval_ext")


@pytest.fixture(scope="module")
def runs(l2d_dir, base_dir, tmp_path_factory) -> dict[str, Run]:
    """The base through `--model hf`; the checkpoint at budgets 1 and 15, the latter also on two processes (gloo)."""
    out = tmp_path_factory.mktemp("out")
    l2d = ("--model", "l2d", "--model_args")
    commands = {
        "hf": (module("lm_eval"), "--model", "hf", "--model_args", f"pretrained={base_dir}"),
        "1": (harness(), *l2d, f"pretrained={l2d_dir},diffusion_budget=1"),
        "15": (module("lm_eval_ext"), "run", *l2d, f"pretrained={l2d_dir},diffusion_budget=15,guidance_scale=1.0"),
        "two processes": (TWO_PROCESSES, "run", *l2d, f"pretrained={l2d_dir},diffusion_budget=15"),
    }
    started = {name: start(command, out / name, *model, *ALL, *INCLUDE) for name, (command, *model) in commands.items()}
    return {name: run.finish() for name, run in started.items()}


@pytest.mark.parametrize("task", ["l2d_test_generate", "l2d_test_choice", "l2d_test_rolling"])
def test_budget_1_gives_the_samples_of_hf(runs, task):
    assert runs["1"].samples(task) == runs["hf"].samples(task)
    assert runs["1"].results["results"][task] == runs["hf"].results["results"][task]
    assert runs["15"].samples(task) != runs["hf"].samples(task)


def test_results_record_settings_and_cost(runs, l2d_dir):
    config = runs["15"].results["config"]
    assert config["model"] == "l2d"
    ours = config["l2d"]
    assert ours["sampler"]["budget"] == 15
    assert ours["asked_per_token"] == {"mean": 15.0, "median": 15, "p95": 15, "max": 15}
    assert ours["computed_per_token"]["mean"] >= 14
    assert 1 <= ours["rounds_per_token"]["mean"] <= 14
    assert ours["generated_tokens"] > 0
    assert ours["scored_tokens"] > 0
    assert runs["1"].results["config"]["l2d"]["asked_per_token"]["max"] == 1


def test_two_processes_give_the_results_of_one(runs):
    one, two = runs["15"], runs["two processes"]
    generated = sorted(two.samples("l2d_test_generate"), key=lambda sample: sample["doc_id"])
    assert generated == one.samples("l2d_test_generate")
    for task, metrics in one.results["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        found = {name: two.results["results"][task][name] for name in numbers}
        assert found == pytest.approx(numbers, rel=1e-5)  # other batches, other rounding
    ours, theirs = two.results["config"]["l2d"], one.results["config"]["l2d"]
    assert ours["world_size"] == 2
    for name in ("generated_tokens", "scored_tokens", "asked_per_token", "checkpoint_fingerprint", "sampler"):
        assert ours[name] == theirs[name]


def test_plain_command_finds_the_model():
    if not installed():
        pytest.skip("the package is not installed in this environment (python -m pip install -e .)")
    assert harness() == [str(SCRIPT)]


def test_refusals_are_one_line_and_end_with_status_1(l2d_dir, tmp_path):
    task = ("--tasks", "l2d_test_generate", *INCLUDE)
    bad = {
        f"pretrained={l2d_dir},guidance_scale=1.5": "l2d: guidance_scale=1.5 needs a model that was trained with",
        f"pretrained={l2d_dir},difusion_budget=3": "l2d: model argument 'difusion_budget' is not known: did you mean",
    }
    started = {
        arguments: start(command, tmp_path, "--model", "l2d", "--model_args", arguments, *task)
        for command, arguments in zip([module("lm_eval_ext"), harness()], bad, strict=True)
    }
    for arguments, run in started.items():
        _, stderr = run.process.communicate(timeout=200)
        assert run.process.returncode == 1
        assert "Traceback" not in stderr
        assert "Loading weights" not in stderr
        *_, last = stderr.strip().splitlines()
        assert last.startswith(bad[arguments])
    assert not any(tmp_path.iterdir())


def test_our_tasks_are_found_without_include_path(monkeypatch):
    from lm_eval._cli import HarnessCLI
    from lm_eval.tasks import TaskManager

    from lm_eval_ext import __main__ as ours

    seen = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, args: seen.append(args.include_path))
    for arguments in (["--tasks", "x"], ["run", "--tasks", "x", "--include_path", "mine"], ["ls", "tasks"]):
        monkeypatch.setattr(sys, "argv", ["lm_eval_ext", *arguments])
        ours.main()
    assert seen == [[str(ours.TASKS)], [str(ours.TASKS), "mine"], [str(ours.TASKS)]]
    assert "l2d_demo_products" in TaskManager(include_path=str(ours.TASKS), include_defaults=False).all_subtasks
