"""One evaluation at its best time against the budgets. `python -m pytest tests/training/test_compare_budgets.py`"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats

from l2d import L2DForCausalLM, SamplerConfig
from l2d.sampler_config import single_evaluation
from lm_eval_ext.arguments import parse_arguments
from tests.training_runs import sums, write_jsonl
from training.compare_budgets.__main__ import main
from training.compare_budgets.measuring import (
    Measurement,
    best_single_evaluation,
    cheapest_gate,
    choose_best,
    compare,
    measure,
)
from training.compare_budgets.report import comparison, gate_verdict

TIMES = (0.1, 0.5, 0.9)
WIDTH = 6  # tokens of an answer


@pytest.fixture(scope="module")
def model(l2d_dir):
    """A path that changes tokens."""
    return L2DForCausalLM.from_pretrained(l2d_dir)


def rows_of(model, sampler, count=24):
    """Tokens, mask and targets of prompts of unequal lengths with the model's own greedy answers under `sampler`."""
    generator = torch.Generator().manual_seed(5)
    lines = []
    for number in range(count):
        prompt = torch.randint(3, 390, (1, 4 + number % 3), generator=generator)
        answer = model.generate(prompt, sampler=sampler, do_sample=False, max_new_tokens=WIDTH, eos_token_id=None)
        lines.append((prompt.shape[1], answer[0]))
    width = max(len(tokens) for _, tokens in lines)
    ids, mask, wanted = (torch.zeros(count, width, dtype=torch.long) for _ in range(3))
    for row, (start, tokens) in enumerate(lines):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        wanted[row, start : len(tokens)] = 1
    return ids, mask, wanted.bool()


def made(exact, nll=1.0, **sampler):
    """A measurement of answers of two tokens."""
    right = torch.tensor([2.0 if one else 1.0 for one in exact], dtype=torch.float64)
    twos = torch.full_like(right, 2)
    return Measurement(SamplerConfig(**sampler), twos, right, nll * twos, computed=twos, passes=twos)


@pytest.mark.parametrize("sampler", [single_evaluation(0.5), {"budget": 7}, {"budget": 1}], ids=["once", "7", "base"])
def test_exact_match_is_what_greedy_decoding_gives(model, sampler):
    """Answers of one setting, some with a wrong token, judged under it and under another one."""
    ids, mask, wanted = rows_of(model, sampler)
    for row in range(0, len(ids), 3):
        place = int(wanted[row].nonzero()[row % WIDTH])
        ids[row, place] = (ids[row, place] + 1) % 390
    for tried in (sampler, {"budget": 3}):
        found = measure(model, ids, mask, wanted, tried, batch_size=5)
        right = []
        for tokens, marks in zip(ids, wanted, strict=True):
            start = int(marks.nonzero()[0])
            options = dict(sampler=tried, do_sample=False, max_new_tokens=WIDTH, eos_token_id=None)
            out = model.generate(tokens[None, :start], **options)[0]
            right.append(torch.equal(out[start:], tokens[start : start + WIDTH]))
        assert found.exact.tolist() == right
    assert 0 < sum(right) < len(ids) or tried == {"budget": 3}


def test_figures_by_hand(model):
    ids, mask, wanted = rows_of(model, {"budget": 3})
    found = measure(model, ids, mask, wanted, {"budget": 7}, batch_size=4)
    scored = model.score(ids, mask, continuation_mask=wanted, sampler={"budget": 7})
    assert found.accuracy.value == pytest.approx(scored.greedy[wanted].double().mean().item(), abs=1e-9)
    assert found.nll.value == pytest.approx(-scored.logprobs[wanted].mean().item(), abs=1e-5)
    whole = (scored.greedy | ~wanted).all(1).double()
    assert found.exact_match.value == pytest.approx(whole.mean().item(), abs=1e-9)
    assert found.exact_match.stderr == pytest.approx((whole.std() / len(whole) ** 0.5).item(), abs=1e-9)
    with pytest.raises(ValueError, match="is_target marks no target in some row"):
        measure(model, ids, mask, wanted & (torch.arange(len(ids)) > 0)[:, None], {"budget": 7})


@pytest.mark.parametrize("time", TIMES)
def test_the_time_that_made_the_answers_is_best(model, time):
    best, found = best_single_evaluation(model, *rows_of(model, single_evaluation(time)), TIMES)
    assert best.sampler.final_time == time and best.exact_match.value == 1.0
    assert [one.sampler.final_time for one in found] == list(TIMES)
    assert best.exact_match.stderr is None  # all are right: no error is known, and the interval is Wilson's
    assert all(one.exact_match.value < 1 for one in found if one is not best)


def test_the_lowest_loss_within_one_error_is_best():
    """The highest exact match alone is noise; far behind it a low loss does not count."""
    rows = 100
    highest = made([1] * 70 + [0] * 30, nll=0.5)
    close = made([1] * 67 + [0] * 30 + [1] * 2 + [0], nll=0.4)  # behind by .01, five pairs differ: error .0224
    far = made([1] * 60 + [0] * 40, nll=0.1)
    assert compare(highest, close).stderr == pytest.approx(((5 / rows - 0.01**2) / (rows - 1)) ** 0.5)
    assert choose_best([highest, close, far]) is close
    assert choose_best([far, highest]) is highest
    same = made([1] * 70 + [0] * 30, nll=0.3)
    assert choose_best([highest, same, far]) is same


@pytest.mark.parametrize(
    ("budget", "single", "word"),
    [
        ([1] * 20 + [0] * 20, [0] * 40, "better than"),
        ([0] * 40, [1] * 20 + [0] * 20, "worse than"),
        ([1] * 3 + [0] * 37, [0] * 37 + [1] * 2 + [0], "not told apart from"),
        ([1] * 3 + [0] * 37, [0] * 39 + [1], "not told apart from"),  # .05 +- .049: between one error and two
        ([1, 0] * 20, [1, 0] * 20, "not told apart from"),
    ],
)
def test_comparison(budget, single, word):
    one, other = made(budget, budget=31), made(single, budget=2, solver="euler", final_time=0.05)
    sentence = comparison(one, other)
    assert f"T = 31, is {word} one evaluation at t = 0.05" in sentence
    difference, pairs = compare(one, other), np.array(budget) - np.array(single)
    assert difference.value == pytest.approx(pairs.mean())
    if pairs.any():
        test = stats.ttest_rel(budget, single)
        assert difference.stderr == pytest.approx(stats.sem(pairs))
        assert difference.p_value == pytest.approx(test.pvalue)
        low, high = test.confidence_interval()
        assert f"paired difference {pairs.mean():+.3f} [{low:+.3f}, {high:+.3f}]" in sentence


# ---- gates -------------------------------------------------------------------------------------------------------


def gated(right: list[int], computed: float, p: float) -> Measurement:
    """A measurement of answers of four tokens at T = 15, with `right` tokens each."""
    rights = torch.tensor(right, dtype=torch.float64)
    fours = torch.full_like(rights, 4)
    sampler = SamplerConfig(skip_confidence=p)
    return Measurement(sampler, fours, rights, fours, computed=fours * computed, passes=fours)


def test_the_cheapest_gate_within_one_error_is_named():
    ungated = gated([4, 3, 4, 3] * 5, 15.5, 1.0)
    far = gated([3, 2, 3, 2] * 5, 1.0, 0.5)  # each answer has lost a token: no doubt
    close = gated([4, 3, 4, 2, 3, 4] + [4, 3] * 7, 4.25, 0.7)  # two tokens of 80 lost and one won: error .0216
    same = gated([4, 3, 4, 3] * 5, 6.0, 0.9)
    assert cheapest_gate([far, close, same], ungated) is close
    assert cheapest_gate([far, same], ungated) is same
    assert cheapest_gate([far], ungated) is None
    sentence = gate_verdict([far, close, same], ungated)
    assert "skip_confidence=0.7 computes 4.25 evaluations a token in place of 15.50" in sentence
    assert "token accuracy -0.0125 [" in sentence
    early = dataclasses.replace(same, sampler=SamplerConfig(early_confidence=0.8, early_time=0.2))
    assert gate_verdict([early], ungated).startswith("early_confidence=0.8,early_time=0.2 computes 6.00 evaluations")
    assert gate_verdict([far], ungated) == "No gate keeps token accuracy within one standard error of T = 15."


def test_gates_are_measured_at_the_largest_budget(l2d_dir, make_l2d, base_dir, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", sums(6))
    free = make_l2d(base_dir, noise_free=True)
    stored = make_l2d(base_dir, sampler={"skip_confidence": 0.5})  # of no consequence where gates are asked for
    for folder, name in (
        (l2d_dir, "T = 7, base from p = "),
        (stored, "T = 7, base from p = "),
        (free, "one evaluation, t = 1, base from p = "),
    ):
        file = tmp_path / f"{folder.name}.json"
        some = ["--skip_confidence", "0.9,1e-9", "--device", "cpu", "--json", str(file)]
        budgets = [] if folder is free else ["--budgets", "7,1", "--times", "0.5"]
        main([str(folder), "--data", str(data), *budgets, *some])
        printed, written = capsys.readouterr().out, json.loads(file.read_text())
        assert f"{name}1e-09  0.00 " in printed and f"{name}0.9 " in printed and "standard error" in printed
        none, most = written["gates"]
        assert none["evaluations"] == 0 < most["evaluations"]
        (base,) = (one for one in written["budgets"] if one["sampler"]["budget"] == 1)
        assert none["accuracy"] == base["accuracy"] and none["nll"] == pytest.approx(base["nll"], abs=1e-5)
        assert all(one["sampler"]["skip_confidence"] == 1 for one in written["budgets"] + written["single_evaluations"])
        reference = written["single_evaluations"][-1] if folder is free else written["budgets"][-1]
        assert none["difference"]["value"] == pytest.approx(none["accuracy"] - reference["accuracy"])


def test_an_early_gate_asks_the_best_single_evaluation(l2d_dir, tmp_path, capsys):
    """With the base's gate beside it, one at a time; a noise-free path, which is one evaluation, has none."""
    data, file = write_jsonl(tmp_path / "data.jsonl", sums(6)), tmp_path / "written.json"
    asked = ["--early_confidence", "1e-9", "--skip_confidence", "0.9", "--device", "cpu", "--json", str(file)]
    main([str(l2d_dir), "--data", str(data), "--budgets", "7", "--times", "0.2,0.75", *asked])
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    base, early = written["gates"]
    assert early["sampler"]["early_time"] == written["best_time"]
    (best,) = (one for one in written["single_evaluations"] if one["sampler"]["final_time"] == written["best_time"])
    assert early["accuracy"] == best["accuracy"] and early["evaluations"] == 1
    assert base["sampler"]["early_confidence"] == early["sampler"]["skip_confidence"] == 1
    assert "T = 7, one evaluation from p = 1e-09  1.00 " in printed


# ---- the command -------------------------------------------------------------------------------------------------


def test_command(l2d_dir, tmp_path, capsys):
    """Prompts and completions, columns in JSON and conversations: the table, and arguments that the harness takes."""
    rows = sums(12)
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    write_jsonl(tmp_path / "renamed.jsonl", renamed)
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    write_jsonl(tmp_path / "turns.jsonl", [{"messages": one} for one in turns])
    columns = json.dumps({"prompt": "question", "completion": "answer"})
    printed, written = [], []
    for name, more in (("pairs", []), ("renamed", ["--columns", columns]), ("turns", [])):
        file = tmp_path / f"{name}.json"
        options = ["--times", "0.5,0.1", "--budgets", "3,1", "--json", str(file), "--device", "cpu", *more]
        main([str(l2d_dir), "--data", str(tmp_path / f"{name}.jsonl"), *options])
        printed.append(capsys.readouterr().out)
        written.append(json.loads(file.read_text()))
    assert written[0]["single_evaluations"] == written[1]["single_evaluations"] != written[2]["single_evaluations"]
    first = written[0]
    assert first["examples"] == 12 and [one["sampler"]["budget"] for one in first["budgets"]] == [1, 3]
    (best,) = (one for one in first["single_evaluations"] if one["sampler"]["final_time"] == first["best_time"])
    assert best["nll"] == min(one["nll"] for one in first["single_evaluations"])  # no answer is right at any time
    assert first["difference"]["value"] == 0.0 and first["difference"]["documents"] == 12
    words = dict(pair.split("=") for pair in first["model_args"].split(","))
    settings = parse_arguments(words)
    assert settings.sampler.to_dict() == best["sampler"]
    assert f"--model_args {first['model_args']} --tasks" in printed[0]
    assert f"best single evaluation: t = {first['best_time']:g}\n" in printed[0] and first["verdict"] in printed[0]
    assert [line.split("  ")[0] for line in printed[0].splitlines() if "[" in line][:4] == [
        *("T = 1 (the base)", "T = 3", "one evaluation, t = 0.1", "one evaluation, t = 0.5")
    ]


def test_noise_free_paths_have_one_evaluation(make_l2d, base_dir, tmp_path, capsys):
    folder = make_l2d(base_dir, noise_free=True)
    data = write_jsonl(tmp_path / "data.jsonl", sums(5))
    main([str(folder), "--data", str(data), "--device", "cpu", "--limit", "3"])
    printed = capsys.readouterr().out
    assert "3 examples" in printed and "one evaluation, t = 1 " in printed and "one evaluation, t = 0.5" not in printed
    with pytest.raises(SystemExit):
        main([str(folder), "--data", str(data), "--budgets", "15"])
    assert "diffusion_budget=15" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--times", "0,0.5"], "start_time=0, final_time=0 is not a trajectory"),
        (["--times", "1.5"], "final_time=1.5 must be a number from 0 to 1"),
        (["--times", "nan"], "times='nan' must be finite numbers"),
        (["--times", "early"], "times='early' must be numbers with commas between them"),
        (["--budgets", "3.5"], "budgets='3.5' must be whole numbers"),
        (["--budgets", "14"], "diffusion_budget=14 cannot be met by solver='midpoint'"),
        (["--skip_confidence", "0,0.5"], "skip_confidence=0 must be a number above 0 and at most 1"),
        (["--skip_confidence", "high"], "skip_confidence='high' must be numbers with commas"),
        (["--skip_confidence", "0.5", "--budgets", "1"], "budgets=1 has none: give a larger one"),
        (["--early_confidence", "2"], "early_confidence=2 must be a number above 0 and at most 1"),
        (["--limit", "0"], "limit=0 must be a whole number"),
        (["--batch_size", "-1"], "batch_size=-1 must be"),
        (["--json", "absent/file.json"], "json='absent/file.json' is in a folder that does not exist"),
        (["--data", "absent.jsonl"], "data='absent.jsonl' does not exist"),
        (["--columns", "[1]"], "columns="),
        (["--columns", '{"prompt": "question"}'], "columns refers to 'question', and the dataset has the columns"),
    ],
)
def test_refused_before_weights_are_loaded(l2d_dir, tmp_path, monkeypatch, capsys, changes, sentence):
    loads = "training.compare_budgets.__main__.load_session"
    monkeypatch.setattr(loads, lambda *_, **__: pytest.fail("weights were loaded"))
    data = write_jsonl(tmp_path / "data.jsonl", sums(5))
    with pytest.raises(SystemExit) as caught:
        main([str(l2d_dir), "--data", str(data), *changes])
    *_, said = capsys.readouterr().err.splitlines()  # progress bars may come before it
    assert caught.value.code == 2 and said.startswith("error: ") and sentence in said


def test_other_models_are_refused(base_dir, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", sums(5))
    for folder, sentence in ((tmp_path, "holds no config.json"), (base_dir, "not an L2D checkpoint")):
        with pytest.raises(SystemExit):
            main([str(folder), "--data", str(data)])
        assert sentence in capsys.readouterr().err
