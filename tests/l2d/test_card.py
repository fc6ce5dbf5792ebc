"""Measured accuracies, their figure, and the model card: every command and code block of a card is run or parsed.

Run: `python -m pytest tests/l2d/test_card.py` (about 20 seconds)
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

import l2d
from l2d import L2DForCausalLM
from l2d.__main__ import main
from l2d.card.results import curves, read_results
from l2d.card.text import write_card
from tests.integration.harness import TASKS
from tests.l2d.test_hub import put, refer
from tests.test_house import parse

BUDGETS = (1, 3, 15)
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def evaluations(l2d_dir) -> dict[int, dict[str, Any]]:
    """lm-eval's results by budget."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return {
        budget: simple_evaluate(
            model="l2d",
            model_args={"pretrained": str(l2d_dir), "diffusion_budget": budget, "device": "cpu"},
            tasks=["l2d_test_choice"],
            task_manager=manager,
            batch_size=4,
            bootstrap_iters=0,
        )
        for budget in BUDGETS
    }


@pytest.fixture(scope="module")
def files(evaluations, tmp_path_factory) -> Path:
    """The same as files, as the harness's command line writes them."""
    folder = tmp_path_factory.mktemp("results")
    for budget, results in evaluations.items():
        kept = {name: value for name, value in results.items() if name != "samples"}
        (folder / f"t{budget}").mkdir()
        text = json.dumps(kept, default=handle_non_serializable)
        (folder / f"t{budget}" / "results_2026-01-01T00-00-00.json").write_text(text)
    return folder


# ---- results and figure ------------------------------------------------------------------------------------------


def test_results_are_read_from_wherever_they_are(evaluations, files):
    expected = [evaluations[budget]["results"]["l2d_test_choice"]["acc,none"] for budget in BUDGETS]
    for results in (list(evaluations.values()), files, str(files), sorted(files.rglob("*.json"))):
        (points,) = curves(read_results(results)).values()
        assert [(p.budget, p.value) for p in points] == list(zip(BUDGETS, expected, strict=True))
        assert {(p.task, p.metric, p.documents) for p in points} == {("l2d_test_choice", "acc", 9)}
    (points,) = curves(read_results(evaluations[3], metric="acc_norm")).values()
    assert points[0].value == evaluations[3]["results"]["l2d_test_choice"]["acc_norm,none"]
    training = {"eval_accuracy_budget_15": 0.5, "eval_accuracy_budget_1": 0.25, "eval_loss": 3.0}
    assert [(p.budget, p.value) for p in read_results(training)] == [(1, 0.25), (15, 0.5)]
    for wrong in ({}, [], {"eval_loss": 3.0}, {"results": {"gsm8k": {"acc,none": 1.0}}}):
        with pytest.raises(ValueError, match="results hold no accuracy of an L2D model: give what"):
            read_results(wrong)
    with pytest.raises(ValueError, match="results=3 must be lm-eval's results"):
        read_results(3)


def test_generation_kwargs_count(l2d_dir):
    """A task that changes the sampler, or samples, is a setting of its own."""
    results = simple_evaluate(
        model="l2d",
        model_args={"pretrained": str(l2d_dir), "diffusion_budget": 3, "device": "cpu"},
        tasks=["l2d_test_generate"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        gen_kwargs="diffusion_budget=7,final_time=0.5,do_sample=true,temperature=0.5",
        limit=2,
        bootstrap_iters=0,
    )
    (one,) = read_results(results)
    assert (one.budget, one.metric, one.documents) == (7, "exact_match", 2)
    assert "to t = 0.5" in one.setting and "sampled at 0.5" in one.setting


def test_settings_are_told_apart(evaluations):
    """Other samplers are curves of their own, and begin at the base."""
    other = json.loads(json.dumps(evaluations[3]["config"]["l2d"], default=str))
    other["sampler"] |= {"final_time": 0.5, "guidance_scale": 2.0, "guidance_class": "math"}
    later = {**evaluations[3], "config": {"l2d": other}}
    found = curves(read_results([*evaluations.values(), later]))
    usual, guided = found
    assert usual == "l2d_test_choice, acc"
    assert guided.startswith(usual) and "to t = 0.5" in guided and "guidance 2 towards math" in guided
    axes = l2d.plot_budget_curve([*evaluations.values(), later])
    lengths = [len(container.lines[0].get_xdata()) for container in axes.containers]
    assert lengths == [3, 2] and axes.get_legend() is not None


def test_the_figure_holds_the_numbers():
    axes = l2d.plot_budget_curve({1: 0.25, 15: 0.75, 3: 0.5})
    (line,) = [container.lines[0] for container in axes.containers]
    assert list(line.get_xdata()) == [1, 3, 15] and list(line.get_ydata()) == [0.25, 0.5, 0.75]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "3", "15"]
    assert l2d.plot_budget_curve({1: 0.5, 3: 0.5}, axes=axes) is axes


# ---- card --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(l2d_dir, tmp_path, monkeypatch) -> Path:
    """A checkpoint whose base is on a hub, with a card of its own in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder, base = tmp_path / "model", tmp_path / "base"
    shutil.copytree(l2d_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(config["base_name_or_path"], base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: house\n---\n# A base\n")
    cache = tmp_path / "cache" / "models--org--base"
    put(cache, COMMIT, base, [path.name for path in base.iterdir()])
    refer(cache, "main", COMMIT)
    config["base_name_or_path"] = "org/base"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text("method: l2d\ndataset: org/data\noutput_dir: somewhere\ndraws: 4\n")
    return folder


def test_the_card_tells_what_was_measured(checkpoint, files, evaluations, capsys):
    main(["card", str(checkpoint), str(files)])
    assert capsys.readouterr().out.strip() == str(checkpoint / "README.md")
    card = ModelCard.load(checkpoint / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert (data["license"], data["license_name"], data["datasets"]) == ("other", "house", ["org/data"])
    assert data["pipeline_tag"] == "text-generation" and "l2d" in data["tags"]
    values = [evaluations[budget]["results"]["l2d_test_choice"]["acc,none"] for budget in BUDGETS]
    found = [(one.dataset_name, one.metric_args, one.metric_value) for one in card.data.eval_results]
    expected = zip(BUDGETS, values, strict=True)
    assert found == [("l2d_test_choice", {"diffusion_budget": b}, pytest.approx(v, abs=1e-6)) for b, v in expected]
    for budget, value in zip(BUDGETS, values, strict=True):
        assert f"| l2d_test_choice, acc | {budget} | {value:.4g} |" in card.text
    assert "![accuracy against budget](budget_curve.png)" in card.text and "somewhere" not in card.text
    assert (checkpoint / "budget_curve.png").read_bytes().startswith(b"\x89PNG")
    assert write_card(checkpoint, str(checkpoint)) == (checkpoint / "README.md").read_text()  # the results stay


@pytest.mark.parametrize("template", [False, True])
def test_the_usage_blocks_work(checkpoint, template, capsys):
    if not template:
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            file = checkpoint / name
            if file.suffix == ".json":
                file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k[:4] != "chat"}))
            else:
                file.unlink(missing_ok=True)
    card = write_card(checkpoint)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    assert ("apply_chat_template" in code) == template
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    ids = names["inputs"]["input_ids"]
    model = L2DForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(names["tokens"], model.generate(ids, sampler={"budget": 15}, max_new_tokens=32))
    assert capsys.readouterr().out.strip()
    (commands,) = re.findall(r"```bash\n(.*?)```", card, re.S)
    assert len(commands.splitlines()) == 2 + template
    for line in commands.splitlines():
        parse(line.split(), False)


def test_a_bare_checkpoint_has_a_card_too(l2d_dir, tmp_path):
    shutil.copytree(l2d_dir, tmp_path / "bare")
    card = write_card(tmp_path / "bare", "someone/bare")
    header = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in header and "license" not in header and "model-index" not in header
    assert "The licence is that of the base." in card and "![" not in card and "# bare" in card


def test_results_of_other_models_are_refused(checkpoint, evaluations, tmp_path, capsys):
    content = json.loads(json.dumps(evaluations[3], default=handle_non_serializable))
    for name, words in (("checkpoint_fingerprint", "2 checkpoints"), ("base_fingerprint", "another base")):
        for number in range(2):
            content["config"]["l2d"][name] = str(number) if words[0] == "2" else "other"
            (tmp_path / "two").mkdir(exist_ok=True)
            (tmp_path / "two" / f"results_{number}.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            main(["card", str(checkpoint), str(tmp_path / "two")])
        assert words in capsys.readouterr().err
        content["config"]["l2d"][name] = "one"
    assert not (checkpoint / "budget_results.json").exists()
