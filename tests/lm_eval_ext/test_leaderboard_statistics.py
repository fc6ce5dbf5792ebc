"""Every number of the leaderboard, computed once more with scipy from the stored results and samples.

Run: `python -m pytest tests/lm_eval_ext/test_leaderboard_statistics.py` (about 10 seconds)

- `recompute`: of a report, all errors, intervals, p-values, counts and averages, without our own statistics
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lm_eval_ext.leaderboard.__main__ import main, write_leaderboard
from lm_eval_ext.leaderboard.plots import difference_figures
from lm_eval_ext.leaderboard.rows import Row
from tests.lm_eval_ext.test_leaderboard import by_label, coins, write_demo, write_run
from tests.lm_eval_ext.test_leaderboard_comparisons import edit, edit_samples

TASKS = ("gsm8k", "humaneval")
ONCE = {"solver": "euler", "budget": 2, "final_time": 1.0}


def both(share: float, seed: int, documents: int = 40) -> dict[str, list[float]]:
    """Scores of two tasks."""
    return {task: coins(documents, share, seed + i) for i, task in enumerate(TASKS)}


def write_all(folder: Path, documents: int = 40) -> Path:
    """The demo's rows with every kind of control, one evaluation at three times, and a row that is always right."""
    write_demo(folder, documents)
    for time, share in ((0.5, 0.6), (1.0, 0.65)):
        sampler = {**ONCE, "final_time": time}
        write_run(folder / f"at{time}", both(share, int(50 * time), documents), model="l2d", l2d={"sampler": sampler})
    free = {"sampler": dict(ONCE), "noise_free": True}
    write_run(folder / "free", both(0.55, 90, documents), model="free", l2d=free)
    recipe = folder / "full" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("method: full_sft\nbase: /models/base\n")
    config = {"model_args": {"pretrained": str(recipe.parent)}, "model": "hf", "limit": None, "gen_kwargs": {}}
    write_run(folder / "tuned", both(0.85, 70, documents), config=config)
    right = {task: [1.0] * documents for task in TASKS}
    write_run(folder / "right", right, model="l2d", l2d={"sampler": {"budget": 63}})
    return folder


# ---- the recomputation -------------------------------------------------------------------------------------------


def of_clusters(values: np.ndarray, clusters: list) -> tuple[float, int]:
    """Standard error of the mean and number of clusters, from a regression on a constant with clustered errors."""
    names = sorted(set(clusters), key=str)
    residuals = values - values.mean()
    sums = np.array([residuals[[i for i, c in enumerate(clusters) if c == name]].sum() for name in names])
    count = len(names)
    return math.sqrt(count / (count - 1) * (sums**2).sum()) / len(values), count


def interval(value: float, error: float, count: int) -> tuple[float, float]:
    return stats.t(count - 1, value, error).interval(0.95)


def read(row: dict, task: str, out: Path, field: str | None) -> dict[tuple, tuple[float, str]]:
    """By document, score and cluster, from the samples file that the report names."""
    (file,) = row["scores"][task]["samples"]
    lines = [json.loads(line) for line in (out / file).read_text().splitlines()]
    group = (lambda line: f"{field}={line['doc'][field]!r}") if field else (lambda line: line["doc_hash"])
    return {line["doc_hash"]: (line["exact_match"], group(line)) for line in lines}


def check_score(score: dict, own: dict, results: dict, field: str | None) -> None:
    values, clusters = (list(column) for column in zip(*own.values(), strict=True))
    assert score["value"] == results["exact_match,none"] == pytest.approx(np.mean(values), abs=1e-12)
    if len(set(values)) == 1:
        ends = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
        assert score["stderr"] is None and field is None and values[0] in (0, 1)
        assert (score["low"], score["high"]) == pytest.approx(tuple(ends), rel=1e-9)
        return
    error, count = of_clusters(np.array(values), clusters)
    assert score["units"] == count and score["stderr"] == pytest.approx(error, rel=1e-9)
    assert (score["low"], score["high"]) == pytest.approx(interval(score["value"], error, count), rel=1e-9)
    if field is None:
        assert error == pytest.approx(results["exact_match_stderr,none"], rel=1e-9)


def check_comparison(comparison: dict, mine: dict, theirs: dict, field: str | None) -> None:
    assert mine.keys() == theirs.keys()
    first, second = (np.array([own[key][0] for key in mine]) for own in (mine, theirs))
    changes, clusters = first - second, [mine[key][1] for key in mine]
    wins, losses = int((changes > 0).sum()), int((changes < 0).sum())
    assert (comparison["wins"], comparison["losses"], comparison["ties"]) == (wins, losses, len(mine) - wins - losses)
    assert comparison["value"] == pytest.approx(changes.mean(), abs=1e-12)
    if len(set(changes)) == 1:
        assert comparison["stderr"] is None
        expected = 1 if not wins + losses else stats.binomtest(wins, wins + losses).pvalue
    elif field is None:
        test = stats.ttest_rel(first, second)
        expected = test.pvalue
        ends = (comparison["low"], comparison["high"])
        assert ends == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-9)
        signs = stats.binomtest(wins, wins + losses).pvalue
        assert comparison["sign_p_value"] == pytest.approx(signs, rel=1e-9)
    else:
        error, count = of_clusters(changes, clusters)
        expected = 2 * stats.t(count - 1).sf(abs(changes.mean()) / error)
        assert comparison["stderr"] == pytest.approx(error, rel=1e-9) and comparison["sign_p_value"] is None
        ends = (comparison["low"], comparison["high"])
        assert ends == pytest.approx(interval(changes.mean(), error, count), rel=1e-9)
    assert comparison["p_value"] == pytest.approx(expected, rel=1e-9)
    word = "not told apart" if expected >= 0.05 else "better" if changes.mean() > 0 else "worse"
    assert comparison["verdict"] == word


def check_average(average: dict, tasks: list[dict[str, tuple[float, str]]]) -> None:
    """Of tasks that share nothing: their errors add in quadrature."""
    means = [np.mean([score for score, _ in own.values()]) for own in tasks]
    assert average["value"] == pytest.approx(np.mean(means), rel=1e-12)
    errors = [of_clusters(np.array([v for v, _ in own.values()]), [c for _, c in own.values()]) for own in tasks]
    if not any(error for error, _ in errors):
        assert average["stderr"] is None
        return
    error, count = math.hypot(*(error for error, _ in errors)) / len(tasks), min(count for _, count in errors)
    assert average["stderr"] == pytest.approx(error, rel=1e-9)
    assert (average["low"], average["high"]) == pytest.approx(interval(average["value"], error, count), rel=1e-9)


def recompute(out: Path, field: str | None = None) -> tuple[int, int]:
    """Check every number of `leaderboard.json`; how many scores and comparisons it holds."""
    content = json.loads((out / "leaderboard.json").read_text())
    rows = {row["number"]: row for row in content["rows"]}
    scores = comparisons = 0
    for row in rows.values():
        own = {task: read(row, task, out, field) for task in row["scores"]}
        for task, score in row["scores"].items():
            results = json.loads((out / score["file"]).read_text())["results"][task]
            check_score(score, own[task], results, field)
            for comparison in score["against"].values():
                check_comparison(comparison, own[task], read(rows[comparison["row"]], task, out, field), field)
            scores, comparisons = scores + 1, comparisons + len(score["against"])
        for group, average in row["averages"].items():
            tasks = content["groups"][group]
            check_average(average, [own[task] for task in tasks])
            if average["difference"]:
                base = {task: read(rows[row["base"]], task, out, field) for task in tasks}
                changes = [{k: (v - base[t][k][0], c) for k, (v, c) in own[t].items()} for t in tasks]
                check_average(average["difference"], changes)
    assert content["tests"] == comparisons
    return scores, comparisons


def test_every_number_is_scipys(tmp_path):
    write_leaderboard([write_all(tmp_path / "runs")], tmp_path / "out")
    # 7 + 5 rows on two tasks; 11 against the base, and four budgets above 1 against four controls
    assert recompute(tmp_path / "out") == (24, 22 + 4 * 4 * 2)


def test_every_clustered_number_is_that_of_its_clusters(tmp_path):
    runs = write_demo(tmp_path / "runs", 48)
    edit_samples(runs, lambda place, line: line["doc"].update(passage=f"{line['arguments']}"[25:30] + str(place // 5)))
    write_leaderboard([runs], tmp_path / "out", cluster_fields=("passage",))
    assert recompute(tmp_path / "out", "passage") == (14, 12 + 3 * 2 * 2)


# ---- what is compared with what ----------------------------------------------------------------------------------


def test_every_budget_is_tested_against_every_control(tmp_path):
    board = write_leaderboard([write_all(tmp_path / "runs")], tmp_path / "out")
    kinds = ["base", "one-evaluation", "noise-free", "lora-ft", "full-ft"]
    for row in board.rows:
        budget = row.setting.kind == "l2d-lora"
        for task, cell in row.cells.items():
            assert list(cell.comparisons) == (kinds if budget else [] if row.setting.kind == "base" else ["base"])
            if budget:  # of three times of one evaluation the best on this task
                once = [r for r in board.rows if r.setting.kind == "one-evaluation"]
                best = max(once, key=lambda r: r.cells[task].measure.value)
                assert len(once) == 3 and cell.comparisons["one-evaluation"].row is best
    page, text = ((tmp_path / "out" / f"leaderboard.{end}").read_text() for end in ("html", "md"))
    for name in ("one evaluation", "noise-free path", "LoRA finetuning", "full finetuning"):
        assert f"against {name}" in page and f"against {name}" in text
    tests = sum(len(cell.comparisons) for row in board.rows for cell in row.cells.values())
    assert text.count(f"not corrected for {tests} tests") == 1 and page.count(f"not corrected for {tests} tests") == 3
    (figure, _) = difference_figures(board)
    assert [name for _, name in figure.legend][1:] == [
        *("against one evaluation", "against noise-free path", "against LoRA finetuning", "against full finetuning")
    ]
    for colour in ("base", "control", "free", "lora", "full"):
        assert figure.svg.count(f"fill: var(--{colour})") + figure.svg.count(f"stroke: var(--{colour})") >= 4 * 2


def test_one_evaluation_is_a_control_of_its_own_checkpoint_only(tmp_path):
    runs = write_demo(tmp_path / "runs")
    write_run(runs / "other", both(0.7, 5), model="other", l2d={})
    write_run(runs / "foreign", both(0.7, 6), model="foreign", l2d={"base": "/models/another"})
    rows = {row.setting.name: row for row in write_leaderboard([runs], tmp_path / "out").rows}
    assert list(rows["other"].cells["gsm8k"].comparisons) == ["base", "lora-ft"]
    assert list(rows["foreign"].cells["gsm8k"].comparisons) == []


def test_controls_under_another_protocol_are_named_and_not_tested(tmp_path):
    runs = write_demo(tmp_path / "runs")
    (file,) = (runs / "control").rglob("results_*.json")
    edit(file, lambda raw: raw.update({"n-shot": {"gsm8k": 5, "humaneval": 0}}))
    cells = by_label(write_leaderboard([runs], tmp_path / "out"))["L2D (lora), T = 7"].cells
    comparison = cells["gsm8k"].comparisons["one-evaluation"]
    assert comparison.paired is None and comparison.reasons == ["shots 0 instead of 5"]
    assert cells["humaneval"].comparisons["one-evaluation"].paired is not None
    assert "shots 0 instead of 5" in (tmp_path / "out" / "leaderboard.html").read_text()


# ---- the edges ---------------------------------------------------------------------------------------------------


def test_nothing_is_certain(tmp_path):
    """Two documents that both gained, and a single one: no p = 0, no error of 0."""
    for count, p_value in ((1, None), (2, 0.5)):
        folder = tmp_path / str(count)
        write_run(folder / "base", {"gsm8k": [0.0] * count}, results={"gsm8k": {"exact_match,none": 0.0}})
        write_run(
            folder / "l2d", {"gsm8k": [1.0] * count}, model="l2d", l2d={}, results={"gsm8k": {"exact_match,none": 1.0}}
        )
        cell = write_leaderboard([folder], folder / "out").rows[-1].cells["gsm8k"]
        assert cell.paired.p_value == p_value and cell.paired.stderr is None and cell.score.stderr is None
        page = (folder / "out" / "leaderboard.html").read_text()
        assert "± 0.000" not in page and "p < .001" not in page and 'class="difference same"' in page
        assert ("1.000 [0.342, 1.000]" in page) == (count == 2)


@pytest.mark.parametrize("samples", [True, False])
def test_always_right_has_an_interval(tmp_path, samples):
    file = write_run(tmp_path / "run", {"gsm8k": [1.0] * 40})
    if not samples:
        next(file.parent.glob("samples_*")).unlink()
    (row,) = write_leaderboard([tmp_path / "run"], tmp_path / "out").rows
    assert row.cells["gsm8k"].score.stderr is None
    assert "[1.000 [0.912, 1.000]](" in (tmp_path / "out" / "leaderboard.md").read_text()


def test_errors_without_samples_are_the_harnesss(tmp_path):
    file = write_run(tmp_path / "run", {"gsm8k": coins(40, 0.5, 0)})
    next(file.parent.glob("samples_*")).unlink()
    (row,) = write_leaderboard([tmp_path / "run"], tmp_path / "out").rows
    stated = json.loads(file.read_text())["results"]["gsm8k"]["exact_match_stderr,none"]
    assert row.cells["gsm8k"].score.stderr == stated and row.cells["gsm8k"].documents is None


def shared(row: Row) -> list[list[float]]:
    """Scores of two tasks, by document."""
    return [[s.scores["exact_match"] for s in row.cells[task].samples] for task in TASKS]


def test_tasks_that_share_documents_are_not_independent(tmp_path):
    """Two tasks that ask about the same documents: the error is that of the documents' mean scores."""
    base, better = coins(60, 0.4, 0), coins(60, 0.7, 1)
    for name, scores, l2d in (("base", base, None), ("l2d", better, {})):
        other = [score if place % 3 else 1 - score for place, score in enumerate(scores)]
        write_run(tmp_path / "runs" / name, dict(zip(TASKS, (scores, other), strict=True)), model=name, l2d=l2d)
    edit_samples(tmp_path / "runs", lambda place, line: line.update(doc_hash=f"document {place}"))
    board = write_leaderboard([tmp_path / "runs"], tmp_path / "out")
    first, second = (np.array(shared(row)) for row in board.rows)
    score, change = board.rows[1].averages["all"]
    assert score.stderr == pytest.approx(stats.sem(second.mean(0)), rel=1e-9) and score.units == 60
    assert change.stderr == pytest.approx(stats.sem((second - first).mean(0)), rel=1e-9)
    independent = math.hypot(*(cell.score.stderr for cell in board.rows[1].cells.values())) / 2
    assert abs(score.stderr / independent - 1) > 0.05


def test_an_average_without_samples_takes_tasks_as_independent(tmp_path):
    file = write_run(tmp_path / "run", both(0.5, 3))
    next(file.parent.glob("samples_gsm8k*")).unlink()
    (row,) = write_leaderboard([tmp_path / "run"], tmp_path / "out").rows
    score, change = row.averages["all"]
    assert change is None
    assert score.stderr == pytest.approx(math.hypot(*(c.score.stderr for c in row.cells.values())) / 2, rel=1e-12)


def test_equality_needs_a_margin_and_two_tests(tmp_path, capsys):
    same = coins(400, 0.5, 0)
    almost = [*same[:-2], 1 - same[-2], 1 - same[-1]]
    write_run(tmp_path / "runs" / "base", {"gsm8k": same})
    write_run(tmp_path / "runs" / "l2d", {"gsm8k": almost}, model="l2d", l2d={})
    write_run(tmp_path / "runs" / "far", {"gsm8k": coins(400, 0.51, 9)}, model="far", l2d={})
    words = {}
    for margin in ([], ["--margin", "0.02"]):
        main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *margin])
        content = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
        cells = {row["setting"]["model"]: row["scores"]["gsm8k"]["against"] for row in content["rows"]}
        words[len(margin)] = [cells[f"/models/{name}"]["base"]["verdict"] for name in ("l2d", "far")]
    assert words == {0: ["not told apart"] * 2, 2: ["equal within 0.02", "not told apart"]}
    assert "Equal within 0.02: two one-sided tests" in (tmp_path / "out" / "leaderboard.md").read_text()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "runs"), "--margin", "-1"])
    assert "margin=-1 must be positive" in capsys.readouterr().err


# ---- files of other kinds ----------------------------------------------------------------------------------------


def test_predictions_without_scores_are_left_out(tmp_path):
    """`--predict_only` writes the metric `bypass` with the value 999."""
    write_run(tmp_path / "runs" / "base", {"gsm8k": coins(40, 0.5, 0)})
    bypass = {"gsm8k": {"alias": "gsm8k", "bypass,none": 999, "bypass_stderr,none": "N/A"}}
    write_run(tmp_path / "runs" / "l2d", {"gsm8k": coins(40, 0.5, 1)}, model="l2d", l2d={}, results=bypass)
    board = write_leaderboard([tmp_path / "runs"], tmp_path / "out")
    assert [row.setting.kind for row in board.rows] == ["other"]
    assert "has answers without scores (--predict_only)" in [item.reason for item in board.skipped]
    assert "999" not in (tmp_path / "out" / "leaderboard.csv").read_text()


def test_costs_under_the_names_of_earlier_versions(tmp_path):
    """`asked`, `computed` and `rounds` of older files are today's `nfe_requested`, `nfe_computed` and `passes`."""
    spent = {"mean": 12.5, "median": 12, "p95": 20, "max": 31}
    older = {"asked_per_token": spent, "computed_per_token": {**spent, "mean": 9.5}, "rounds_per_token": spent}
    file = write_run(tmp_path / "runs", {"gsm8k": coins(40, 0.5, 0)}, model="l2d", l2d=older)
    edit(file, lambda raw: raw["config"]["l2d"].pop("nfe_computed_per_token"))
    hashes = [json.loads(line)["doc_hash"] for line in next(file.parent.glob("samples_*")).read_text().splitlines()]
    cost = {"solved_tokens": 2, "asked": 30, "computed": 20, "rounds": 4, "seconds": 0.5}
    lines = [json.dumps({"doc_hash": name, **cost}) for name in hashes]
    file.with_name(file.name.replace("results", "compute_gsm8k") + "l").write_text("\n".join(lines))
    board = write_leaderboard([tmp_path / "runs"], tmp_path / "out")
    (row,) = board.rows
    assert not board.skipped and row.setting.cost["nfe_computed"]["mean"] == 9.5
    assert row.setting.cost["nfe_requested"] == row.setting.cost["passes"] == spent
    costs = {"solved_tokens": 2, "nfe_requested": 30, "nfe_computed": 20, "passes": 4, "seconds": 0.5}
    assert row.cells["gsm8k"].costs[hashes[0]] == costs and len(row.cells["gsm8k"].costs) == 40
