"""The demo's report: rows read from result files, sentences that follow the numbers, tables and figure.

pytest tests/test_demo_report.py
"""

import json

import pytest

from training.demo import __main__ as demo
from training.demo.plan import DECODINGS, SETTINGS, TASKS, result_folder
from training.demo.report import changed_prompt, findings, read_rows, terminal_table
from training.demo.workspace import open_workspace

PRODUCTS = {"base": 0.50, "l2d-1": 0.50, "l2d-3": 0.52, "l2d-7": 0.88, "l2d-15": 0.93, "l2d-31": 0.94, "control": 0.94,
            "lora_sft": 0.99, "full_sft": 1.00}  # fmt: skip
SUMS = {name: 1.0 for name in PRODUCTS} | {"l2d-15": 0.8, "lora_sft": 0.1, "full_sft": 0.0}


def write_results(out, products=PRODUCTS, answers="right"):
    """Result and samples files as the harness names and fills them."""
    for setting in SETTINGS:
        for decoding in DECODINGS:
            folder = result_folder(out, setting, decoding) / "model"
            folder.mkdir(parents=True)
            results = {
                task: {"alias": task, "exact_match,none": scores[setting.name], "exact_match_stderr,none": 0.01}
                for task, scores in zip(TASKS, (products, SUMS), strict=True)
            }
            content = {"results": results, "n-samples": {task: {"original": 9, "effective": 9} for task in TASKS}}
            (folder / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps(content))
            for task in TASKS:
                answer = answers if setting.name == "l2d-1" else "right"
                solved = [("^1*1=", True), ("^2*2=", setting.budget > 7)]
                samples = [
                    {"doc": {"prompt": prompt}, "resps": [[answer]], "exact_match": float(right)}
                    for prompt, right in solved
                ]
                lines = "".join(json.dumps(sample) + "\n" for sample in samples)
                (folder / f"samples_{task}_2026-01-01T00-00-00.000000.jsonl").write_text(lines)


def sentences(tmp_path, changes=None, same=(9, 9)):
    write_results(tmp_path, PRODUCTS | (changes or {}))
    found = findings(read_rows(tmp_path), {task: same for task in TASKS})
    return " ".join(found["shown"]), " ".join(found["not shown"])


def test_rows_are_what_the_harness_reported(tmp_path):
    write_results(tmp_path)
    rows = read_rows(tmp_path)
    assert len(rows) == len(SETTINGS) * len(DECODINGS) * len(TASKS)
    row = next(row for row in rows if (row.method, row.budget, row.decoding) == ("l2d", 15, "sampled"))
    assert (row.task, row.value, row.stderr, row.n, row.solver) == ("l2d_demo_products", 0.93, 0.01, 9, "midpoint")
    assert (tmp_path / row.file).is_file()


def test_missing_result_is_named(tmp_path):
    with pytest.raises(ValueError, match="evaluation base greedy is incomplete"):
        read_rows(tmp_path)


def test_sentences_follow_the_numbers(tmp_path):
    shown, not_shown = sentences(tmp_path)
    assert "from T = 1 to T = 15 the accuracy changes by +0.430 ± 0.014, and it does not fall" in shown
    assert "all 18 greedy answers, on both tasks, are the base's own" in shown
    assert "LoRA -0.900 ± 0.014, full -1.000 ± 0.014" in shown
    assert "the control is as good (+0.000 ± 0.014). So the greedy curve is no evidence" in not_shown
    assert "LoRA and full finetuning did better" in not_shown


def test_other_numbers_give_other_sentences(tmp_path):
    shown, not_shown = sentences(
        tmp_path, {"l2d-15": 0.80, "l2d-31": 0.99, "control": 0.60, "lora_sft": 0.5}, same=(8, 9)
    )
    assert "it falls at T = 15" in shown
    assert "NOT reproduced: at T = 1 only 16 of 18" in shown
    assert "the control is worse (-0.390 ± 0.014)" in not_shown
    assert "no evidence" not in not_shown
    assert "full finetuning did better" in not_shown and "LoRA and full" not in not_shown


def test_the_trace_is_of_a_problem_that_only_the_larger_budget_solves(tmp_path):
    write_results(tmp_path)
    assert changed_prompt(tmp_path) == "^2*2="


def test_report_leaves_all_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "write_pages", lambda out: None)  # needs the demo's models
    workspace = open_workspace(tmp_path / "demo", {}, overwrite=False)
    out = workspace.folder
    write_results(out, answers="wrong")
    demo.report(workspace)
    printed = capsys.readouterr().out
    rows = json.loads((out / "leaderboard.json").read_text())
    assert {"method", "budget", "decoding", "task", "value", "stderr"} <= set(rows[0])
    assert {row["budget"] for row in rows if row["method"] == "l2d"} == {1, 3, 7, 15, 31}
    assert {row["method"] for row in rows} == {"base", "l2d", "control", "lora_sft", "full_sft"}
    text = (out / "leaderboard.md").read_text()
    assert "| L2D | 15 | 0.930 ± 0.010 |" in text and "NOT reproduced" in text
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for name in ("leaderboard.md", "leaderboard.json", "accuracy.png"):
        assert str(out / name) in printed
    assert terminal_table(read_rows(out)) in printed
