"""The demo's report: what the harness measured, as rows, tables and plain sentences.

* `read_rows`: the value and standard error of every setting, decoding and task, from `lm_eval`'s result files
* `findings`: sentences computed from the rows: what is shown, and what is not
* `changed_prompt`: a problem whose answer the budget changed
* `terminal_table`, `markdown`: the rows for people
"""

import json
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path

from training.demo.plan import (
    BUDGETS,
    CONTROLS,
    CURVES,
    DECODINGS,
    NOISE_FREE_STEPS,
    SETTINGS,
    STEPS,
    TASKS,
    Setting,
    result_folder,
)

METRIC = "exact_match"
NAMES = {
    "base": "base",
    "l2d": "L2D",
    "corrupted": "L2D, corrupted training",
    "once": "control: one evaluation",
    "corrupted_once": "control: one evaluation, corrupted training",
    "noise_free": "control: noise-free path",
    "lora_sft": "LoRA finetuning",
    "full_sft": "full finetuning",
}


@dataclass(frozen=True)
class Row:
    """One score: exact match of one task, as the harness reported it."""

    method: str
    budget: int
    decoding: str
    task: str
    value: float
    stderr: float
    n: int
    solver: str | None
    final_time: float | None
    file: str


Scores = dict[tuple[str, int, str, str], Row]


def read_rows(out: Path) -> list[Row]:
    """All rows, in the order of `SETTINGS`. Raises `ValueError` if an evaluation left no result."""
    return [row for setting in SETTINGS for decoding in DECODINGS for row in _setting_rows(out, setting, decoding)]


def _setting_rows(out: Path, setting: Setting, decoding: str) -> list[Row]:
    folder = result_folder(out, setting, decoding)
    files = sorted(folder.glob("*/results_*.json"))
    if not files:
        raise ValueError(f"{folder} holds no results_*.json: the evaluation {setting.name} {decoding} is incomplete.")
    results = json.loads(files[-1].read_text(encoding="utf-8"))
    return [
        Row(
            method=setting.method,
            budget=setting.budget,
            decoding=decoding,
            task=task,
            value=results["results"][task][f"{METRIC},none"],
            stderr=results["results"][task][f"{METRIC}_stderr,none"],
            n=results["n-samples"][task]["effective"],
            solver=setting.solver,
            final_time=setting.final_time(out),
            file=str(files[-1].relative_to(out)),
        )
        for task in TASKS
    ]


def write_json(rows: list[Row], path: Path) -> None:
    """The rows as a JSON list."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def read_answers(out: Path, setting: Setting, decoding: str, task: str) -> dict[str, str]:
    """Prompt -> answer given, from the harness's samples file."""
    file = sorted(result_folder(out, setting, decoding).glob(f"*/samples_{task}_*.jsonl"))[-1]
    samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {sample["doc"]["prompt"]: sample["resps"][0][0] for sample in samples}


def changed_prompt(out: Path) -> str:
    """A product that L2D gets wrong at T = 1 and right at T = 15 (any product, if there is none)."""
    one, fifteen = (next(s for s in SETTINGS if s.method == "l2d" and s.budget == budget) for budget in (1, 15))
    right: dict[int, set[str]] = {}
    for setting in (one, fifteen):
        file = sorted(result_folder(out, setting, "greedy").glob(f"*/samples_{TASKS[0]}_*.jsonl"))[-1]
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        right[setting.budget] = {sample["doc"]["prompt"] for sample in samples if sample[METRIC]}
    return min(right[15] - right[1], default=min(sample["doc"]["prompt"] for sample in samples))


# ---- sentences ---------------------------------------------------------------------------------------------------


def index_rows(rows: list[Row]) -> Scores:
    """Rows by (method, budget, decoding, task)."""
    return {(row.method, row.budget, row.decoding, row.task): row for row in rows}


def findings(rows: list[Row], same_answers: dict[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Sentences under "shown" and "not shown"; every number and every judgement is computed from the rows.

    Args:
        same_answers: by task, how many greedy answers of L2D at budget 1 equal the base's, and of how many.
    """
    scores = index_rows(rows)
    shown = [*(_curve(scores, method) for method in CURVES), _corruption(scores), _base_kept(scores, same_answers)]
    shown += [_sampling(scores), _skills_kept(scores), _finetuning_cost(scores)]
    not_shown: list[str] = []
    for holds, sentence in (_once(scores, method) for method in CURVES):
        (shown if holds else not_shown).append(sentence)
    return {"shown": shown, "not shown": [*not_shown, _noise_free(scores), _against_finetuning(scores)]}


def _curve(scores: Scores, method: str) -> str:
    """T = 1 is the base with either training."""
    curve = [scores[method if budget > 1 else "l2d", budget, "greedy", TASKS[0]] for budget in BUDGETS]
    points = ", ".join(f"{row.value:.3f} at T = {row.budget}" for row in curve)
    at_15 = scores[method, 15, "greedy", TASKS[0]]
    falls = [f"{b.budget}" for a, b in zip(curve, curve[1:], strict=False) if b.value < a.value - _error(a, b)]
    shape = f"it falls at T = {', '.join(falls)}" if falls else "it does not fall beyond the noise of the measurement"
    return (
        f"Budget curve of {NAMES[method]} (products, greedy): {points}; from T = 1 to T = 15 the accuracy changes by "
        f"{_difference(curve[0], at_15)}, and {shape}."
    )


def _corruption(scores: Scores) -> str:
    found = []
    for budget in BUDGETS[1:]:
        plain, corrupted = (scores[method, budget, "greedy", TASKS[0]] for method in CURVES)
        found.append(f"{_difference(plain, corrupted)} at T = {budget} ({_verdict(corrupted, plain)})")
    return f"What corrupted training changes against plain L2D (products, greedy): {', '.join(found)}."


def _base_kept(scores: Scores, same_answers: dict[str, tuple[int, int]]) -> str:
    same, all_answers = (sum(counts) for counts in zip(*same_answers.values(), strict=True))
    if same == all_answers:
        return f"The base is untouched: at T = 1 all {all_answers:,} greedy answers, on both tasks, are the base's own."
    return f"The base is NOT reproduced: at T = 1 only {same:,} of {all_answers:,} greedy answers are the base's own."


def _sampling(scores: Scores) -> str:
    def both(method: str, budget: int) -> str:
        greedy, sampled = (scores[method, budget, decoding, TASKS[0]] for decoding in DECODINGS)
        return f"{greedy.value:.3f} greedy and {sampled.value:.3f} sampled"

    return (
        f"Sampling at temperature 1 (products): the base solves {both('base', 1)}, at T = 15 L2D {both('l2d', 15)}, "
        f"with corrupted training {both('corrupted', 15)}."
    )


def _skills_kept(scores: Scores) -> str:
    keys = _keys(("base", 1), ("l2d", 1), ("l2d", 15), ("corrupted", 15), task=TASKS[1])
    base, at_1, at_15, corrupted = (scores[key] for key in keys)
    return (
        f"The other skill (sums, greedy): {base.value:.3f} for the base and {at_1.value:.3f} for L2D at T = 1. Budgets "
        "above 1 use the diffusion path, which was trained on products only: at T = 15 "
        f"{at_15.value:.3f}, with corrupted training {corrupted.value:.3f}."
    )


def _finetuning_cost(scores: Scores) -> str:
    base, lora, full = (scores[key] for key in _keys(("base", 1), ("lora_sft", 1), ("full_sft", 1), task=TASKS[1]))
    return (
        f"What finetuning on products costs elsewhere (sums, greedy): LoRA {_difference(base, lora)}, full "
        f"{_difference(base, full)}, against the base's {base.value:.3f}, and there is no T = 1 to go back to."
    )


def _once(scores: Scores, method: str) -> tuple[bool, str]:
    """Whether the largest budget is better than one evaluation, and the sentence."""
    (once, end), (sampled, sampled_end) = (
        [scores[name, budget, decoding, TASKS[0]] for name, budget in ((CONTROLS[method], 2), (method, 31))]
        for decoding in DECODINGS
    )
    verdict = _verdict(once, end)
    text = f"That iterating helps {NAMES[method]}: " if verdict != "worse" else f"Iterating helps {NAMES[method]}: "
    text += f"one evaluation of the same path, at the time that was best on validation data (t = {once.final_time:g}), "
    text += f"solves {once.value:.3f} of the products greedily, T = 31 {end.value:.3f}: "
    text += f"the control is {verdict} ({_difference(end, once)})."
    if verdict != "worse":
        text += " So the greedy curve is no evidence that steps improve on each other."
    return verdict == "worse", text + (
        f" Sampled at temperature 1 the control is {_verdict(sampled, sampled_end)}: {sampled.value:.3f} against "
        f"{sampled_end.value:.3f} ({_difference(sampled_end, sampled)})."
    )


def _noise_free(scores: Scores) -> str:
    control, sums = (scores["noise_free", 2, "greedy", task] for task in TASKS)
    parts = []
    for method in CURVES:
        best = max((scores[method, budget, "greedy", TASKS[0]] for budget in BUDGETS[1:]), key=lambda row: row.value)
        parts.append(
            f"{_THAN[_verdict(control, best)]} {NAMES[method]} at its best budget, T = {best.budget} "
            f"({_difference(best, control)})"
        )
    return (
        "That noise and a trajectory help: the same path without noise, evaluated once and trained for about two "
        f"thirds of L2D's time ({NOISE_FREE_STEPS:,} steps), solves {control.value:.3f} of the products greedily: "
        f"{' and '.join(parts)}. Of the sums it solves {sums.value:.3f}."
    )


_THAN = {"worse": "worse than", "better": "better than", "as good": "as good as"}


def _verdict(control: Row, end: Row) -> str:
    """What the difference says of `control` at two standard errors."""
    gap, noise = control.value - end.value, 2 * _error(control, end)
    return "worse" if gap < -noise else "better" if gap > noise else "as good"


def _against_finetuning(scores: Scores) -> str:
    rows = [
        scores[key] for key in _keys(("l2d", 15), ("corrupted", 15), ("lora_sft", 1), ("full_sft", 1), task=TASKS[0])
    ]
    plain, corrupted, lora, full = rows
    ours = max(plain, corrupted, key=lambda row: row.value)
    ahead = [name for name, row in (("LoRA", lora), ("full", full)) if _verdict(row, ours) == "better"]
    verdict = f"{' and '.join(ahead)} finetuning did better" if ahead else "finetuning did not do better"
    return (
        "That L2D learns the trained skill better than finetuning (products, greedy, equal data and "
        f"{STEPS:,} steps each): at T = 15 L2D {plain.value:.3f}, with corrupted training {corrupted.value:.3f}, LoRA "
        f"{lora.value:.3f}, full {full.value:.3f}; {verdict}."
    )


def _keys(*settings: tuple[str, int], task: str) -> list[tuple[str, int, str, str]]:
    return [(method, budget, "greedy", task) for method, budget in settings]


def _error(first: Row, second: Row) -> float:
    """Standard error of the difference of two scores, taken as independent."""
    return hypot(first.stderr, second.stderr)


def _difference(first: Row, second: Row) -> str:
    return f"{second.value - first.value:+.3f} ± {_error(first, second):.3f}"


# ---- tables ------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> list[list[str]]:
    """Header and one line per setting: method, budget, and a score ± standard error per task and decoding."""
    scores = index_rows(rows)
    columns = [(task, decoding) for task in TASKS for decoding in DECODINGS]
    header = ["method", "T", *(f"{task.removeprefix('l2d_demo_')} {decoding}" for task, decoding in columns)]
    lines = []
    for setting in SETTINGS:
        cells = [scores[setting.method, setting.budget, decoding, task] for task, decoding in columns]
        scored = [f"{row.value:.3f} ± {row.stderr:.3f}" for row in cells]
        lines.append([_name(cells[0]), str(setting.budget), *scored])
    return [header, *lines]


def _name(row: Row) -> str:
    """The method, with the time that was chosen for one evaluation."""
    return NAMES[row.method] + (f", t = {row.final_time:g}" if row.method in CONTROLS.values() else "")


def terminal_table(rows: list[Row]) -> str:
    """The table in columns of equal width."""
    lines = table(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(rows: list[Row], sentences: dict[str, list[str]]) -> str:
    """`leaderboard.md`."""
    header, *lines = table(rows)
    counts = {row.task: row.n for row in rows}
    problems = " and ".join(f"{count:,} for `{task}`" for task, count in counts.items())
    text = ["# Demo: arithmetic with a tiny base", ""]
    text += [
        f"Exact match ± standard error on held-out problems ({problems}), as `lm_eval` reported them. T is the budget: "
        "evaluations per token, 1 for plain models; the controls make one evaluation beside the base's own. Sampled: "
        "temperature 1. Everything but the base was trained on products only. One run with one seed: the standard "
        "errors cover the choice of problems, not of seeds.",
        "",
    ]
    text += ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]]
    text += ["", "![Accuracy against budget](accuracy.png)", ""]
    text += ["## What this shows", "", *(f"- {line}" for line in sentences["shown"]), ""]
    text += ["## What this does not show", "", *(f"- {line}" for line in sentences["not shown"]), ""]
    return "\n".join(text)
