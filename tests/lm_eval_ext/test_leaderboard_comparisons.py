"""What the leaderboard puts into one row and what it compares: shots, versions, decodings, samplers, directions.

Run: `python -m pytest tests/lm_eval_ext/test_leaderboard_comparisons.py` (about 3 seconds)
"""

import json
import math
from pathlib import Path

import pytest

from lm_eval_ext.leaderboard.__main__ import write_leaderboard
from lm_eval_ext.leaderboard.plots import curve_figures
from tests.lm_eval_ext.test_leaderboard import by_label, coins, unpack, write_run


def edit(file: Path, change) -> None:
    """Let `change` work on the parsed results file."""
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def edit_samples(folder: Path, change) -> None:
    """Let `change` work on every sample below `folder`."""
    for file in folder.rglob("samples_*"):
        lines = [json.loads(line) for line in file.read_text().split("\n") if line]
        for place, line in enumerate(lines):
            change(place, line)
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n-shot": {"gsm8k": 5}}, "shots 5 instead of 0"),
        ({"versions": {"gsm8k": 3.0}}, "task version 3 instead of 1"),
        ({"task_hashes": {"gsm8k": "other"}}, "other prompts or documents"),
    ],
)
def test_one_setting_under_two_protocols_is_two_rows(tmp_path, changes, words):
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        write_run(tmp_path / name, {"gsm8k": coins(40, 0.5, seed)}, model=f"m{seed}")
    write_run(tmp_path / "again", {"gsm8k": coins(40, 0.8, 3)}, model="m0", **changes)
    board = write_leaderboard([tmp_path], tmp_path / "out")
    assert not board.skipped
    rows = [row for row in board.rows if row.setting.name == "m0"]
    assert sorted((row.cells["gsm8k"].reasons for row in rows), key=len) == [[], [words]]


def test_calls_of_one_setting_on_several_tasks_are_one_row_whatever_their_shots(tmp_path):
    for task, shots in (("gsm8k", 5), ("math", 4)):
        write_run(tmp_path / task, {task: coins(40, 0.5, shots)}, **{"n-shot": {task: shots}})
    (row,) = write_leaderboard([tmp_path], tmp_path / "out").rows
    assert {task: cell.protocol["shots"] for task, cell in row.cells.items()} == {"gsm8k": 5, "math": 4}


def test_a_base_measured_in_other_calls_is_found_by_the_decoding_of_the_task(tmp_path):
    def score(raw):
        raw["configs"]["arc"] = {**raw["configs"]["arc"], "output_type": "multiple_choice"}

    write_run(tmp_path / "base1", {"gsm8k": coins(40, 0.4, 0)})
    edit(write_run(tmp_path / "base2", {"arc": coins(40, 0.4, 1)}), score)
    both = {"gsm8k": coins(40, 0.7, 2), "arc": coins(40, 0.7, 3)}
    edit(write_run(tmp_path / "l2d", both, model="l2d", l2d={}), score)
    board = write_leaderboard([tmp_path], tmp_path / "out")
    cells = by_label(board)["L2D (lora), T = 15"].cells
    assert all(cell.paired is not None and not cell.base_reasons for cell in cells.values())
    titles = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "gsm8k, greedy<" in titles and "arc, scored<" in titles


@pytest.mark.parametrize(
    ("base", "l2d", "reasons"),
    [
        ({"model_dtype": "torch.bfloat16"}, {"model_dtype": "torch.float32"}, ["dtype float32 instead of bfloat16"]),
        ({"model_args": {"dtype": "float16"}}, {"model_dtype": "torch.float32"}, ["dtype float32 instead of float16"]),
        ({"model_dtype": "torch.float32"}, {"model_dtype": "torch.float32"}, []),
        ({}, {"model_dtype": "torch.float32"}, []),
        ({"model_args": {"dtype": "auto"}}, {"model_dtype": "torch.float32"}, []),
        ({"model_dtype": ""}, {"model_dtype": "torch.float32"}, []),  # as the harness writes "unknown"
    ],
)
def test_weights_of_another_type_are_not_compared(tmp_path, base, l2d, reasons):
    def change(given):
        arguments = given.get("model_args", {})
        return lambda raw: raw["config"].update({**given, "model_args": {**raw["config"]["model_args"], **arguments}})

    edit(write_run(tmp_path / "base", {"gsm8k": coins(40, 0.4, 0)}), change(base))
    edit(write_run(tmp_path / "l2d", {"gsm8k": coins(40, 0.7, 2)}, model="l2d", l2d={}), change(l2d))
    cell = by_label(write_leaderboard([tmp_path], tmp_path / "out"))["L2D (lora), T = 15"].cells["gsm8k"]
    assert cell.base_reasons == reasons and (cell.paired is None) == bool(reasons)
    assert cell.reasons == []  # different models in one column may be of different types


def test_the_base_of_the_same_type_is_the_one_compared_with(tmp_path):
    for name, dtype in (("half", "bfloat16"), ("whole", "float32")):
        file = write_run(tmp_path / name, {"gsm8k": coins(40, 0.4, 0)})
        edit(file, lambda raw, dtype=dtype: raw["config"].update(model_dtype=f"torch.{dtype}"))
    file = write_run(tmp_path / "l2d", {"gsm8k": coins(40, 0.7, 2)}, model="l2d", l2d={})
    edit(file, lambda raw: raw["config"].update(model_dtype="torch.float32"))
    cell = by_label(write_leaderboard([tmp_path], tmp_path / "out"))["L2D (lora), T = 15"].cells["gsm8k"]
    assert cell.comparisons["base"].row.cells["gsm8k"].protocol["dtype"] == "float32" and cell.paired is not None


def test_line_separators_in_answers_are_text(tmp_path):
    write_run(tmp_path / "run", {"gsm8k": coins(40, 0.5, 0)})
    edit_samples(tmp_path, lambda place, line: line.update(filtered_resps=["a\u2028b\x85c\u2029"]))
    board = write_leaderboard([tmp_path], tmp_path / "out")
    assert not board.skipped
    assert len(board.rows[0].cells["gsm8k"].samples) == 40


# ---- what the row's sampler was ------------------------------------------------------------------------------------


def test_generation_kwargs_change_the_sampler_that_a_row_shows(tmp_path):
    def change(raw):
        raw["config"]["gen_kwargs"] = {"diffusion_budget": 3, "token_search": "best_of_8"}

    edit(write_run(tmp_path / "run", {"gsm8k": coins(40, 0.5, 0)}, model="l2d", l2d={}), change)
    (row,) = write_leaderboard([tmp_path], tmp_path / "out").rows
    assert (row.setting.budget, row.setting.label) == (3, "L2D (lora), T = 3, best_of_8")
    assert row.setting.tokens == 1000


def test_a_task_with_a_sampler_of_its_own_is_a_row_of_its_own(tmp_path):
    def change(raw):
        kwargs = raw["configs"]["math"]["generation_kwargs"]
        raw["configs"]["math"] = {**raw["configs"]["math"], "generation_kwargs": {**kwargs, "diffusion_budget": 7}}

    tasks = {"gsm8k": coins(40, 0.5, 0), "math": coins(40, 0.5, 1)}
    edit(write_run(tmp_path / "run", tasks, model="l2d", l2d={}), change)
    rows = write_leaderboard([tmp_path], tmp_path / "out").rows
    assert {row.setting.budget: list(row.cells) for row in rows} == {15: ["gsm8k"], 7: ["math"]}
    assert all(row.setting.tokens is None and not row.setting.cost for row in rows)  # known of both together


def test_what_was_recorded_of_a_task_goes_before_what_was_asked(tmp_path):
    def change(raw):
        raw["config"]["gen_kwargs"] = {"diffusion_budget": 3}  # of an edited file: what was used is what was recorded
        raw["config"]["l2d"]["token_search"] = "best_of_8"
        recorded = {"gsm8k": [{"budget": 7, "token_search": None}], "math": [{}], "mbpp": [{}, {"budget": 31}]}
        raw["config"]["l2d"]["task_samplers"] = recorded

    tasks = {name: coins(40, 0.5, seed) for seed, name in enumerate(("gsm8k", "math", "mbpp", "humaneval"))}
    edit(write_run(tmp_path / "run", tasks, model="l2d", l2d={}), change)
    rows = write_leaderboard([tmp_path], tmp_path / "out").rows
    assert {row.setting.label: sorted(row.cells) for row in rows} == {
        "L2D (lora), T = 7": ["gsm8k"],
        "L2D (lora), T = 15, best_of_8": ["math"],
        "L2D (lora), T = 3, best_of_8": ["humaneval", "mbpp"],  # not recorded, or not of one setting
    }


@pytest.mark.parametrize("recorded", [[], {"gsm8k": {}}, {"gsm8k": [3]}, {"gsm8k": [{"budget": 0}]}])
def test_recorded_samplers_of_another_form_are_named(tmp_path, recorded):
    write_run(tmp_path / "base", {"gsm8k": coins(40, 0.5, 0)})
    write_run(tmp_path / "l2d", {"gsm8k": coins(40, 0.5, 0)}, model="l2d", l2d={"task_samplers": recorded})
    board = write_leaderboard([tmp_path], tmp_path / "out")
    assert len(board.rows) == 1 and "config.l2d.task_samplers" in board.skipped[0].reason


def test_impossible_settings_in_a_file_change_nothing(tmp_path):
    def change(raw):
        raw["config"]["gen_kwargs"] = {"diffusion_budget": "many", "solver": ["x"]}

    edit(write_run(tmp_path / "run", {"gsm8k": coins(40, 0.5, 0)}, model="l2d", l2d={}), change)
    (row,) = write_leaderboard([tmp_path], tmp_path / "out").rows
    assert row.setting.budget == 15


@pytest.mark.parametrize(
    ("kwargs", "decoding"),
    [
        ({"temperature": 0.7}, "sampled at 0.7"),  # the harness samples where a temperature stands alone
        ({"temperature": 0.7, "do_sample": False}, "greedy"),
        ({"temperature": 0.0}, "greedy"),
        ({"do_sample": True, "temperature": 1.0}, "sampled at 1"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}, "sampled at 1, top_p 0.9"),
        ({"repetition_penalty": 1.2, "top_p": 0.9, "diffusion_budget": 3}, "greedy, repetition_penalty 1.2"),
    ],
)
def test_decoding_is_told_as_the_harness_does(tmp_path, kwargs, decoding):
    def change(raw):
        raw["configs"]["gsm8k"]["generation_kwargs"] = {"until": [], **kwargs}

    edit(write_run(tmp_path / "run", {"gsm8k": coins(40, 0.5, 0)}), change)
    (row,) = write_leaderboard([tmp_path], tmp_path / "out").rows
    assert row.setting.decoding == decoding


# ---- measures ------------------------------------------------------------------------------------------------------


def write_scored(folder: Path, name: str, metric: str, scores: list[float], value: float, **entry) -> None:
    """A run whose one metric is `metric` with the score `value`; `scores` are those of its documents."""

    def change(raw):
        raw["results"]["lambada"] = {f"{metric},none": value, f"{metric}_stderr,none": 0.1}
        raw["configs"]["lambada"]["metric_list"] = [{"metric": metric, **entry}]
        del raw["higher_is_better"]  # older versions of the harness write none

    l2d = None if name == "base" else {}
    edit(write_run(folder / name, {"lambada": scores}, model=name, l2d=l2d), change)
    edit_samples(folder / name, lambda _, line: line.update({metric: line["exact_match"], "metrics": [metric]}))


def test_a_perplexity_is_not_tested_by_the_mean_of_its_documents(tmp_path):
    for name, scores in (("base", [-2.0, -3.0, -2.5]), ("l2d", [-1.9, -2.8, -2.4])):
        write_scored(tmp_path, name, "perplexity", scores, math.exp(-sum(scores) / 3), aggregation="perplexity")
    board = write_leaderboard([tmp_path], tmp_path / "out")
    cell = board.rows[-1].cells["lambada"]
    assert cell.paired is None
    assert cell.base_reasons == ["the score is not the mean of its documents' scores"]
    assert cell.measure.higher_is_better is False
    (panel,) = curve_figures(board, "budget")
    assert ">perplexity, less is better<" in panel.svg


def test_l2d_at_budget_one_is_the_base_and_lacks_none(tmp_path):
    write_run(tmp_path / "l2d", {"gsm8k": coins(40, 0.7, 2)}, model="l2d", l2d={"sampler": {"budget": 1}})
    board = write_leaderboard([tmp_path], tmp_path / "out")
    assert [row.setting.kind for row in board.rows] == ["l2d-base"]
    assert board.rows[0].cells["gsm8k"].base_reasons == []
    write_run(tmp_path / "more", {"gsm8k": coins(40, 0.7, 2)}, model="other", l2d={"base": "/models/another"})
    other = by_label(write_leaderboard([tmp_path], tmp_path / "out"))["L2D (lora), T = 15"]
    assert other.cells["gsm8k"].base_reasons == ["no result of the base with this decoding"]


def test_less_may_be_better(tmp_path):
    base, better = [0.5, 0.75, 0.5, 0.25] * 9, [0.25, 0.5, 0.25, 0.25] * 9
    for name, scores in (("base", base), ("l2d", better)):
        write_scored(tmp_path, name, "error", scores, sum(scores) / len(scores), higher_is_better=False)
    board = write_leaderboard([tmp_path], tmp_path / "out")
    pair = board.rows[-1].cells["lambada"].paired
    assert (pair.wins, pair.losses, pair.ties) == (27, 0, 9) and pair.value < 0
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert 'class="difference better"' in page and 'class="difference worse"' not in page
    assert "less is better" in page
    assert unpack(page, "lambada")["rows"]["2"]["lower"] is True


def test_labels_tell_rows_apart(tmp_path):
    settings = [{}, {"guidance_scale": 1.5, "guidance_class": "math"}, {"solver": "dopri5"}]
    write_run(tmp_path / "base", {"gsm8k": coins(40, 0.5, 9)})
    for number, sampler in enumerate(settings):
        write_run(tmp_path / str(number), {"gsm8k": coins(40, 0.5, number)}, model="l2d", l2d={"sampler": sampler})
    labels = [row.setting.label for row in write_leaderboard([tmp_path], tmp_path / "out").rows[1:]]
    assert set(labels) == {
        "L2D (lora), T = 15",
        "L2D (lora), T = 15, guidance math × 1.5",
        "L2D (lora), dopri5, adaptive",
    }
    figures = (tmp_path / "out" / "leaderboard.html").read_text()
    assert all(f"#{number} {label[:25]}" in figures for number, label in enumerate(labels, 2))
