"""The study of training options: tasks, plan, measurement, report.

    pytest tests/training/test_study.py

* rows are right by an independent count, and no prompt is in two splits
* the recipes are ones that the trainer's entry point accepts; a folder continues where it stopped
* greedy and sampled exact match, read off scores, are those of decoding
* statistics of made-up results against scipy, in the table and in the figure; those of `docs/study.json`
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from l2d import L2DConfig, L2DForCausalLM
from l2d.sampler_config import single_evaluation
from l2d.sampling.noise import default_keys
from l2d.statistics import mean, shown
from tests.conftest import nine_digits, randomise_path
from training.compare_budgets.measuring import TIMES
from training.demo.base import build_base, encode_rows
from training.demo.data import build_tokenizer
from training.demo.plan import LAYOUT as DEMO
from training.demo.plan import write_configs
from training.demo.runner import Step, run_or_exit
from training.demo.workspace import open_workspace
from training.recipe import read_recipe
from training.studies import compute, report
from training.studies.evaluate import BUDGETS, evaluate, main, measure, settings
from training.studies.plan import (
    LAYOUT,
    METHODS,
    SEEDS,
    Run,
    all_runs,
    base_folder,
    base_seeds,
    build_steps,
    recipes,
    result_file,
)
from training.studies.prepare import train_base, write_data
from training.studies.scores import (
    COMPARISONS,
    compare,
    corrected_verdict,
    difference,
    read_scores,
    score,
    unpack_scores,
)
from training.studies.tasks import DEEPEST, IDLE, OPERATIONS, PARTS, RISING, STATES, TASKS

DOCS = Path(__file__).parents[2] / "docs"
ROWS = 400


@pytest.fixture(scope="module")
def rows():
    return {name: task.build(ROWS) for name, task in TASKS.items()}


# ---- tasks -------------------------------------------------------------------------------------------------------


def test_products_are_right(rows):
    for part in PARTS:
        for row in rows["products"][part]:
            first, second = row["prompt"].removeprefix("^").removesuffix("=").split("*")
            assert int(row["completion"][::-1]) == int(first) * int(second)
            assert 1000 <= int(first) < 10000 and 2 <= int(second) < 10


def test_machine_is_one_of_permutations(rows):
    """The rows of the base say what every operation does: the same thing each time, and to every state another one."""
    learned: dict[tuple[str, str], str] = {}
    for row in rows["machine"]["base"] + rows["machine"]["base_validation"]:
        state, operations = row["prompt"][1], row["prompt"][2:-1]
        assert len(operations) == len(row["completion"]) == DEEPEST
        for operation, following in zip(operations, row["completion"], strict=True):
            assert learned.setdefault((operation, state), following) == following
            state = following
    for operation in OPERATIONS + IDLE:
        assert sorted(learned[operation, state] for state in STATES) == list(STATES)
    assert all(learned[IDLE, state] == state for state in STATES)
    for part in ("train", "validation", "test"):
        for row in rows["machine"][part]:
            state, operations = row["prompt"][1], row["prompt"][2:-1]
            for operation in operations:
                state = learned[operation, state]
            assert row["completion"] == state
            assert row["depth"] == len(operations.rstrip(IDLE)) and IDLE not in operations[: row["depth"]]


def test_machine_becomes_deeper(rows):
    depths = [row["depth"] for row in rows["machine"]["train"]]
    shallow, deep = (round(ROWS * part) for part in RISING)
    assert set(depths[:shallow]) == {1, 2} and set(depths[deep:]) == set(range(1, DEEPEST + 1))
    held_out = [row["depth"] for row in rows["machine"]["test"]]
    assert set(held_out) == set(range(2, DEEPEST + 1))
    assert min(held_out.count(depth) for depth in range(3, DEEPEST + 1)) > 300


@pytest.mark.parametrize("task", list(TASKS))
def test_splits_are_disjoint_and_large_enough(rows, task):
    prompts = {part: {row["prompt"] for row in rows[task][part]} for part in ("train", "validation", "test")}
    assert len(prompts["test"]) >= 1000 and len(rows[task]["train"]) == ROWS
    assert not prompts["train"] & prompts["test"] and not prompts["validation"] & prompts["test"]
    assert not {row["prompt"] for row in rows[task]["base"]} & prompts["test"]
    assert rows[task] == TASKS[task].build(ROWS)


@pytest.mark.parametrize("task", list(TASKS))
def test_tokenizer_knows_every_word(rows, task):
    tokenizer = TASKS[task].tokenizer()
    for part in PARTS:
        input_ids, labels = encode_rows(rows[task][part][:50], tokenizer, TASKS[task].width)
        assert not (input_ids == tokenizer.unk_token_id).any()
        for row, line in zip(rows[task][part], labels, strict=False):
            assert tokenizer.convert_ids_to_tokens(line[line != -100]) == [*row["completion"], "$"]


# ---- plan --------------------------------------------------------------------------------------------------------


def test_recipes_are_accepted_by_the_entry_point(tmp_path):
    write_configs(recipes(tmp_path, quick=False), tmp_path / "configs")
    for run in all_runs(list(TASKS)):
        base_folder(tmp_path, run.task, run.seed).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / run.task).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / run.task / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
        recipe = read_recipe(["--config", str(tmp_path / "configs" / f"{run.name}.yaml")])
        assert recipe.training.seed == run.seed
        assert recipe.training.output_dir.endswith(run.name)


def test_steps_are_complete_and_in_order(tmp_path):
    steps = build_steps(tmp_path, list(TASKS), quick=False, methods=list(METHODS))
    seen = set()
    for step in steps:
        assert set(step.needs) <= seen and step.name not in seen
        seen.add(step.name)
    runs = all_runs(list(TASKS))
    assert {len(METHODS[run.method].seeds(run.task)) for run in runs} == {2, 5}
    first = [run.seed in SEEDS for run in runs if run.task == "products"]
    assert first == sorted(first, reverse=True)  # two seeds of everything before the third of anything
    assert sum(step.name.startswith("train") for step in steps) == len(runs)
    assert sum(step.name.startswith("evaluate") for step in steps) == len(runs) + sum(len(base_seeds(t)) for t in TASKS)
    only = build_steps(tmp_path, ["machine"], quick=False, methods=list(METHODS))
    assert {step.name for step in only} == {step.name for step in steps if "machine" in step.name}
    some = build_steps(tmp_path, ["products"], quick=False, methods=["lora"])
    assert [step.name for step in some if step.name.startswith("train")] == [f"train products-lora-{n}" for n in SEEDS]
    assert {step.name for step in some} < seen and all(set(step.needs) <= {one.name for one in some} for step in some)


def test_folder_continues_and_is_no_demo(tmp_path, capsys):
    out = tmp_path / "study"
    steps = [
        Step(name, (sys.executable, "-c", f"open({str(out / name)!r}, 'x')"), out / name) for name in ("data", "runs")
    ]
    workspace = open_workspace(out, {}, False, LAYOUT)
    run_or_exit(steps[:1], workspace)
    workspace.lock.close()
    with pytest.raises(ValueError, match="holds 'data', which is no demo's"):
        open_workspace(out, {}, False, DEMO)
    run_or_exit(steps, open_workspace(out, {}, False, LAYOUT))
    lines = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["[ 1/1] data", "1 of 2 steps were complete already", "[ 2/2] runs"]


def test_refusal_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "something").touch()
    monkeypatch.setattr(sys, "argv", ["compute", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_status:
        compute.main()
    assert exit_status.value.code == 2
    assert capsys.readouterr().err == f"error: OUT={tmp_path} holds 'something', which is no study's: " + (
        "choose another folder with OUT=.\n"
    )


# ---- measurement -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    tokenizer = build_tokenizer()
    config = L2DConfig(variant="full", diffusion_dim=16, noise_std=1.5, input_width=16, conditioning_width=16)
    model = L2DForCausalLM.from_base(build_base(tokenizer), config).eval()
    randomise_path(model)
    model.base.lm_head.weight.data.mul_(20)  # probabilities that differ
    return model


def answered(model, sampler, **options):
    """Rows whose answers, two tokens and the end, are what the model itself decodes for half of them."""
    tokenizer = build_tokenizer()
    prompts = [f"^{number}*7=" for number in range(1000, 1012)]
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    made = model.generate(ids, max_new_tokens=2, sampler=sampler, eos_token_id=None, **options)[:, -2:]
    made[::2, 1] = (made[::2, 1] + 1) % len(tokenizer)
    input_ids = torch.cat([ids, made], 1)
    return input_ids, input_ids.where(torch.arange(input_ids.shape[1]) >= ids.shape[1], -100)


@pytest.mark.parametrize("sampler", [{"budget": 7}, single_evaluation(0.2), {"budget": 1}])
def test_greedy_is_what_decoding_gives(model, sampler):
    input_ids, labels = answered(model, sampler)
    assert measure(model, input_ids, labels, sampler).greedy.tolist() == [False, True] * 6


@pytest.mark.parametrize("budget", [1, 7])
def test_sampled_is_how_often_sampling_gives_the_answer(model, budget):
    """A thousand requests with a key each, so with noise and output draws of their own."""
    sampler, keys = {"budget": budget, "draft_tokens": 0}, list(range(1000))
    input_ids, labels = (part[1:2] for part in answered(model, sampler))
    copies, prompts = input_ids.expand(len(keys), -1), input_ids[:, :-2].expand(len(keys), -1)
    scored = labels.expand(len(keys), -1) != -100
    logprobs = model.score(copies, continuation_mask=scored, sampler=sampler, request_keys=keys).logprobs
    chances = logprobs.double().masked_fill(~scored, 0).sum(1).exp()
    measured = measure(model, input_ids, labels, sampler).sampled.item()
    (default,) = default_keys(input_ids[:, :-2].tolist())
    own = model.score(input_ids, continuation_mask=labels != -100, sampler=sampler, request_keys=[default]).logprobs
    assert measured == pytest.approx(own[labels != -100].double().sum().exp().item())
    options = {"max_new_tokens": 2, "do_sample": True, "temperature": 1.0, "eos_token_id": None, "sampler": sampler}
    drawn = model.generate(prompts, request_keys=keys, **options)[:, -2:]
    assert len(drawn.unique(dim=0)) > 10
    often = (drawn == input_ids[:, -2:]).all(1).double().mean()
    spread = (chances * (1 - chances)).sum().sqrt() / len(keys)
    assert 0.05 < chances.mean() < 0.95 and (budget > 1) == (chances.std() > 1e-6)
    assert abs(often - chances.mean()) < 4 * spread


def test_plain_model_is_measured_like_its_path_at_the_base(model):
    input_ids, labels = answered(model, {"budget": 1})
    ours, theirs = measure(model, input_ids, labels, {"budget": 1}), measure(model.base, input_ids, labels)
    assert ours.greedy.tolist() == theirs.greedy.tolist()
    assert torch.allclose(ours.sampled, theirs.sampled, atol=1e-5)


def test_settings_are_what_a_model_can_follow(model):
    names = list(settings(model, 0.1))
    assert names == [*(f"T{budget}" for budget in BUDGETS), "single"]
    assert settings(model.base, 0.1) == {"plain": None}
    config = L2DConfig(variant="full", diffusion_dim=16, noise_free=True)
    control = L2DForCausalLM.from_base(build_base(build_tokenizer()), config).eval()
    (sampler,) = settings(control, None).values()
    input_ids, labels = answered(control, sampler)
    assert measure(control, input_ids, labels, sampler).greedy.tolist() == [False, True] * 6


def test_checkpoint_is_evaluated_whole(tmp_path, rows, model):
    write_data("products", tmp_path / "data", ROWS)
    for part in ("validation", "test"):
        lines = (tmp_path / "data" / f"{part}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data" / f"{part}.jsonl").write_text("".join(lines[:8]))
    model.base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    main(tmp_path / "base", tmp_path / "data", tmp_path / "base.json")
    found = json.loads((tmp_path / "base.json").read_text())
    assert found["depths"] == [0] * 8 and found["best_time"] is None
    input_ids, labels = encode_rows(rows["products"]["test"][:8], build_tokenizer(), TASKS["products"].width)
    expected = measure(model.base, input_ids, labels).sampled
    assert found["scores"]["plain"]["sampled"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_path_is_evaluated_at_the_time_that_validation_chooses(tmp_path, model):
    """The outcomes of every time are kept, so that the choice can be made again."""
    write_data("products", tmp_path / "data", ROWS)
    for part in ("validation", "test"):
        lines = (tmp_path / "data" / f"{part}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data" / f"{part}.jsonl").write_text("".join(lines[:8]))
    model.base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    path = L2DForCausalLM.from_base(str(tmp_path / "base"), model.config)
    path.path.load_state_dict(model.path.state_dict())
    path.save_pretrained(tmp_path / "path")
    build_tokenizer().save_pretrained(tmp_path / "path")
    content = evaluate(tmp_path / "path", tmp_path / "data")
    assert list(content["scores"]) == [*(f"T{budget}" for budget in BUDGETS), "single"]
    losses = {time: kept["nll"] for time, kept in content["validation"].items()}
    assert list(losses) == [f"{time:g}" for time in TIMES]
    assert all(not any(kept["greedy"]) for kept in content["validation"].values())  # so that the loss decides
    assert f"{content['best_time']:g}" == min(losses, key=losses.get)


# ---- report ------------------------------------------------------------------------------------------------------

SOLVED = {"plain": 0.7, "corrupted": 0.9, "carried": 0.95, "warm": 0.8, "warm_corrupted": 0.9, "warm_carried": 0.95}
SOLVED |= {"warm_own": 0.85, "warm_carried_own": 0.97}
ABOUT = {"command": "the command", "date": "2026-01-02", "commit": "abc", "machine": "2 cores"}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder of made-up results: carried rises with the budget, the others do not; depth 2 is never solved."""
    out, draw, problems = tmp_path_factory.mktemp("study"), random.Random(0), 400
    depths = [1 + number % 2 for number in range(problems)]
    (out / "runs").mkdir()
    for method in ("base", *METHODS):
        for seed in (*SEEDS, 2):
            name, path = Run("products", method, seed).name, method in SOLVED
            (out / "runs" / name).mkdir()
            settings = [f"T{budget}" for budget in BUDGETS] + ["single"] if path else ["plain"]
            scores = {}
            for setting in ["single"] if "noise_free" in method else settings:
                share = SOLVED.get(method, 0.5) - (0.3 if setting == "single" and method == "carried" else 0.0)
                greedy = [int(draw.random() < share - 0.03 * seed and depth == 1) for depth in depths]
                scores[setting] = {"greedy": greedy, "sampled": [value * 0.6 for value in greedy]}
            content = {"depths": depths, "scores": scores, "best_time": 0.1 if path else None}
            result_file(out, name).write_text(json.dumps(content))
            (out / "runs" / name / "pretraining.json").write_text(json.dumps({"steps": 100}))
    (out / "runs" / "products-seconds.json").write_text(json.dumps(dict.fromkeys(METHODS, 0.02) | {"lora": 0.04}))
    return out


@pytest.fixture(scope="module")
def measured(made_up):
    return {"products": read_scores(made_up, "products")}


def outcomes_of(out, method, setting, decoding="greedy"):
    """(seeds, N) from the files themselves."""
    files = [result_file(out, Run("products", method, seed).name) for seed in METHODS[method].seeds("products")]
    return np.array([json.loads(file.read_text())["scores"][setting][decoding] for file in files if file.exists()])


def test_scores_have_an_error_over_problems_and_one_over_trainings(made_up, measured):
    """Against scipy; a method without a seed's result is reported without it."""
    task, outcomes = measured["products"], outcomes_of(made_up, "corrupted", "T7")
    assert outcomes.shape == (3, 400)  # of five seeds
    problems, trainings = score(task, ("corrupted", "T7"), "greedy")
    assert [problems.value, trainings.value] == pytest.approx([outcomes.mean()] * 2)
    assert problems.stderr == pytest.approx(stats.sem(outcomes.mean(0)))
    assert trainings.stderr == pytest.approx(stats.sem(outcomes.mean(1)))
    assert trainings.interval() == pytest.approx(stats.ttest_1samp(outcomes.mean(1), 0).confidence_interval())
    assert score(task, ("corrupted", "T7"), "sampled").problems.value == pytest.approx(0.6 * outcomes.mean())
    assert score(task, ("lora", "plain"), "greedy").trainings.units == 2
    assert task.relative_time("products", "lora") == pytest.approx(2 * METHODS["lora"].steps("products") / 2000)
    assert read_scores(made_up, "machine") is None


def test_differences_are_paired_by_problem_and_seed(made_up, measured):
    task, key = measured["products"], ("carried", "T7")
    assert difference(task, key, key, "greedy").problems.value == 0.0
    one, other = (outcomes_of(made_up, *k) for k in (key, ("carried", "single")))
    problems, trainings = difference(task, key, ("carried", "single"), "greedy")
    assert problems.stderr == pytest.approx(stats.sem((one - other).mean(0)))
    assert trainings.p_value == pytest.approx(stats.ttest_rel(one.mean(1), other.mean(1)).pvalue)
    problems, trainings = difference(task, key, ("lora", "plain"), "greedy")  # on the two seeds that both have
    pairs = one[:2] - outcomes_of(made_up, "lora", "plain")
    assert trainings.units == 2 and problems.stderr == pytest.approx(stats.sem(pairs.mean(0)))


def test_verdicts_are_corrected_for_their_number(measured):
    """Holm's correction by hand, over problems and over trainings, all comparisons together."""
    compared = compare(measured)
    assert len(compared) == 2 * len(COMPARISONS)
    for number in (0, 1):
        p_values = np.array([one.difference[number].p_value for one in compared])
        order, adjusted, highest = np.argsort(p_values, kind="stable"), np.zeros(len(p_values)), 0.0
        for rank, place in enumerate(order):
            highest = adjusted[place] = min(1.0, max(highest, (len(order) - rank) * p_values[place]))
        assert [one.adjusted[number] for one in compared] == pytest.approx(adjusted.tolist())
        for one in compared:
            estimate, decided = one.difference[number], one.adjusted[number] < 0.05
            assert (one.verdicts()[number] in ("better", "worse")) == decided
            if decided:
                assert one.verdicts()[number] == ("better" if estimate.value > 0 else "worse")
    words = {one.verdicts()[number] for one in compared for number in (0, 1)}
    assert {"better", "not told apart"} <= words


@pytest.mark.parametrize(
    ("values", "adjusted", "word"),
    [
        ([0.5, 0.4, 0.6], 0.04, "better"),
        ([-0.5, -0.4, -0.6], 0.04, "worse"),
        ([0.5, 0.4, 0.6], 0.06, "not told apart"),  # between one error and two, or after the correction
        ([0.001, -0.002, 0.003, 0.0], 1.0, "equal within 0.02"),
        ([0.4], None, "one training"),
    ],
)
def test_words_of_a_verdict(values, adjusted, word):
    assert corrected_verdict(mean(values, bounds=None), adjusted) == word


def test_results_can_be_computed_again_from_themselves(measured):
    content = json.loads(json.dumps(report.results(measured, ABOUT)))
    again = {name: unpack_scores(packed) for name, packed in content["measured"].items()}
    assert json.loads(json.dumps(report.results(again, ABOUT))) == content
    assert report.markdown(again, ABOUT) == report.markdown(measured, ABOUT)
    assert len(content["rows"]) == 2 * (len(SOLVED) * (len(BUDGETS) + 1) + 1 + len(METHODS) - len(SOLVED))


def test_report_holds_everything(measured):
    text = report.markdown(measured, ABOUT)
    assert "`the command`, 2026-01-02, commit abc, on 2 cores." in text
    assert all(method.title in text for method in METHODS.values()) and "one evaluation, t = 0.1 |" in text
    problems, trainings = score(measured["products"], ("carried", "T7"), "greedy")
    low, high = trainings.interval()
    assert f"| {shown(problems)} [{low:.3f}, {min(high, 1):.3f}] (" in text
    ratio = 2 * METHODS["lora"].steps("products") / 2000
    assert (
        f"LoRA finetuning, r = 32 {ratio:.1f} (3,650 steps)." in text
        and f"of {2 * len(COMPARISONS)} comparisons" in text
    )


def test_figure_and_files_are_written(made_up):
    compute.write_report(made_up)
    assert (made_up / "study.png").read_bytes().startswith(b"\x89PNG")
    command = json.loads((made_up / "results.json").read_text())["command"]
    assert command.startswith("python -m training.studies.compute")


def test_documented_study_follows_from_its_samples():
    """`docs/study.md` ends with the report on `docs/study.json`, whose figures scipy finds in the samples, too."""
    content = json.loads((DOCS / "study.json").read_text(encoding="utf-8"))
    tasks = {name: unpack_scores(packed) for name, packed in content["measured"].items()}
    about = {name: content[name] for name in ABOUT}
    again = json.loads(json.dumps(report.results(tasks, about)), parse_float=nine_digits)
    assert again == json.loads(json.dumps(content), parse_float=nine_digits)
    text = report.markdown(tasks, about)
    assert text[text.index(report.INTRODUCTION) :] in (DOCS / "study.md").read_text(encoding="utf-8")
    for row in content["rows"] + content["comparisons"]:
        keys = [row["first"], row["second"]] if "first" in row else [[row["method"], row["setting"]]]
        by_seed = [tasks[row["task"]].outcomes[tuple(key)][row["decoding"]] for key in keys]
        seeds = [seed for seed in by_seed[0] if all(seed in one for one in by_seed)]
        values = np.array([by_seed[0][seed] - (by_seed[1][seed] if len(keys) > 1 else 0.0) for seed in seeds])
        for kind, sample in (("problems", values.mean(0)), ("trainings", values.mean(1))):
            estimate = row[kind]
            assert estimate["value"] == pytest.approx(values.mean(), abs=1e-12) and estimate["units"] == len(sample)
            if estimate["stderr"] is not None:
                test = stats.ttest_1samp(sample, 0)
                assert estimate["stderr"] == pytest.approx(stats.sem(sample))
                assert estimate["p_value"] == pytest.approx(test.pvalue, rel=1e-6, abs=1e-300)
                assert [estimate["low"], estimate["high"]] == pytest.approx(list(test.confidence_interval()), abs=1e-9)


def test_base_is_trained_on_its_own_rows(tmp_path):
    write_data("machine", tmp_path / "data", ROWS)
    reached = train_base("machine", 1, tmp_path / "data", tmp_path / "base", target=0.0, log=lambda line: None)
    assert reached == json.loads((tmp_path / "base" / "pretraining.json").read_text())
    assert reached["steps"] == 25
