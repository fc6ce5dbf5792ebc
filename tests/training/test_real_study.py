"""The study of a real model: data, plan, measurement, statistics, report, and a small run of all of it.

    pytest tests/training/test_real_study.py

* every model is scored as transformers scores it, every budget as the plain solver does; a killed evaluation goes on
* a run that is killed while it trains continues from its last checkpoint and ends like any other (slow)
* statistics of made-up outcomes against ones written out here
"""

import json
import os
import signal
import subprocess
import sys
import time

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM

from l2d import L2DForCausalLM
from tests.conftest import REPOSITORY, nine_digits
from tests.training_runs import write_jsonl
from training.compare_budgets.measuring import measure
from training.demo.plan import write_configs
from training.recipe import read_recipe
from training.studies.real import __main__ as command
from training.studies.real import elsewhere, evaluate, report
from training.studies.real.data import read_part, targets_per_example, write_data
from training.studies.real.elsewhere import Limits
from training.studies.real.equal import at_equal_time, saved_steps
from training.studies.real.evaluate import early_gate, ended_setting, gated_setting, whole_setting
from training.studies.real.plan import METHODS, Settings, build_steps, losses_file, recipes, run_folder, steps_for
from training.studies.real.plot import draw
from training.studies.real.scores import (
    COMPARISONS,
    EQUAL,
    METRICS,
    Outcome,
    Study,
    compare,
    difference,
    read_study,
    score,
    unpack_study,
)
from training.studies.real.tidy import tidy

ROWS, HELD_OUT, TESTED = 40, 4, 3


def solution(number: int) -> dict[str, str]:
    """A row with a question and a worked answer."""
    answer = f"It is {number} + {number} = <<{number}+{number}={2 * number}>>{2 * number}.\n#### {2 * number}"
    return {"question": f"What is {number} + {number}?", "answer": answer}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with rows as GSM8K has them."""
    folder = tmp_path_factory.mktemp("source")
    for split, count in (("train", ROWS), ("test", TESTED)):
        write_jsonl(folder / f"{split}.jsonl", [solution(number) for number in range(count)])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, source, base_dir):
    """These rows as the study takes them."""
    out = tmp_path_factory.mktemp("data") / "data"
    write_data(str(source), base_dir, out, HELD_OUT)
    return out


@pytest.fixture
def asked(source, base_dir):
    return Settings(str(base_dir), str(source), 2000, HELD_OUT, False)


# ---- data and plan -----------------------------------------------------------------------------------------------


def test_no_validation_row_is_trained_on(data):
    lines = {part: (data / f"{part}.jsonl").read_text().splitlines() for part in ("train", "validation", "test")}
    assert [len(part) for part in lines.values()] == [ROWS - HELD_OUT, HELD_OUT, TESTED]
    assert not set(lines["train"]) & set(lines["validation"])
    row = json.loads(lines["validation"][-1])
    assert row["prompt"] == [{"role": "user", "content": solution(ROWS - 1)["question"]}]
    assert row["completion"] == [{"role": "assistant", "content": solution(ROWS - 1)["answer"]}]


def test_targets_are_the_answer_with_its_end(data, base_dir, tokenizer):
    ids, mask, targets = read_part(data / "test.jsonl", base_dir, 2)
    assert len(ids) == 2 and not (targets & (mask == 0)).any()
    for number, (row, marked) in enumerate(zip(ids, targets, strict=True)):
        assert tokenizer.decode(row[marked]) == solution(number)["answer"] + "</s>"
    counts = [read_part(data / "train.jsonl", base_dir)[2].sum().item() / (ROWS - HELD_OUT)]
    assert counts == [pytest.approx(targets_per_example(data))]


@pytest.mark.parametrize(("targets", "per_example", "steps"), [(1600, 10.0, 10), (1601, 10.0, 11), (1, 100.0, 1)])
def test_steps_see_the_targets_that_were_asked_for(targets, per_example, steps):
    assert steps_for(targets, per_example) == steps


def test_too_few_rows_and_other_data_are_refused(tmp_path, source, base_dir):
    with pytest.raises(ValueError, match="held_out=40 leaves nothing of 40 training rows: lower it"):
        write_data(str(source), base_dir, tmp_path / "data", ROWS)
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "other" / f"{split}.jsonl", [{"question": "a", "solution": "b"}])
    with pytest.raises(ValueError, match="has no column 'answer': give GSM8K, or rows like its own"):
        write_data(str(tmp_path / "other"), base_dir, tmp_path / "data", 1)
    with pytest.raises(ValueError, match="has no split 'train' that can be read"):
        write_data(str(tmp_path / "nowhere"), base_dir, tmp_path / "data", 1)


@pytest.mark.parametrize("name", list(METHODS))
def test_recipes_are_accepted_by_the_entry_point(tmp_path, data, asked, name):
    (tmp_path / "data").symlink_to(data)
    write_configs(recipes(tmp_path, asked, 150), tmp_path / "configs")
    recipe = read_recipe(["--config", str(tmp_path / "configs" / f"{name}.yaml")])
    training = recipe.training
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert [training.max_steps, training.save_steps, training.warmup_steps] == [150, 19, 15]
    assert training.resume_from_checkpoint == "auto" and recipe.model.warm_start == name.startswith("warm")
    assert recipe.model.noise_free == ("noise_free" in name)


def test_steps_are_complete_and_in_order(tmp_path, asked):
    steps, seen = build_steps(tmp_path, asked, 200, list(METHODS)), set()
    for step in steps:
        assert set(step.needs) <= seen and step.name not in seen
        seen.add(step.name)
    outputs = [step.output for step in steps]
    assert len(set(outputs)) == len(outputs) == 1 + 3 * len(METHODS) + 1 + len(METHODS)
    trained = [step.name.removeprefix("train ") for step in steps if step.name.startswith("train ")]
    assert trained == list(METHODS) and trained[0] == "warm"
    only = build_steps(tmp_path, asked, 200, ["lora_qv"])
    assert {step.name for step in only} < seen
    assert not {step.output for step in build_steps(tmp_path, asked, 300, ["warm"])} & {
        step.output for step in steps if step.name.startswith("evaluate")
    }  # more problems are another measurement


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "warm,cold"], "methods='warm,cold' holds 'cold', which is none of warm, "),
        (["--minutes", "0"], "minutes=0.0 must be above 0"),
        (["--targets", "0"], "targets=0 must be at least 1"),
        (["--problems", "0"], "problems=0 must be at least 1"),
        (["--mmlu", "-1"], "mmlu=-1 must be at least 0, which leaves it out"),
        (["--base", "nobody/nothing"], "base='nobody/nothing' is neither a model's folder nor a model on the hub"),
        (["--report"], "holds nothing that was measured on problems=1319: run the study first"),
        ([], "holds 'something', which is no study of a real model's: choose another folder with OUT="),
    ],
)
def test_refusals_are_one_line(tmp_path, monkeypatch, capsys, base_dir, source, options, message):
    (tmp_path / "something").touch()
    fixed = ["real", "--base", str(base_dir), "--data", str(source), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*fixed, *options])
    with pytest.raises(SystemExit) as exit_status:
        command.main()
    error = capsys.readouterr().err
    assert exit_status.value.code == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["something"]


# ---- measurement -------------------------------------------------------------------------------------------------


def of_transformers(model, rows):
    """Right targets and loss of every row, as the model's own logits have them."""
    ids, mask, targets = rows
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
    losses = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    right = logits.argmax(-1) == ids[:, 1:]
    return (right & targets[:, 1:]).sum(1).tolist(), losses.masked_fill(~targets[:, 1:], 0).sum(1).tolist()


def run_evaluation(model, data, base, out, *options):
    """The command in this process; what it wrote."""
    rows = ("--rows", data / "test.jsonl", "--limit", 2, "--base", base)
    evaluate.main([str(word) for word in (model, out, *rows, *options)])
    return json.loads(out.read_text())


@pytest.fixture
def short(monkeypatch):
    """Little is decoded."""
    monkeypatch.setattr(evaluate, "TOKENS", 4)
    monkeypatch.setattr(evaluate, "PROMPTS", 1)


def test_plain_models_are_scored_as_transformers_scores_them(tmp_path, data, base_dir):
    found = run_evaluation(base_dir, data, base_dir, tmp_path / "base.json")
    rows = read_part(data / "test.jsonl", base_dir, 2)
    right, losses = of_transformers(AutoModelForCausalLM.from_pretrained(base_dir), rows)
    assert found["targets"] == rows[2].sum(1).tolist() and list(found["scores"]) == ["plain"]
    assert found["scores"]["plain"]["right"] == right
    assert found["scores"]["plain"]["nll"] == pytest.approx(losses, abs=1e-3)
    assert found["scores"]["plain"]["passes"] == 0


def test_adapters_are_merged(tmp_path, data, base_dir):
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_dir), LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    found = run_evaluation(tmp_path / "adapter", data, base_dir, tmp_path / "found.json")
    _, losses = of_transformers(adapted.eval(), read_part(data / "test.jsonl", base_dir, 2))
    assert found["scores"]["plain"]["nll"] == pytest.approx(losses, rel=1e-4)
    _, before = of_transformers(
        AutoModelForCausalLM.from_pretrained(base_dir), read_part(data / "test.jsonl", base_dir, 2)
    )
    assert before != pytest.approx(losses, rel=1e-2)


def test_budgets_are_scored_as_the_plain_solver_does(tmp_path, data, base_dir, l2d_dir, short):
    gates = ("--gates", "1e-9,0.9", "--early-gates", "1e-9")
    options = ("--choosing", data / "validation.jsonl", "--budgets", "3,7", *gates)
    found = run_evaluation(l2d_dir, data, base_dir, tmp_path / "l2d.json", *options)
    early = [early_gate(at, 1e-9) for at in (whole_setting(), ended_setting())]
    assert list(found["scores"]) == ["T3", "T7", "T15-p1e-09", "T15-p0.9", *early, "single"]
    assert early == ["T15-e1e-09", "T15-t0.75-e1e-09"]
    for setting in early:  # everything is the one evaluation's
        assert all(found["scores"][setting][name] == found["scores"]["single"][name] for name in ("right", "nll"))
        assert found["scores"][setting]["evaluations"] == found["scores"][setting]["passes"] == 1
    model, rows = L2DForCausalLM.from_pretrained(l2d_dir), read_part(data / "test.jsonl", base_dir, 2)
    for budget in (3, 7):
        plain = measure(model, *rows, {"budget": budget, "speculation": False})
        one = found["scores"][f"T{budget}"]
        assert one["right"] == plain.right.int().tolist()
        assert one["nll"] == pytest.approx(plain.nll_sums.tolist(), abs=1e-3)
        assert one["passes"] <= budget - 1 < one["evaluations"] + 1
        assert one["decoding"]["plain_steps"] > 0 and one["decoding"]["passes"] > 0
    base = measure(model, *rows, {"budget": 1})
    gated = found["scores"]["T15-p1e-09"]  # everything is the base's
    assert gated["right"] == base.right.int().tolist() and gated["evaluations"] == gated["decoding"]["evaluations"] == 0
    losses = {time: loss for time, loss in found["times"].items() if time != "best"}
    assert f"{found['times']['best']:g}" in losses and len(losses) == 8


def test_killed_evaluation_measures_nothing_twice(tmp_path, data, base_dir, l2d_dir, short, monkeypatch):
    """It is interrupted while it measures the second budget."""
    out, options, asked_for = tmp_path / "l2d.json", ("--budgets", "3,7"), []
    whole = run_evaluation(l2d_dir, data, base_dir, tmp_path / "whole.json", *options)

    def killed(model, *rest):
        asked_for.append(rest[3])
        if len(asked_for) == 2:
            raise KeyboardInterrupt
        return measure(model, *rest)

    monkeypatch.setattr(evaluate, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(l2d_dir, data, base_dir, out, *options)
    assert not out.exists()
    again = run_evaluation(l2d_dir, data, base_dir, out, *options)
    assert asked_for == [{"budget": 3}, {"budget": 7}, {"budget": 7}]
    assert [one["nll"] for one in again["scores"].values()] == [one["nll"] for one in whole["scores"].values()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l2d.json", "whole.json"]


@pytest.mark.parametrize(("method", "step"), [("fast", 40), ("slow", 20), ("slower", 10), ("odd", 30)])
def test_equal_time_is_that_of_the_fastest(method, step):
    seconds = {"fast": 1.0, "slow": 2.0, "slower": 8.0, "odd": 1.4}
    assert at_equal_time(seconds, method, 40, [10, 20, 30, 40]) == step


def test_finished_training_keeps_its_weights(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("model.safetensors", "optimizer.pt"):
            (tmp_path / f"checkpoint-{step}" / name).touch()
    log = [{"loss": 2.00001, "step": 1}, {"loss": 1.5, "step": 2}, {"train_loss": 1.7, "step": 2}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    tidy(tmp_path, tmp_path / "losses.json")
    assert json.loads((tmp_path / "losses.json").read_text()) == [2.0, 1.5]
    assert [path.name for path in tmp_path.glob("checkpoint-*/*")] == ["model.safetensors"] * 2
    assert saved_steps(tmp_path) == [9, 10]


# ---- elsewhere ---------------------------------------------------------------------------------------------------

ASKS = Limits(gsm8k=2, mmlu=3, humaneval=1)


@pytest.fixture(scope="module")
def asked_folder(tmp_path_factory, data):
    """A folder with the problems that are asked."""
    out = tmp_path_factory.mktemp("asked")
    (out / "data").symlink_to(data)
    sources = {name: out / f"{name}-source" for name in elsewhere.SOURCES}
    for folder in sources.values():
        folder.mkdir()
    questions = [{"question": f"{n} + 1?", "choices": ["0", f"{n + 1}", "x", "y"], "answer": 1} for n in range(9)]
    write_jsonl(sources["mmlu"] / "test.jsonl", questions)
    programs = [{"prompt": "def f(a):\n", "canonical_solution": "    return a\n"}]
    write_jsonl(sources["humaneval"] / "test.jsonl", programs)
    elsewhere.write_problems(out, ASKS, {name: str(folder) for name, folder in sources.items()})
    return out


class Answering(LM):
    """Answers the first question rightly, and all others with a number too high by one; thinks that B is right."""

    def generate_until(self, requests, **kwargs):
        return [f"So it is {2 * n}.\n#### {2 * n + (n > 0)}." for n, _ in enumerate(requests)]

    def loglikelihood(self, requests, **kwargs):
        return [(0.0 if request.args[1].strip() == "B" else -1.0, False) for request in requests]

    def loglikelihood_rolling(self, requests, **kwargs):
        raise NotImplementedError


@pytest.fixture(scope="module")
def harness(asked_folder):
    """The harness's results on the tasks that were written."""
    manager = TaskManager(include_path=str(asked_folder / "tasks"), include_defaults=False)
    tasks = ["real_gsm8k", "real_mmlu"]
    return lm_eval.simple_evaluate(Answering(), tasks=tasks, task_manager=manager, limit=3, bootstrap_iters=0)


def test_harness_asks_in_the_training_wording(harness):
    """Right is the number after the mark; rows of MMLU are evenly spaced."""
    gsm8k, mmlu = (harness["samples"][task] for task in ("real_gsm8k", "real_mmlu"))
    assert [sample["exact_match"] for sample in gsm8k] == [1.0, 0.0, 0.0]
    assert gsm8k[1]["arguments"][0][0] == solution(1)["question"] and gsm8k[1]["target"] == "2"
    assert [sample["acc"] for sample in mmlu] == [1.0, 1.0, 1.0]
    texts = [sample["arguments"][0][0] for sample in mmlu]
    assert texts == [f"{n} + 1?\nA. 0\nB. {n + 1}\nC. x\nD. y\nAnswer:" for n in (0, 3, 6)]


def test_answers_are_read_in_the_order_of_problems(tmp_path):
    place = elsewhere.answers_place(tmp_path, "greedy", ASKS, "warm")
    (place / "model").mkdir(parents=True)
    assert elsewhere.read_answers(tmp_path, "greedy", ASKS, "warm") is None
    lines = [{"doc_id": 1, "exact_match": 0.0}, {"doc_id": 0, "exact_match": 1.0}]
    write_jsonl(place / "model" / "samples_real_gsm8k_2026.jsonl", lines)
    found = elsewhere.read_answers(tmp_path, "greedy", ASKS, "warm")
    assert found == {"values": [1.0, 0.0], "counts": [1, 1]}
    place = elsewhere.answers_place(tmp_path, "humaneval", ASKS, "warm")
    place.parent.mkdir()
    place.write_text(json.dumps({"targets": [7, 9], "scores": {"T15": {"nll": [3.5, 1.0]}}}))
    assert elsewhere.read_answers(tmp_path, "humaneval", ASKS, "warm") == {"values": [3.5, 1.0], "counts": [7, 9]}


def test_elsewhere_every_model_is_asked_everything(tmp_path, asked):
    steps = elsewhere.build_steps(tmp_path, asked, ASKS, list(METHODS))
    assert len(steps) == len({step.output for step in steps}) == len(elsewhere.ASKED) * (1 + len(METHODS))
    commands = {step.name: " ".join(step.command) for step in steps}
    assert "--model l2d" in commands["greedy warm on 2"] and "diffusion_budget=15" in commands["greedy warm on 2"]
    assert "diffusion_budget" not in commands["mmlu warm_noise_free on 3"]
    assert "--model hf" in commands["sampled full on 2"] and "do_sample=true" in commands["sampled full on 2"]
    assert "real.evaluate" in commands["humaneval warm on 1"]
    assert elsewhere.build_steps(tmp_path, asked, Limits(0, 0, 0), list(METHODS)) == []


def test_loss_of_programs_is_measured(tmp_path, asked_folder, base_dir):
    rows = ("--rows", asked_folder / "data" / "humaneval.jsonl")
    words = (base_dir, tmp_path / "he.json", "--base", base_dir, *rows)
    evaluate.main([str(word) for word in words])
    found = json.loads((tmp_path / "he.json").read_text())
    ids, _, targets = read_part(asked_folder / "data" / "humaneval.jsonl", base_dir)
    assert found["targets"] == [targets.sum().item()] and targets[0, -1]
    right, losses = of_transformers(AutoModelForCausalLM.from_pretrained(base_dir), (ids, None, targets))
    assert found["scores"]["plain"]["nll"] == pytest.approx(losses, abs=1e-3)


# ---- statistics and report ---------------------------------------------------------------------------------------

ABOUT = {
    **{"command": "the command", "date": "2026-01-02", "commit": "abc", "machine": "2 cores", "base": "the base"},
    "settings": {"targets": 300_000, "bf16": True},
}


@pytest.fixture(scope="module")
def study():
    """Made-up outcomes: warm is better than the base, the others differ by chance."""
    draw_, problems = np.random.default_rng(0), 60
    targets = draw_.integers(5, 40, problems).astype(np.int16)
    outcomes = {}
    for method in ("base", *METHODS, *EQUAL.values()):
        path = "l2d" in METHODS.get(method.removesuffix("-equal-time"), METHODS["full"]).options["method"]
        settings = ["T3", "T7", "T15", ended_setting(), "T31", "single"] if path else ["plain"]
        if method in METHODS:
            settings += [gated_setting(p) for p in METHODS[method].gates]
            for at in (whole_setting(), ended_setting()):
                settings += [early_gate(at, p) for p in METHODS[method].early_gates]
        for setting in ["single"] if "noise_free" in method else settings:
            right = draw_.binomial(targets, 0.9 if method == "warm" else 0.7).astype(np.int16)
            right[: problems // 3] = targets[: problems // 3] if method == "warm" else right[: problems // 3]
            nll = (targets * draw_.normal(0.5 if method == "warm" else 1.0, 0.1, problems)).astype(np.float32)
            outcomes[method, setting] = Outcome(right, nll, {"evaluations": 1.0, "passes": 1.0, "plain_steps": 2.5})
    elsewhere = {
        asked: {
            method: {"values": draw_.normal(2.0 if method == "full" else 1.0, 0.1, 50).tolist(), "counts": [2] * 50}
            for method in ("base", "warm", "full")
        }
        for asked in ("greedy", "humaneval")
    }
    losses = {method: [2.0 - step / 100 for step in range(100)] for method in METHODS}
    seconds = {method: 10.0 + number for number, method in enumerate(METHODS)}
    checkpoints = {**dict.fromkeys(METHODS, 100), **dict.fromkeys(EQUAL.values(), 75)}
    return Study(targets, outcomes, {"warm": 0.1}, checkpoints, losses, seconds, elsewhere)


def test_errors_are_over_problems(study):
    """A problem's tokens are one cluster: the error of a share is that of the sums of residuals, written out."""
    one, targets = study.outcomes["warm", "T15"], study.targets.astype(float)
    estimate = score(study, ("warm", "T15"), "accuracy")
    share = one.right.sum() / targets.sum()
    residuals = one.right - share * targets
    assert estimate.value == pytest.approx(share)
    spread = (residuals**2).sum() ** 0.5 * (60 / 59) ** 0.5 / targets.sum()
    assert estimate.stderr == pytest.approx(spread)
    assert score(study, ("warm", "T15"), "loss").value == pytest.approx(one.nll.sum() / targets.sum())
    exact = score(study, ("warm", "T15"), "exact")
    assert exact.value == pytest.approx((one.right == study.targets).mean())
    assert exact.stderr == pytest.approx(stats.sem(one.right == study.targets))


def test_differences_are_paired_by_problem(study):
    keys = ("warm", "T15"), ("base", "plain")
    one, other = (study.outcomes[key] for key in keys)
    found = difference(study, *keys, "exact")
    solved = (one.right == study.targets).astype(float) - (other.right == study.targets)
    assert found.value == pytest.approx(solved.mean()) and found.stderr == pytest.approx(stats.sem(solved))
    for metric, sums in (("accuracy", one.right.astype(float) - other.right), ("loss", one.nll - other.nll)):
        found, targets = difference(study, *keys, metric), study.targets.astype(float)
        residuals = sums - sums.sum() / targets.sum() * targets
        assert found.value == pytest.approx(sums.sum() / targets.sum())
        assert found.stderr == pytest.approx((residuals**2).sum() ** 0.5 * (60 / 59) ** 0.5 / targets.sum(), rel=1e-5)
        assert difference(study, keys[0], keys[0], metric).value == 0.0


def test_lower_loss_is_better_and_all_verdicts_are_corrected_together(study):
    compared = compare(study)
    assert len(compared) == len(COMPARISONS) * len(METRICS) + 2 * 2
    words = {(one.first, one.second, one.metric): one.verdict for one in compared}
    for metric in METRICS:
        assert words[("warm", "T15"), ("base", "plain"), metric] == "better"
        assert words[("warm", "T31"), ("warm", "T3"), metric] == "not told apart"
        assert words[("warm_corrupted", "T15"), ("warm", "T15"), metric] == "worse"
    assert words[("full", "plain"), ("base", "plain"), "greedy"] == "better"
    assert words[("full", "plain"), ("base", "plain"), "humaneval"] == "worse"
    assert words[("warm", "T15"), ("base", "plain"), "humaneval"] == "not told apart"
    smallest = min(one.difference.p_value for one in compared)
    assert min(one.adjusted for one in compared) == pytest.approx(smallest * len(compared))


def test_results_can_be_computed_again_from_themselves(study):
    content = json.loads(json.dumps(report.results(study, ABOUT)))
    again = unpack_study(content["measured"])
    assert json.loads(json.dumps(report.results(again, ABOUT))) == content
    assert report.markdown(again, ABOUT) == report.markdown(study, ABOUT)


def test_report_holds_everything(study):
    text = report.markdown(study, ABOUT)
    assert "`the command`, 2026-01-02, commit abc, on 2 cores." in text and "in bfloat16" in text
    share = study.outcomes["warm", "T15"].right.sum() / study.targets.sum()
    assert f"| L2D, warm start | T = 15 | {share:.3f} [" in text and "one evaluation, t = 0.1 |" in text
    assert "| L2D, warm start | 100 | 10.0 | 16.7 | 1.955 | 1.055 |" in text  # 100 steps of 10 s; means of ten losses
    assert "| 75 | 12.5 |" in text and "0.0001: full finetuning)" in text
    mean = np.sum(study.elsewhere["humaneval"]["full"]["values"]) / 100
    assert "HumanEval, loss (50) |" in text and f"| {mean:.3f} [" in text.split("## Elsewhere")[1]
    assert "| T = 15, base from p = 0.7 |" in text and "| base from p = 0.7: warm start, at T = 15 |" in text
    ended = "T = 15, ending at t = 0.75"
    assert f"| {ended}, one evaluation from p = 0.8 |" in text
    assert f"| one evaluation from p = 0.8: warm start, {ended} |" in text
    assert all(text.count(method.title) >= 3 for method in METHODS.values())


def test_documented_study_follows_from_its_samples():
    """`docs/real-model.md` ends with the report on `docs/real-model.json`."""
    docs = REPOSITORY / "docs"
    content = json.loads((docs / "real-model.json").read_text(encoding="utf-8"))
    measured, about = unpack_study(content["measured"]), {name: content[name] for name in ABOUT}
    again = json.loads(json.dumps(report.results(measured, about)), parse_float=nine_digits)
    assert again == json.loads(json.dumps(content), parse_float=nine_digits)
    text = report.markdown(measured, about)
    assert text[text.index(report.INTRODUCTION) :] in (docs / "real-model.md").read_text(encoding="utf-8")


def test_figure_is_drawn(tmp_path, study):
    draw(study, tmp_path / "real.png")
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")


# ---- all of it ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_study_ends_like_any_other(tmp_path, source, base_dir):
    """SIGKILL while it trains, and then the same command to the end."""
    out = tmp_path / "real"
    words = ["--base", base_dir, "--data", source, "--out", out, "--targets", 60_000, "--held-out", HELD_OUT]
    words += ["--problems", 2, "--methods", "warm_noise_free", "--gsm8k", 0, "--mmlu", 0, "--humaneval", 0]
    call = [sys.executable, "-m", "training.studies.real", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    folder = run_folder(out, "warm_noise_free")
    first = subprocess.Popen(call, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    while not list(folder.glob("checkpoint-*")):
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    killed_at = saved_steps(folder)[-1]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "steps were complete already" in done.stdout, done.stderr
    losses = json.loads(losses_file(out, "warm_noise_free").read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    assert len(losses) == state["max_steps"] == saved_steps(folder)[-1] > killed_at
    assert f"checkpoint-{killed_at}" in (out / "logs" / "train_warm_noise_free.log").read_text()
    study = read_study(out, 2, Limits(0, 0, 0))
    trained = {("warm_noise_free", "single"), (EQUAL["warm_noise_free"], "single")}
    assert set(study.outcomes) == {("base", "plain"), *trained}
    assert study.seconds.keys() == METHODS.keys() and "What does L2D do" in (out / "real.md").read_text()
    content = json.loads((out / "results.json").read_text())
    assert set(unpack_study(content["measured"]).outcomes) == set(study.outcomes)
