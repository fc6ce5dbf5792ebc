"""The demo's report: rows read from result files, sentences that follow the numbers, tables and figure.

pytest tests/training/test_demo_report.py
"""

import json

import pytest

from training.demo import __main__ as demo
from training.demo.plan import DECODINGS, SETTINGS, TASKS, result_folder
from training.demo.report import changed_prompt, findings, read_rows, terminal_table
from training.demo.workspace import open_workspace

PRODUCTS = {"base": 0.50, "l2d-1": 0.50, "l2d-3": 0.52, "l2d-7": 0.88, "l2d-15": 0.93, "l2d-31": 0.94, "once": 0.94,
            "corrupted-3": 0.80, "corrupted-7": 0.93, "corrupted-15": 0.96, "corrupted-31": 0.955,
            "corrupted_once": 0.92, "noise_free": 0.99, "lora_sft": 0.99, "full_sft": 1.00}  # fmt: skip
SUMS = {name: 1.0 for name in PRODUCTS} | {"l2d-15": 0.8, "lora_sft": 0.1, "full_sft": 0.0}


def write_results(out, products=PRODUCTS, answers="right"):
    """Result and samples files as the harness names and fills them, and the times that were chosen."""
    for folder, time in (("l2d", 0.02), ("corrupted", 0.1)):
        (out / f"{folder}_controls.json").write_text(json.dumps({"best_time": time}))
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
    assert "+0.280 ± 0.014 at T = 3 (better), +0.050 ± 0.014 at T = 7 (better)" in shown
    assert "all 18 greedy answers, on both tasks, are the base's own" in shown
    assert "LoRA -0.900 ± 0.014, full -1.000 ± 0.014" in shown
    assert "validation data (t = 0.02), solves 0.940" in not_shown
    assert "the control is as good (+0.000 ± 0.014). So the greedy curve is no evidence" in not_shown
    assert "Iterating helps L2D, corrupted training: one evaluation" in shown and "(t = 0.1), solves 0.920" in shown
    assert "the control is worse (-0.035 ± 0.014). Sampled" in shown and not_shown.count("no evidence") == 1
    assert "solves 0.990 of the products greedily: better than L2D at its best budget, T = 31" in not_shown
    assert "better than L2D, corrupted training at its best budget, T = 15 (+0.030 ± 0.014)" in not_shown
    assert "LoRA and full finetuning did better" in not_shown


def test_other_numbers_give_other_sentences(tmp_path):
    shown, not_shown = sentences(
        tmp_path,
        {"l2d-15": 0.80, "l2d-31": 0.99, "once": 0.60, "corrupted_once": 0.955, "noise_free": 0.9, "lora_sft": 0.5},
        same=(8, 9),
    )
    assert "it falls at T = 15" in shown
    assert "NOT reproduced: at T = 1 only 16 of 18" in shown
    assert "Iterating helps L2D: " in shown and "the control is worse (-0.390 ± 0.014)" in shown
    assert "That iterating helps L2D, corrupted training: " in not_shown and not_shown.count("no evidence") == 1
    assert "trajectory help: " in not_shown and "worse than L2D at its best budget, T = 31" in not_shown
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
    assert {row["method"] for row in rows} == {
        *("base", "l2d", "corrupted", "once", "corrupted_once", "noise_free", "lora_sft", "full_sft")
    }
    assert {row["final_time"] for row in rows if row["method"] == "corrupted_once"} == {0.1}
    text = (out / "leaderboard.md").read_text()
    assert "| L2D | 15 | 0.930 ± 0.010 |" in text and "| control: one evaluation, t = 0.02 | 2 | 0.940" in text
    assert "NOT reproduced" in text
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for name in ("leaderboard.md", "leaderboard.json", "accuracy.png"):
        assert str(out / name) in printed
    assert terminal_table(read_rows(out)) in printed
