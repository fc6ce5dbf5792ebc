"""The demo's report: every number of table and sentences against scipy, words that follow the numbers, files.

pytest tests/training/test_demo_report.py
"""

import itertools
import json
import re

import numpy as np
import pytest
from scipy import stats

from training.demo import __main__ as demo
from training.demo.plan import (
    BUDGETS,
    CURVES,
    DECODINGS,
    FINETUNED,
    LAYOUT,
    NAMES,
    SETTINGS,
    TASKS,
    result_folder,
    timing_file,
)
from training.demo.report import COMPARISONS, at, changed_prompt, compare, findings, read_demo, table, terminal_table
from training.demo.workspace import open_workspace

PROBLEMS = 400
PRODUCTS = {"base": 0.50, "l2d-1": 0.50, "l2d-3": 0.52, "l2d-7": 0.88, "l2d-15": 0.93, "l2d-31": 0.94, "l2d_once": 0.93,
            "corrupted-3": 0.80, "corrupted-7": 0.93, "corrupted-15": 0.96, "corrupted-31": 0.955,
            "corrupted_once": 0.85, "warm-3": 0.7, "warm-7": 0.9,
            "warm-15": 0.95, "warm-31": 0.95, "warm_once": 0.95,
            "l2d_gated": 0.93, "corrupted_gated": 0.96, "warm_gated": 0.6,
            "noise_free": 0.99, "lora_sft": 0.99, "full_sft": 1.00}  # fmt: skip
SUMS = {name: 1.0 for name in PRODUCTS} | {"l2d-15": 0.8, "lora_sft": 0.1, "full_sft": 0.0}
SECONDS = {"l2d": 0.07, "corrupted": 0.07, "noise_free": 0.028, "lora_sft": 0.042, "full_sft": 0.035}


def write_results(out, changes=None, answers="right"):
    """Samples as the harness names and fills them, the times that were chosen, and the time that steps take."""
    for folder, time in (("l2d", 0.02), ("corrupted", 0.1), ("warm", 0.2)):
        (out / f"{folder}_controls.json").write_text(json.dumps({"best_time": time}))
    timing_file(out).write_text(json.dumps(SECONDS))
    ranks = np.random.default_rng(0).permutation(PROBLEMS)  # the same problems are hard for all settings, nearly
    for number, (setting, decoding) in enumerate(itertools.product(SETTINGS, DECODINGS)):
        folder = result_folder(out, setting, decoding) / "model"
        folder.mkdir(parents=True)
        for task, scores in zip(TASKS, (PRODUCTS | (changes or {}), SUMS), strict=True):
            noise = np.random.default_rng(number).normal(0, 12, PROBLEMS) if scores[setting.name] % 1 else 0
            right = ranks + noise < scores[setting.name] * PROBLEMS
            answer = answers if setting.name == "l2d-1" else "right"
            samples = [
                {"doc": {"prompt": f"^{row:03d}*1="}, "resps": [[answer]], "exact_match": float(one)}
                for row, one in enumerate(right)
            ]
            order = np.random.default_rng(number).permutation(PROBLEMS)  # the harness's order is not relied on
            lines = "".join(json.dumps(samples[row]) + "\n" for row in order)
            (folder / f"samples_{task}_2026-01-01T00-00-00.000000.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    write_results(out)
    return out


def right_of(out, key):
    """(N,) by prompt, from the files themselves."""
    method, budget, decoding, task = key
    setting = next(one for one in SETTINGS if (one.method, one.budget) == (method, budget))
    (file,) = result_folder(out, setting, decoding).glob(f"*/samples_{task}_*.jsonl")
    samples = {one["doc"]["prompt"]: one["exact_match"] for one in map(json.loads, file.read_text().splitlines())}
    return np.array([samples[prompt] for prompt in sorted(samples)])


def interval(values):
    """As text: Student's 95 % interval by scipy, or Wilson's where all values agree."""
    if np.ptp(values):
        low, high = stats.ttest_1samp(values, 0).confidence_interval()
    else:
        low, high = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    return low, high


def test_table_by_scipy(results):
    header, *lines = table(read_demo(results))
    assert header == ["method", "T", *(f"{task}, {how}" for task in ("products", "sums") for how in DECODINGS)]
    assert len(lines) == len(SETTINGS) == 23
    for setting, line in zip(SETTINGS, lines, strict=True):
        cells = []
        for task, decoding in itertools.product(TASKS, DECODINGS):
            values = right_of(results, (setting.method, setting.budget, decoding, task))
            low, high = interval(values)
            cells.append(f"{values.mean():.3f} [{max(low, 0):.3f}, {min(high, 1):.3f}]")
        assert line[1:] == [str(setting.budget), *cells]
    assert lines[17][0] == "control: one evaluation, L2D, t = 0.02"


def test_differences_by_scipy(results):
    """Paired by problem, not as if independent, and words after Holm's correction."""
    compared = compare(read_demo(results))
    assert list(compared) == COMPARISONS and len(set(COMPARISONS)) == len(COMPARISONS)
    p_values = []
    for (first, second), one in compared.items():
        ours, theirs = right_of(results, first), right_of(results, second)
        assert one.difference.value == pytest.approx((ours - theirs).mean())
        if np.ptp(ours - theirs):
            test = stats.ttest_rel(ours, theirs)
            assert one.difference.stderr == pytest.approx(stats.sem(ours - theirs))
            assert one.difference.p_value == pytest.approx(test.pvalue, rel=1e-6, abs=1e-300)
            low, high = test.confidence_interval()
            assert str(one) == f"{(ours - theirs).mean():+.3f} [{low:+.3f}, {high:+.3f}], {one.word}"
        p_values.append(one.difference.p_value)
    unpaired = np.hypot(
        stats.sem(ours := right_of(results, at("l2d", 31))), stats.sem(right_of(results, at("l2d_once", 2)))
    )
    assert ours.size == PROBLEMS and compared[at("l2d", 31), at("l2d_once", 2)].difference.stderr < 0.8 * unpaired
    order, highest = np.argsort(p_values, kind="stable"), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, (len(order) - rank) * p_values[place])
        one = compared[COMPARISONS[place]]
        word = "not told apart" if highest >= 0.05 else "better" if one.difference.value > 0 else "worse"
        assert one.word == word
    assert {one.word for one in compared.values()} == {"better", "worse", "not told apart"}


def test_between_one_error_and_two_nothing_is_decided(tmp_path):
    write_results(tmp_path)
    read = read_demo(tmp_path)
    end, control = read.answers[at("l2d", 31)].right, read.answers[at("l2d_once", 2)].right
    control[:] = end
    control[:3] = 1 - control[:3]
    end[:3] = 1  # three more of 400: 1.7 errors
    control[:3] = 0
    one = compare(read)[at("l2d", 31), at("l2d_once", 2)]
    assert 1 < one.difference.value / one.difference.stderr < 2 and one.word == "not told apart"
    assert "That iterating helps L2D (greedy): " in " ".join(findings(read)["not shown"])


def test_sentences_hold_the_numbers(results):
    """Every number of a sentence is a setting, or one that scipy finds."""
    read = read_demo(results)
    compared, sentences = compare(read), findings(read)
    shown, not_shown = " ".join(sentences["shown"]), " ".join(sentences["not shown"])
    assert f"From T = 1 to T = 15 it changes by {compared[at('l2d', 15), at('l2d', 1)]}. Each budget" in shown
    assert f"at T = 3 {compared[at('corrupted', 3), at('l2d', 3)]}; at T = 7" in shown
    assert "all 800 greedy answers, on both tasks, are the base's own" in shown
    assert all(
        f"{NAMES[one]} {compared[at(one, 1, task=TASKS[1]), at('base', 1, task=TASKS[1])]}" in shown
        for one in FINETUNED
    )
    without, gated = at("l2d", 15, task=TASKS[1]), at("l2d_gated", 15, task=TASKS[1])
    assert f"of the products and 1.000 ({compared[gated, without]}) of the sums; " in shown
    warm, share = at("warm_gated", 15), right_of(results, at("warm_gated", 15)).mean()
    assert f"L2D, warm start {share:.3f} ({compared[warm, at('warm', 15)]}) of the products" in shown
    assert f"Iterating helps {NAMES['corrupted']}: one evaluation" in shown and "(t = 0.1)" in shown
    assert f"That iterating helps {NAMES['l2d']} (greedy): one evaluation" in not_shown and "(t = 0.02)" in not_shown
    assert "trained for 1.0 times L2D's processor time (5,000 steps)" in not_shown
    assert "LoRA finetuning (0.6 times L2D's processor time)" in not_shown and "full finetuning (0.5 times" in not_shown
    decided = sum(one.word != "not told apart" for one in compared.values())
    assert f"Of {len(COMPARISONS)} comparisons {decided} are decided" in not_shown
    shares = {
        f"{right_of(results, (s.method, s.budget, d, t)).mean():.3f}"
        for s in SETTINGS
        for d in DECODINGS
        for t in TASKS
    }
    differences = re.findall(r"[+-]\d\.\d{3}", "".join(str(one) for one in compared.values()))
    for number in re.findall(r"[+-]?\d\.\d{3}", shown + not_shown):
        assert number in shares or number in differences


def test_other_numbers_give_other_sentences(tmp_path):
    changes = {
        "l2d-15": 0.80,
        "l2d-31": 0.99,
        "l2d_once": 0.60,
        "corrupted_once": 0.955,
        "noise_free": 0.9,
        "lora_sft": 0.5,
    }
    write_results(tmp_path, changes, answers="wrong")
    sentences = findings(read_demo(tmp_path))
    shown, not_shown = " ".join(sentences["shown"]), " ".join(sentences["not shown"])
    assert "worse at T = 15, better at T = 31" in shown
    assert "NOT reproduced: at T = 1 only 0 of 800" in shown
    assert "Iterating helps L2D: one evaluation" in shown
    assert "That iterating helps L2D, corrupted training (greedy): " in not_shown
    assert re.search(
        r"Against it at T = 15: L2D -0\.1\d\d \[[^]]*\], worse; L2D, corrupted training .*better", not_shown
    )


def test_the_trace_is_of_a_problem_that_only_the_larger_budget_solves(results):
    read, prompt = read_demo(results), changed_prompt(read_demo(results))
    place = sorted(read.answers[at("l2d", 1)].texts).index(prompt)
    assert right_of(results, at("l2d", 1))[place] == 0 and right_of(results, at("l2d", 15))[place] == 1


def test_missing_result_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no answers of base, greedy, to l2d_demo_products: run it again"):
        read_demo(tmp_path)


def test_report_leaves_all_files(tmp_path, capsys, monkeypatch):
    traced = []
    monkeypatch.setattr(demo, "write_pages", lambda out, prompt: traced.append(prompt))  # needs the demo's models
    workspace = open_workspace(tmp_path / "demo", {}, False, LAYOUT)
    out = workspace.folder
    write_results(out, answers="wrong")
    demo.report(workspace)
    printed, text = capsys.readouterr().out, (out / "report.md").read_text()
    read = read_demo(out)
    assert all("| " + " | ".join(line) + " |" in text for line in table(read))
    assert all(
        f"- {line}\n" in text and f"- {line}\n" in printed for lines in findings(read).values() for line in lines
    )
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert all(str(out / name) in printed for name in ("report.md", "accuracy.png", "leaderboard.html"))
    assert terminal_table(read) in printed and traced == [changed_prompt(read)]
    assert len(BUDGETS) == 5 and len(CURVES) == 3
