"""The study of training options: tasks, plan, measurement, report.

    pytest tests/training/test_study.py

* rows are right by an independent count, and no prompt is in two splits
* the recipes are ones that the trainer's entry point accepts; a folder continues where it stopped
* greedy and sampled exact match, read off scores, are those of decoding
* means, standard errors and differences of made-up results, in the table and in the figure
"""

import json
import math
import random
import sys

import pytest
import torch

from l2d import L2DConfig, L2DForCausalLM
from l2d.sampling.noise import default_keys
from tests.conftest import randomise_path
from tests.training_runs import BASELINE, SMALL, sums, write_jsonl, write_recipe
from training.compare_budgets import BUDGETS, single_evaluation
from training.demo.base import build_base, encode_rows
from training.demo.data import build_tokenizer
from training.demo.plan import write_configs
from training.demo.runner import Step, run_or_exit
from training.demo.workspace import DEMO, open_workspace
from training.recipe import read_recipe
from training.studies import compute, report, timing
from training.studies.evaluate import main, measure, settings
from training.studies.plan import LAYOUT, METHODS, SEEDS, Run, all_runs, base_folder, build_steps, recipes, result_file
from training.studies.prepare import train_base, write_data
from training.studies.tasks import DEEPEST, IDLE, OPERATIONS, PARTS, RISING, STATES, TASKS

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
    steps = build_steps(tmp_path, list(TASKS), quick=False)
    seen = set()
    for step in steps:
        assert set(step.needs) <= seen and step.name not in seen
        seen.add(step.name)
    runs = all_runs(list(TASKS))
    assert len(runs) > len(TASKS) * len(SEEDS) * 6
    assert sum(step.name.startswith("train") for step in steps) == len(runs)
    assert sum(step.name.startswith("evaluate") for step in steps) == len(runs) + len(TASKS) * len(SEEDS)
    only = build_steps(tmp_path, ["machine"], quick=False)
    assert {step.name for step in only} == {step.name for step in steps if "machine" in step.name}


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


@pytest.mark.parametrize(
    "sampler", [{"budget": 7}, single_evaluation(0.2), {**single_evaluation(0.2), "votes": 3}, {"budget": 1}]
)
def test_greedy_is_what_decoding_gives(model, sampler):
    input_ids, labels = answered(model, sampler)
    assert measure(model, input_ids, labels, sampler).greedy.tolist() == [False, True] * 6


def test_sampled_is_how_often_sampling_gives_the_answer(model):
    sampler, copies = {"budget": 7, "draft_tokens": 0}, 1000
    input_ids, labels = (part[1:2] for part in answered(model, sampler))
    expected = measure(model, input_ids, labels, sampler).sampled.item()
    prompt = input_ids[:, :-2]
    torch.manual_seed(0)
    made = model.generate(
        prompt.expand(copies, -1),
        max_new_tokens=2,
        do_sample=True,
        temperature=1.0,
        eos_token_id=None,
        sampler=sampler,
        request_keys=default_keys(prompt.tolist()) * copies,
    )
    often = (made[:, -2:] == input_ids[:, -2:]).all(1).double().mean().item()
    assert 0.005 < expected < 0.995
    assert abs(often - expected) < 4 * math.sqrt(expected * (1 - expected) / copies)


def test_plain_model_is_measured_like_its_path_at_the_base(model):
    input_ids, labels = answered(model, {"budget": 1})
    ours, theirs = measure(model, input_ids, labels, {"budget": 1}), measure(model.base, input_ids, labels)
    assert ours.greedy.tolist() == theirs.greedy.tolist()
    assert torch.allclose(ours.sampled, theirs.sampled, atol=1e-5)


def test_settings_are_what_a_model_can_follow(model):
    names = list(settings(model, 0.1))
    assert names == [*(f"T{budget}" for budget in BUDGETS), "single", "votes"]
    assert settings(model.base, 0.1) == {"plain": None}
    config = L2DConfig(variant="full", diffusion_dim=16, noise_free=True)
    control = L2DForCausalLM.from_base(build_base(build_tokenizer()), config).eval()
    (sampler,) = settings(control, math.nan).values()
    input_ids, labels = answered(control, sampler)
    assert measure(control, input_ids, labels, sampler).greedy.tolist() == [False, True] * 6


def test_steps_are_timed_without_touching_the_run(tmp_path, base_dir, monkeypatch):
    """Every recipe is timed for the same few steps, whatever it says of steps and folder."""
    monkeypatch.setattr(timing, "seconds_per_step", lambda path, run=timing.seconds_per_step: run(path, steps=2))
    common = {"base": base_dir, "dataset": write_jsonl(tmp_path / "rows.jsonl", sums(8)), "max_steps": 10**6}
    common |= {"output_dir": tmp_path / "run", "report_to": "none"}
    plain = write_recipe(tmp_path / "plain.yaml", **{**SMALL, **common})
    lora = write_recipe(tmp_path / "lora.yaml", **{**BASELINE, **common, "method": "lora_sft", "lora_rank": 2})
    timing.main(tmp_path / "seconds.json", {"plain": plain, "lora": lora})
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert seconds.keys() == {"plain", "lora"} and all(value > 0 for value in seconds.values())
    assert not (tmp_path / "run").exists()


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


# ---- report ------------------------------------------------------------------------------------------------------

SOLVED = {"plain": 0.7, "corrupted": 0.9, "rollout": 0.8, "carried": 0.95, "carried_long": 0.95}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder of made-up results: carried rises with the budget, the others do not; depth 2 is never solved."""
    out, draw, problems = tmp_path_factory.mktemp("study"), random.Random(0), 400
    depths = [1 + number % 2 for number in range(problems)]
    (out / "runs").mkdir()
    for method in ("base", *METHODS):
        for seed in SEEDS:
            name = Run("machine", method, seed).name
            (out / "runs" / name).mkdir()
            path = method in SOLVED
            wanted = (
                {f"T{budget}": 0.0 for budget in BUDGETS} | {"single": 0.0, "votes": 0.0} if path else {"plain": 0.0}
            )
            if method.startswith("noise_free"):
                wanted = {"single": 0.0}
            scores = {}
            for setting in wanted:
                share = SOLVED.get(method, 0.5) - (0.3 if setting == "single" and method == "carried" else 0.0)
                greedy = [int(draw.random() < share and depth == 1) for depth in depths]
                scores[setting] = {"greedy": greedy, "sampled": [value / 2 for value in greedy]}
            found = {"depths": depths, "scores": scores, "times": {"0.1": 0.5} if path else {}, "best_time": 0.1}
            result_file(out, name).write_text(json.dumps(found))
            (out / "runs" / name / "pretraining.json").write_text(json.dumps({"steps": 100}))
    (out / "runs" / "machine-seconds.json").write_text(json.dumps(dict.fromkeys(METHODS, 0.02) | {"rollout": 0.03}))
    return out


def test_scores_are_means_over_seeds(made_up):
    task = report.read_scores(made_up, "machine")
    key = ("corrupted", "T7")
    files = [result_file(made_up, Run("machine", "corrupted", seed).name) for seed in SEEDS]
    seeds = [json.loads(file.read_text())["scores"]["T7"]["greedy"] for file in files]
    found = report.score(task, key, "greedy")
    means = torch.tensor(seeds).double().mean(0)
    assert found.seeds == pytest.approx([sum(seed) / 400 for seed in seeds])
    assert found.value == pytest.approx(means.mean().item())
    assert found.stderr == pytest.approx(means.std().item() / 20)
    assert found.depths == pytest.approx({1: 2 * found.value, 2: 0.0})
    assert report.score(task, key, "sampled").value == pytest.approx(found.value / 2)
    assert report.relative_time(task, "rollout") == 1.5
    assert report.relative_time(task, "noise_free_long") == 2.0


def test_differences_are_paired(made_up):
    task = report.read_scores(made_up, "machine")
    key = ("carried", "T7")
    assert report.difference(task, key, key, "greedy") == (0.0, 0.0)
    value, error = report.difference(task, key, ("carried", "single"), "greedy")
    one, two = (torch.tensor(task.problems[k]["greedy"]).double().mean(0) for k in (key, ("carried", "single")))
    assert value == pytest.approx((one - two).mean().item())
    assert error == pytest.approx((one - two).std().item() / 20)
    assert report.verdict(value, error) == "better" and report.verdict(-value, error) == "worse"
    assert report.verdict(0.01, 0.01) == "no difference"


def test_report_holds_everything(made_up):
    tasks = {"machine": report.read_scores(made_up, "machine")}
    about = {"command": "the command", "date": "2026-01-02", "commit": "abc", "machine": "2 cores"}
    text = report.markdown(tasks, about)
    assert "`the command`, 2026-01-02, commit abc, on 2 cores." in text
    assert all(METHODS[method].title in text for method in METHODS) and "one evaluation, t = 0.1 |" in text
    found = report.score(tasks["machine"], ("carried", "T7"), "greedy")
    assert f"| {found.value:.3f} ± {found.stderr:.3f} (" in text
    content = json.loads(json.dumps(report.results(tasks, about)))["tasks"]["machine"]
    assert len(content["rows"]) == 2 * (1 + 5 * (len(BUDGETS) + 2) + len(METHODS) - 5)
    assert len(content["comparisons"]) == 2 * len(report.COMPARISONS)
    assert report.read_scores(made_up, "products") is None


def test_figure_and_files_are_written(made_up):
    compute.write_report(made_up)
    assert (made_up / "study.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((made_up / "results.json").read_text())["command"].startswith(
        "python -m training.studies.compute"
    )


def test_base_is_trained_on_its_own_rows(tmp_path):
    write_data("machine", tmp_path / "data", ROWS)
    reached = train_base("machine", 1, tmp_path / "data", tmp_path / "base", target=0.0, log=lambda line: None)
    assert reached == json.loads((tmp_path / "base" / "pretraining.json").read_text())
    assert reached["steps"] == 25
