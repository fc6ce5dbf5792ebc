"""The leaderboard on made-up and real result files: numbers, tests, comparability, what is left out, escaping, size.

Run: `python -m pytest tests/lm_eval_ext/test_leaderboard.py` (about 15 seconds; the browser is in
`test_leaderboard_browser.py`)

- `write_run`, `write_demo`: result folders laid out like lm-eval 0.4.13's
"""

import base64
import csv
import gzip
import hashlib
import io
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from lm_eval_ext.leaderboard.__main__ import main, write_leaderboard
from lm_eval_ext.leaderboard.plots import curve_figures, difference_figures

SAMPLER = dict(budget=15, solver="midpoint", start_time=0.0, final_time=1.0, guidance_scale=1.0, guidance_class=None)
SAMPLER |= dict(choice="sample", choice_temperature=0.0, normalize_average=False, end_velocity="straight", seed=0)
NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def write_run(
    folder: Path, scores: dict[str, list[float]], *, model: str = "base", l2d: dict | None = None, **changes
) -> Path:
    """A results file and its samples; `scores` by task, one per document; `changes` to top-level entries."""
    counts = {task: len(values) for task, values in scores.items()}
    stamp = "2026-01-02T03-04-05.678901"
    values = {task: _result(task, found) for task, found in scores.items()}
    kwargs = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    config = {"model": "l2d" if l2d else "hf", "model_args": {"pretrained": f"/models/{model}"}, "limit": None}
    config |= {"batch_size": "8", "device": "cpu", "gen_kwargs": {}, "random_seed": 0, "fewshot_seed": 1234}
    if l2d is not None:
        sampler = {**SAMPLER, **l2d.pop("sampler", {})}
        config["model_args"]["diffusion_budget"] = sampler["budget"]
        spent = {"mean": sampler["budget"] + 0.5, "median": sampler["budget"], "p95": 31, "max": 60}
        config["l2d"] = {"sampler": sampler, "variant": "lora", "base": "/models/base", "world_size": 1}
        config["l2d"] |= {"generated_tokens": 1000, "scored_tokens": 0, "nfe_computed_per_token": spent, **l2d}
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    one = {"output_type": "generate_until", "generation_kwargs": kwargs, "metric_list": [metric]}
    raw = {"results": values, "group_subtasks": {}, "configs": {task: one for task in scores}, "config": config}
    raw |= {"versions": {task: 1.0 for task in scores}, "n-shot": {task: 0 for task in scores}, "git_hash": "abc123"}
    raw |= {"higher_is_better": {task: {"exact_match": True} for task in scores}, "date": 1795317531.0}
    raw |= {"n-samples": {task: {"original": n, "effective": n} for task, n in counts.items()}}
    raw |= {"task_hashes": {task: f"hash-{task}-{n}" for task, n in counts.items()}, "lm_eval_version": "0.4.13"}
    raw |= {"total_evaluation_time_seconds": "20.5", "chat_template_sha": None, **changes}
    folder = folder / f"__models__{model}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"results_{stamp}.json"
    file.write_text(json.dumps(raw))
    for task, found in scores.items():
        lines = [json.dumps(_sample(task, place, score)) for place, score in enumerate(found)]
        (folder / f"samples_{task}_{stamp}.jsonl").write_text("\n".join(lines) + "\n")
    return file


def _result(task: str, scores: list[float]) -> dict:
    mean = sum(scores) / len(scores)
    if len(scores) == 1:
        return {"alias": task, "exact_match,none": mean, "exact_match_stderr,none": "N/A"}
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
    return {"alias": task, "name": task, "exact_match,none": mean, "exact_match_stderr,none": spread}


def _sample(task: str, place: int, score: float) -> dict:
    prompt = f"{task} question {place}: {NASTY if place == 0 else 'how many?'}"
    answer = "42" if score else f"{place} {NASTY if place == 1 else ''}"
    sample = {"doc_id": place, "doc": {"question": prompt, "passage": place // 4}, "target": "42", "filter": "none"}
    sample |= {"arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"until": ["\n"]}}}, "resps": [[answer]]}
    sample |= {"filtered_resps": [answer], "metrics": ["exact_match"], "exact_match": score, "target_hash": "t"}
    return sample | {name: hashlib.sha256(prompt.encode()).hexdigest() for name in ("doc_hash", "prompt_hash")}


def coins(count: int, share: float, seed: int) -> list[float]:
    """`count` scores of 0 or 1."""
    generator = random.Random(seed)
    return [float(generator.random() < share) for _ in range(count)]


def write_demo(folder: Path, documents: int = 40) -> Path:
    """A base, an L2D model at four budgets, the one-evaluation control, and LoRA finetuning, on two tasks."""

    def both(share, seed):
        return {task: coins(documents, share, seed + i) for i, task in enumerate(("gsm8k", "humaneval"))}

    write_run(folder / "base", both(0.4, 0))
    for budget, share in ((1, 0.4), (3, 0.5), (7, 0.7), (15, 0.8)):
        seed = 0 if budget == 1 else 10 * budget
        write_run(folder / f"t{budget}", both(share, seed), model="l2d", l2d={"sampler": {"budget": budget}})
    control = {"solver": "euler", "budget": 2, "final_time": 0.02}
    write_run(folder / "control", both(0.75, 7), model="l2d", l2d={"sampler": control})
    arguments = {"pretrained": "/models/base", "peft": "/models/lora"}
    config = {"model": "hf", "model_args": arguments, "limit": None, "gen_kwargs": {}, "fewshot_seed": 1234}
    write_run(folder / "lora", both(0.9, 3), model="base", config=config)
    return folder


def by_label(board) -> dict:
    return {row.setting.label: row for row in board.rows}


def unpack(page: str, task: str) -> dict:
    """What the page holds of a task's samples."""
    packed = re.search(rf'class="samples" data-task="{task}">([^<]+)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


# ---- the board ---------------------------------------------------------------------------------------------------


def test_numbers_equal_the_results_files(tmp_path):
    board = write_leaderboard([write_demo(tmp_path / "runs")], tmp_path / "out")
    content = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    seen = 0
    for row in content["rows"]:
        for task, score in row["scores"].items():
            raw = json.loads((tmp_path / "out" / score["file"]).read_text())
            assert score["value"] == raw["results"][task]["exact_match,none"]
            assert score["stderr"] == pytest.approx(raw["results"][task]["exact_match_stderr,none"], rel=1e-12)
            assert f'data-value="{score["value"]!r}"' in page and score["file"] in page
            seen += 1
    assert seen == 14
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "leaderboard.csv").read_text())))
    assert [float(line["value"]) for line in lines] == [c.measure.value for r in board.rows for c in r.cells.values()]


def test_methods_bases_tests_and_averages(tmp_path):
    from scipy import stats

    board = write_leaderboard([write_demo(tmp_path / "runs")], tmp_path / "out")
    rows = by_label(board)
    assert list(rows) == [
        *("base", "L2D at T = 1", "L2D (lora), T = 3", "L2D (lora), T = 7", "L2D (lora), T = 15"),
        *("control: one evaluation, t = 0.02", "LoRA finetuning"),
    ]
    assert rows["base"].base is None and all(r.base is rows["base"] for n, r in rows.items() if n != "base")
    same = rows["L2D at T = 1"].cells["gsm8k"].paired
    assert (same.wins, same.losses, same.ties, same.p_value) == (0, 0, 40, 1.0)
    scores = {name: [s.scores["exact_match"] for s in row.cells["gsm8k"].samples] for name, row in rows.items()}
    expected = stats.ttest_rel(scores["L2D (lora), T = 15"], scores["base"])
    assert rows["L2D (lora), T = 15"].cells["gsm8k"].paired.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    average, difference = rows["base"].averages["all"]
    assert difference is None and average.value == pytest.approx(
        np.mean([c.measure.value for c in rows["base"].cells.values()])
    )
    assert board.controls == {"/models/base": ["one-evaluation", "lora-ft"]}
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert "missing: noise-free path; without them the curve over T does not tell" in text
    assert "unweighted mean" in text


def test_controls_are_lines_beside_the_curves(tmp_path):
    """Of several times of one evaluation the best, in the curve's colour where there are several; gaps are named."""
    runs, out = write_demo(tmp_path / "runs"), tmp_path / "out"
    board = write_leaderboard([runs], out)
    (panel, _) = curve_figures(board, "budget")
    assert panel.note == "Not measured here: noise-free path."
    marks = {mark for mark, _ in panel.legend}
    assert marks == {"c0", "line base base", "line one-evaluation control", "line lora-ft lora"}
    for colour in ("c0", "base", "control", "lora"):  # drawn in the page's own colours, and in no other
        assert f"stroke: var(--{colour})" in panel.svg
    assert not re.search(r"(fill|stroke): #", panel.svg)
    identifiers = re.findall(r'\bid="([^"]*)"', (out / "leaderboard.html").read_text())
    assert len(identifiers) == len(set(identifiers)) > 20
    once = {"solver": "euler", "budget": 2, "final_time": 1.0}
    write_run(runs / "late", {"gsm8k": coins(40, 1.0, 1)}, model="l2d", l2d={"sampler": once})
    write_run(runs / "free", {"gsm8k": coins(40, 0.6, 2)}, model="free", l2d={"sampler": once, "noise_free": True})
    l2d = {"sampler": {"mc_samples": 3}, "carried_state": True}
    write_run(runs / "other", {"gsm8k": coins(40, 0.7, 3)}, model="other", l2d=l2d)
    board = write_leaderboard([runs], out)
    labels = [row.setting.label for row in board.rows]
    assert "control: one evaluation, t = 1" in labels and "control: noise-free path" in labels
    assert "L2D (lora), T = 15, carried state, 3 noise draws" in labels
    panel = curve_figures(board, "budget")[0]
    assert panel.note == "" and board.controls == {"/models/base": ["one-evaluation", "noise-free", "lora-ft"]}
    colour = next(mark for mark, name in panel.legend if name == "L2D (lora), l2d")
    best = "control: one evaluation, t = 1 (best of 2 times): 1.000"
    assert (f"line one-evaluation {colour}", best) in panel.legend and "t = 0.02" not in str(panel.legend)
    against_time = curve_figures(board, "seconds")[0]
    assert ("control", "controls: one evaluation, noise-free path") in against_time.legend
    assert not [mark for mark, _ in against_time.legend if "line one-evaluation" in mark]


def test_equal_boards_give_equal_figures(tmp_path):
    board = write_leaderboard([write_demo(tmp_path / "runs")], tmp_path / "out")
    first, second = ([figure.svg for figure in difference_figures(board)] for _ in range(2))
    assert first == second and "<dc:date>" not in first[0]


def test_settings_of_other_versions_are_shown(tmp_path):
    """A setting that only an older version knew tells rows apart; its default, and what changes only cost, do not."""
    samplers = {"votes": 3}, {"votes": 1}, {"new_one": "x"}, {"rtol": 0.5, "draft_tokens": 0}
    for number, sampler in enumerate(samplers):
        write_run(
            tmp_path / "runs" / str(number),
            {"gsm8k": coins(40, 0.5, number)},
            model=f"m{number}",
            l2d={"sampler": sampler},
        )
    labels = {row.setting.name: row.setting.label for row in write_leaderboard([tmp_path / "runs"], tmp_path).rows}
    usual = "L2D (lora), T = 15"
    assert labels == {"m0": f"{usual}, votes 3", "m1": usual, "m2": f"{usual}, new_one x", "m3": usual}


def test_training_options_are_told_from_the_recipe(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "recipe.yaml").write_text(
        "method: l2d\ncorruption_rate: 0.3\nrollout_evaluations: null\neasy_target_rate: 1.0\n"
    )
    config = {"model_args": {"pretrained": str(checkpoint)}, "model": "l2d", "limit": None, "gen_kwargs": {}}
    config["l2d"] = {"sampler": SAMPLER, "variant": "full", "base": "/models/base"}
    write_run(tmp_path / "runs", {"gsm8k": coins(40, 0.5, 1)}, model="l2d", config=config)
    board = write_leaderboard([tmp_path / "runs"], tmp_path / "out")
    assert [row.setting.label for row in board.rows] == ["L2D (full), T = 15, corrupted 0.3"]


def test_clusters_come_from_a_field_of_the_documents(tmp_path):
    runs = write_demo(tmp_path / "runs")
    plain = by_label(write_leaderboard([runs], tmp_path / "a"))["L2D (lora), T = 7"].cells["gsm8k"].paired
    grouped = by_label(write_leaderboard([runs], tmp_path / "b", cluster_fields=("passage",)))
    assert plain.units == 40 and not plain.clustered
    cell = grouped["L2D (lora), T = 7"].cells["gsm8k"]
    assert cell.paired.units == cell.score.units == 10 and cell.paired.clustered


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n-shot": {"gsm8k": 5, "humaneval": 0}}, "shots 5 instead of 0"),
        ({"versions": {"gsm8k": 2.0, "humaneval": 1.0}}, "task version 2 instead of 1"),
        ({"chat_template_sha": "feedbeef"}, "chat template feedbeef instead of none"),
        ({"task_hashes": {"gsm8k": "x", "humaneval": "hash-humaneval-40"}}, "other prompts or documents"),
    ],
)
def test_what_is_not_comparable_is_marked_and_not_averaged(tmp_path, change, words):
    runs = write_demo(tmp_path / "runs")
    scores = {task: coins(40, 0.9, 5) for task in ("gsm8k", "humaneval")}
    write_run(runs / "odd", scores, model="l2d", l2d={"sampler": {"budget": 31}}, **change)
    board = write_leaderboard([runs], tmp_path / "out")
    odd = by_label(board)["L2D (lora), T = 31"]
    assert words in odd.cells["gsm8k"].reasons and words in odd.cells["gsm8k"].base_reasons
    assert odd.cells["gsm8k"].paired is None and not odd.averages
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert f"≠ not comparable: {words}" in page
    assert words in (tmp_path / "out" / "leaderboard.md").read_text()


def test_other_limit_and_world_size_are_not_comparable(tmp_path):
    runs = write_demo(tmp_path / "runs")
    write_run(runs / "short", {"gsm8k": coins(10, 0.9, 5)}, model="l2d", l2d={"sampler": {"budget": 31}})
    two = {"sampler": {"budget": 63}, "world_size": 2}
    write_run(runs / "two", {"gsm8k": coins(40, 0.9, 5)}, model="l2d", l2d=two)
    rows = by_label(write_leaderboard([runs], tmp_path / "out"))
    assert "documents 10 instead of 40" in rows["L2D (lora), T = 31"].cells["gsm8k"].reasons
    assert rows["L2D (lora), T = 63"].cells["gsm8k"].reasons == ["processes 2 instead of 1"]
    assert rows["L2D (lora), T = 63"].cells["gsm8k"].paired is not None  # the base's is not recorded, prompts are equal


def test_groups_of_tasks_are_one_column(tmp_path):
    parts = {f"mmlu_{name}": coins(20, 0.5, seed) for seed, name in enumerate(("law", "art"))}
    both = [score for scores in parts.values() for score in scores]
    group = {"mmlu": _result("mmlu", both)}
    for name, l2d in (("base", None), ("l2d", {})):
        results = {**{task: _result(task, scores) for task, scores in parts.items()}, **group}
        write_run(tmp_path / name, parts, model=name, l2d=l2d, results=results, group_subtasks={"mmlu": list(parts)})
    board = write_leaderboard([tmp_path], tmp_path / "out")
    assert board.tasks == ["mmlu"]
    cell = by_label(board)["L2D (lora), T = 15"].cells["mmlu"]
    assert cell.paired.documents == 40 and cell.protocol["n"] == 40
    assert cell.measure.value == pytest.approx(sum(both) / 40)


def test_a_finetuned_model_may_be_a_base(tmp_path):
    recipe = tmp_path / "checkpoint" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("method: lora_sft\nbase: /models/base\n")
    args = {"model_args": {"pretrained": str(recipe.parent)}, "model": "hf", "limit": None, "gen_kwargs": {}}
    write_run(tmp_path / "runs" / "base", {"gsm8k": coins(40, 0.3, 1)})
    write_run(tmp_path / "runs" / "lora", {"gsm8k": coins(40, 0.5, 2)}, config=args)
    write_run(tmp_path / "runs" / "l2d", {"gsm8k": coins(40, 0.6, 3)}, model="l2d", l2d={"base": str(recipe.parent)})
    write_run(tmp_path / "runs" / "plain", {"gsm8k": coins(40, 0.6, 4)}, model="other", l2d={})
    board = write_leaderboard([tmp_path / "runs"], tmp_path / "out")
    bases = {row.setting.name: row.base.setting.kind for row in board.rows if row.setting.kind == "l2d-lora"}
    assert bases == {"l2d": "lora-ft", "other": "base"}
    assert by_label(board)["LoRA finetuning"].base is by_label(board)["base"]


# ---- what is left out --------------------------------------------------------------------------------------------


def test_bad_files_are_named_and_skipped(tmp_path):
    runs = write_demo(tmp_path / "runs")
    whole = (runs / "base" / "__models__base" / "results_2026-01-02T03-04-05.678901.json").read_text()
    for name, text in {
        "truncated": whole[: len(whole) // 2],
        "foreign": '{"loss": 1.0}',
        "list": "[1, 2]",
        "strange": '{"results": {"gsm8k": 3}, "config": {}}',
        "empty": '{"results": {}, "config": {}}',
        "deep": "[" * 100_000,
    }.items():
        (runs / f"results_{name}.json").write_text(text)
    (runs / "t.partial").mkdir()
    (runs / "t.partial" / "results_partial.json").write_text(whole)
    (runs / "results_binary.json").write_bytes(b"\x80\xff\x00")
    board = write_leaderboard([runs], tmp_path / "out")
    assert len(board.rows) == 7
    left_out = {Path(item.file).name: item.reason for item in board.skipped}
    assert "results.gsm8k: Input should be a valid dictionary" in left_out["results_strange.json"]
    assert "truncated" in left_out["results_truncated.json"]
    assert {f"results_{n}.json" for n in ("foreign", "list", "strange", "empty", "deep", "binary", "partial")} < set(
        left_out
    )
    page, text = ((tmp_path / "out" / f"leaderboard.{end}").read_text() for end in ("html", "md"))
    assert all(name in page and name in text for name in left_out)


def test_contradictory_and_truncated_samples(tmp_path):
    runs = write_demo(tmp_path / "runs")
    (wrong,) = (runs / "t7").rglob("samples_gsm8k_*.jsonl")
    wrong.write_text(wrong.read_text().replace('"exact_match": 0.0', '"exact_match": 1.0'))
    (short,) = (runs / "t3").rglob("samples_gsm8k_*.jsonl")
    short.write_text(short.read_text()[:-40])
    (fewer,) = (runs / "t15").rglob("samples_gsm8k_*.jsonl")
    fewer.write_text("".join(fewer.read_text().splitlines(keepends=True)[:-3]))
    board = write_leaderboard([runs], tmp_path / "out")
    rows = by_label(board)
    assert "gsm8k" not in rows["L2D (lora), T = 7"].cells and "humaneval" in rows["L2D (lora), T = 7"].cells
    for budget in (3, 15):  # the number stands, but nothing can be paired
        cell = rows[f"L2D (lora), T = {budget}"].cells["gsm8k"]
        assert cell.paired is None and not cell.samples
    reasons = {Path(item.file).parts[-3]: item.reason for item in board.skipped if "samples_" in item.file}
    assert "contradictory" in reasons["t7"] and "line 40" in reasons["t3"] and "37 samples" in reasons["t15"]


def test_two_files_that_contradict_each_other(tmp_path):
    runs = write_demo(tmp_path / "runs")
    write_run(runs / "again", {"gsm8k": coins(40, 0.1, 99)}, model="l2d", l2d={"sampler": {"budget": 7}})
    equal = {task: coins(40, 0.8, 150 + i) for i, task in enumerate(("gsm8k", "humaneval"))}
    write_run(runs / "equal", equal, model="l2d", l2d={"sampler": {"budget": 15}})
    board = write_leaderboard([runs], tmp_path / "out")
    rows = by_label(board)
    assert "gsm8k" not in rows["L2D (lora), T = 7"].cells
    assert "gsm8k" in rows["L2D (lora), T = 15"].cells
    assert sum("contradictory: same setting" in item.reason for item in board.skipped) == 2
    assert sum("the same scores again" in item.reason for item in board.skipped) == 2


def test_command_line(tmp_path, capsys):
    runs = write_demo(tmp_path / "runs")
    (runs / "results_bad.json").write_text("{")
    main([str(runs), "--out", str(tmp_path / "out"), "--title", "Ours <&>"])
    printed = capsys.readouterr()
    assert "7 settings, 2 tasks" in printed.out and "results_bad.json" in printed.err
    assert "<h1>Ours &lt;&amp;&gt;</h1>" in (tmp_path / "out" / "leaderboard.html").read_text()
    (tmp_path / "nothing").mkdir()
    for folder, words in ((tmp_path / "absent", "does not exist"), (tmp_path / "nothing", "no usable")):
        with pytest.raises(SystemExit):
            main([str(folder)])
        assert words in capsys.readouterr().err


# ---- the page ----------------------------------------------------------------------------------------------------


def test_page_is_self_contained_and_text_stays_text(tmp_path):
    runs = write_demo(tmp_path / "runs")
    evil = {"sampler": {"budget": 31}, "base": "/models/base"}
    write_run(runs / "evil", {"gsm8k": coins(40, 0.5, 1)}, model=NASTY.replace("/", ""), l2d=evil)
    write_leaderboard([runs], tmp_path / "out")
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "<script>window.hacked" not in page and "<img" not in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page) and "@import" not in page
    content = unpack(page, "gsm8k")
    assert NASTY in content["documents"][0][0]
    answers = content["rows"]["5"]
    assert answers["base"] == 1 and len(answers["answers"]) == 40


def test_recorded_costs_and_commands_are_shown(tmp_path):
    runs = write_demo(tmp_path / "runs")
    prompt = hashlib.sha256(b"gsm8k question 3: how many?").hexdigest()
    ours = {"sampler": {"budget": 31}, "seconds": 2.0, "command": "lm_eval --model l2d as typed"}
    file = write_run(runs / "rich", {"gsm8k": coins(40, 0.5, 1)}, model="l2d", l2d=ours)
    line = {
        "doc_hash": prompt,
        "solved_tokens": 3,
        "nfe_requested": 93,
        "nfe_computed": 60,
        "passes": 4,
        "seconds": 0.5,
    }
    costs = file.with_name(file.name.replace("results", "compute_gsm8k") + "l")
    costs.write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    board = write_leaderboard([runs], tmp_path / "out")
    assert by_label(board)["L2D (lora), T = 31"].setting.seconds_per_token == 0.002
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "1 documents</li>" in page and "lm_eval --model l2d as typed" in page
    answers = unpack(page, "gsm8k")["rows"]["6"]["answers"]
    twice = {"solved_tokens": 6, "nfe_requested": 186, "nfe_computed": 120, "passes": 8, "seconds": 1.0}
    assert [answer[3] for answer in answers if answer[3]] == [twice]


def test_real_results_of_the_harness(tmp_path, base_dir, l2d_dir):
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from tests.integration.harness import TASKS

    tasks = ["l2d_test_generate", "l2d_test_choice", "l2d_test_rolling"]
    arguments = {"hf": f"pretrained={base_dir}", "l2d": f"pretrained={l2d_dir},diffusion_budget=1"}
    import lm_eval_ext.model  # noqa: F401  registers `l2d`

    for model, given in arguments.items():
        tracker = EvaluationTracker(output_path=str(tmp_path / "runs" / model))
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=given,
            tasks=tasks,
            task_manager=manager,
            evaluation_tracker=tracker,
            device="cpu",
            batch_size=4,
            log_samples=True,
            bootstrap_iters=10,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in tasks:
            tracker.save_results_samples(task_name=task, samples=samples[task])
    board = write_leaderboard([tmp_path / "runs"], tmp_path / "out")
    assert not board.skipped
    base, ours = board.rows
    assert (base.setting.kind, ours.setting.kind) == ("base", "l2d-base") and ours.base is base
    for task in ("l2d_test_generate", "l2d_test_choice"):
        paired = ours.cells[task].paired
        assert paired.ties == paired.documents > 0
        (file,) = (tmp_path / "runs" / "l2d").rglob("results_*.json")
        assert (
            ours.cells[task].measure.value
            == json.loads(file.read_text())["results"][task][ours.cells[task].measure.name]
        )
    assert ours.setting.trained == 0 and ours.setting.tokens > 0


def _mutated(value, generator: random.Random):
    """`value` with one entry, anywhere, removed or replaced by something else."""
    junk = [None, "x", "", -1, 0, 1e308, float("nan"), [], {}, [1], {"a": 1}, True, "1", 10**400]
    places = list(_places(value))
    *outer, last = generator.choice(places)
    inner = value
    for key in outer:
        inner = inner[key]
    if generator.random() < 0.25:
        del inner[last]
    else:
        inner[last] = generator.choice(junk)
    return value


def _places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


@pytest.mark.parametrize("seed", range(30))
def test_damaged_files_never_crash_the_report(tmp_path, seed):
    generator = random.Random(seed)
    runs = write_demo(tmp_path / "runs", 6)
    for file in sorted(runs.rglob("*.json*")):
        if generator.random() < 0.4:
            lines = [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
            place = generator.randrange(len(lines))
            lines[place] = json.dumps(_mutated(json.loads(lines[place]), generator))
            file.write_text("\n".join(lines))
    formats = ("html", "md", "csv", "json")[seed % 3 > 0 :]  # figures take most of the time
    board = write_leaderboard([runs], tmp_path / "out", only=formats)
    used = {run.file.resolve() for row in board.rows for run in row.runs}
    named = {Path(item.file).resolve() for item in board.skipped}
    assert used | named >= {file.resolve() for file in runs.rglob("results_*.json")}  # nothing is silently dropped
