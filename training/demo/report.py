"""The demo's report: `report.md`, a table and sentences that are computed from every answer of every evaluation.

* `read_demo`: answers, chosen times and training times, from the files that the harness and the demo's steps left
* `COMPARISONS`, `compare`: the paired differences that sentences rest on, with p-values corrected for their number
* `findings`: what is shown, and what is not
* `table`, `markdown`: the figures for people; the harness's results as such are in the real leaderboard beside it

All settings answer the same problems, so that differences are paired by problem; all statistics are `l2d.statistics`'.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l2d.statistics import Paired, holm, mean, paired, shown, verdict
from training.demo.plan import (
    BUDGETS,
    CONTROLS,
    CURVES,
    DECODINGS,
    FINETUNED,
    GATE,
    GATED,
    GATED_BUDGET,
    NAMES,
    SETTINGS,
    TASKS,
    chosen,
    result_folder,
    steps_of,
    timing_file,
)

METRIC = "exact_match"
PRODUCTS, SUMS = TASKS
LARGEST = BUDGETS[-1]

Key = tuple[str, int, str, str]
"""Method, budget, decoding, task."""


@dataclass(frozen=True)
class Answers:
    """What one evaluation answered: prompt -> text, and in the same order whether it was right (N,) float64."""

    texts: dict[str, str]
    right: np.ndarray


@dataclass(frozen=True)
class Demo:
    """Everything that the report is made of: answers, the time of each single evaluation, seconds per training step."""

    answers: dict[Key, Answers]
    times: dict[str, float]
    step_seconds: dict[str, float]

    def share(self, key: Key) -> float:
        """Of the problems that were solved."""
        return float(self.answers[key].right.mean())

    def relative_time(self, method: str) -> float:
        """Processor time of a training, divided by that of plain L2D's."""
        return self.step_seconds[method] * steps_of(method) / (self.step_seconds["l2d"] * steps_of("l2d"))


def read_demo(out: Path) -> Demo:
    """All that a finished run left. Raises `ValueError` if an evaluation is missing."""
    answers = {}
    for setting in SETTINGS:
        for decoding in DECODINGS:
            for task in TASKS:
                files = sorted(result_folder(out, setting, decoding).glob(f"*/samples_{task}_*.jsonl"))
                if not files:
                    raise ValueError(f"{out} holds no answers of {setting.name}, {decoding}, to {task}: run it again.")
                lines = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
                lines.sort(key=lambda line: line["doc"]["prompt"])
                texts = {line["doc"]["prompt"]: line["resps"][0][0] for line in lines}
                right = np.array([float(line[METRIC]) for line in lines])
                answers[setting.method, setting.budget, decoding, task] = Answers(texts, right)
    times = {control: chosen(out, curve)["best_time"] for curve, control in CONTROLS.items()}
    return Demo(answers, times, json.loads(timing_file(out).read_text(encoding="utf-8")))


def changed_prompt(demo: Demo) -> str:
    """A product that L2D gets wrong at T = 1 and right at T = 15 (any product, if there is none)."""
    one, fifteen = (demo.answers["l2d", budget, "greedy", PRODUCTS] for budget in (1, 15))
    changed = [prompt for prompt, a, b in zip(one.texts, one.right, fifteen.right, strict=True) if b > a]
    return min(changed, default=min(one.texts))


# ---- comparisons -------------------------------------------------------------------------------------------------


def at(method: str, budget: int, decoding: str = "greedy", task: str = PRODUCTS) -> Key:
    """The key of a setting; every curve is the base's own at T = 1, which was evaluated once."""
    return ("l2d" if method in CURVES and budget == 1 else method, budget, decoding, task)


def _comparisons() -> list[tuple[Key, Key]]:
    pairs = []
    for curve in CURVES:
        pairs.append((at(curve, 15), at(curve, 1)))
        pairs += [(at(curve, b), at(curve, a)) for a, b in zip(BUDGETS, BUDGETS[1:], strict=False)]
        pairs += [(at(curve, LARGEST, decoding), at(CONTROLS[curve], 2, decoding)) for decoding in DECODINGS]
        pairs += [(at(GATED[curve], GATED_BUDGET, task=task), at(curve, GATED_BUDGET, task=task)) for task in TASKS]
        pairs.append((at(curve, 15), at("noise_free", 2)))
        pairs += [(at(curve, 15), at(method, 1)) for method in FINETUNED]
        pairs += [(at(curve, budget), at("l2d", budget)) for budget in BUDGETS[1:] if curve != "l2d"]
    return [*pairs, *((at(method, 1, task=SUMS), at("base", 1, task=SUMS)) for method in FINETUNED)]


COMPARISONS = _comparisons()
"""First minus second, of the settings that sentences compare."""


@dataclass(frozen=True)
class Comparison:
    """A paired difference, and what it says at 5 % after Holm's correction for all of `COMPARISONS`."""

    difference: Paired
    word: str

    def __str__(self) -> str:
        return f"{shown(self.difference, signed=True)}, {self.word}"


Comparisons = dict[tuple[Key, Key], Comparison]


def compare(demo: Demo) -> Comparisons:
    """All of `COMPARISONS`."""
    differences = [paired(demo.answers[one].right, demo.answers[other].right) for one, other in COMPARISONS]
    corrected = holm([difference.p_value for difference in differences])
    words = [verdict(one, corrected=p_value) for one, p_value in zip(differences, corrected, strict=True)]
    return dict(zip(COMPARISONS, map(Comparison, differences, words), strict=True))


# ---- sentences ---------------------------------------------------------------------------------------------------


def findings(demo: Demo) -> dict[str, list[str]]:
    """Sentences under "shown" and "not shown"; every number and every judgement is computed from the answers."""
    compared = compare(demo)
    shown_lines = [_curve(demo, compared, curve) for curve in CURVES]
    shown_lines += [_against_plain(compared, curve) for curve in CURVES if curve != "l2d"]
    shown_lines += [_base_kept(demo), _sampling(demo), _skills_kept(demo), _gated(demo, compared)]
    shown_lines.append(_finetuning_cost(demo, compared))
    iterating = [(compared[_once(curve)].word, _iterating(demo, compared, curve)) for curve in CURVES]
    shown_lines += [line for word, line in iterating if word == "better"]
    not_shown = [line for word, line in iterating if word != "better"]
    not_shown += [_noise_free(demo, compared), _against_finetuning(demo, compared), _number_of_verdicts(compared)]
    return {"shown": shown_lines, "not shown": not_shown}


def _curve(demo: Demo, compared: Comparisons, curve: str) -> str:
    points = ", ".join(f"{demo.share(at(curve, budget)):.3f} at T = {budget}" for budget in BUDGETS)
    steps = [(b, compared[at(curve, b), at(curve, a)].word) for a, b in zip(BUDGETS, BUDGETS[1:], strict=False)]
    words = ", ".join(f"{word} at T = {budget}" for budget, word in steps)
    return (
        f"Budget curve of {NAMES[curve]} (products, greedy): {points}. From T = 1 to T = 15 it changes by "
        f"{compared[at(curve, 15), at(curve, 1)]}. Each budget against the one before: {words}."
    )


def _against_plain(compared: Comparisons, curve: str) -> str:
    differences = (f"at T = {b} {compared[at(curve, b), at('l2d', b)]}" for b in BUDGETS[1:])
    return f"{NAMES[curve]} against {NAMES['l2d']} (products, greedy): {'; '.join(differences)}."


def _base_kept(demo: Demo) -> str:
    pairs = [(demo.answers[at("l2d", 1, task=task)], demo.answers[at("base", 1, task=task)]) for task in TASKS]
    same = sum(ours.texts[prompt] == text for ours, theirs in pairs for prompt, text in theirs.texts.items())
    total = sum(len(theirs.texts) for _, theirs in pairs)
    if same == total:
        return f"The base is untouched: at T = 1 all {total:,} greedy answers, on both tasks, are the base's own."
    return f"The base is NOT reproduced: at T = 1 only {same:,} of {total:,} greedy answers are the base's own."


def _sampling(demo: Demo) -> str:
    def both(method: str, budget: int) -> str:
        greedy, sampled = (demo.share(at(method, budget, decoding)) for decoding in DECODINGS)
        return f"{NAMES[method]} {greedy:.3f} greedy and {sampled:.3f} sampled"

    curves = ", ".join(both(curve, 15) for curve in CURVES)
    return f"Sampling at temperature 1 (products): {both('base', 1)}; at T = 15 {curves}."


def _skills_kept(demo: Demo) -> str:
    curves = ", ".join(f"{NAMES[curve]} {demo.share(at(curve, 15, task=SUMS)):.3f}" for curve in CURVES)
    return (
        f"The other skill (sums, greedy): {demo.share(at('base', 1, task=SUMS)):.3f} for the base and "
        f"{demo.share(at('l2d', 1, task=SUMS)):.3f} for L2D at T = 1. Budgets above 1 use the diffusion path, which "
        f"was trained on products only: at T = 15 {curves}."
    )


def _gated(demo: Demo, compared: Comparisons) -> str:
    """What the gate changes on both tasks."""

    def solved(curve: str, task: str) -> str:
        gated, plain = at(GATED[curve], GATED_BUDGET, task=task), at(curve, GATED_BUDGET, task=task)
        return f"{demo.share(gated):.3f} ({compared[gated, plain]})"

    shares = ((NAMES[curve], *(solved(curve, task) for task in TASKS)) for curve in CURVES)
    parts = "; ".join(f"{name} {products} of the products and {sums} of the sums" for name, products, sums in shares)
    return (
        f"With a gate, skip_confidence={GATE:g}, which takes the base's answer for every token of which it is so sure, "
        f"the paths solve at T = {GATED_BUDGET}, greedily, and against no gate: {parts}."
    )


def _finetuning_cost(demo: Demo, compared: Comparisons) -> str:
    base = at("base", 1, task=SUMS)
    costs = (f"{NAMES[method]} {compared[at(method, 1, task=SUMS), base]}" for method in FINETUNED)
    return (
        f"What finetuning on products changes elsewhere (sums, greedy), against the base's {demo.share(base):.3f}: "
        f"{'; '.join(costs)}; and there is no T = 1 to go back to."
    )


def _once(curve: str, decoding: str = "greedy") -> tuple[Key, Key]:
    return at(curve, LARGEST, decoding), at(CONTROLS[curve], 2, decoding)


def _iterating(demo: Demo, compared: Comparisons, curve: str) -> str:
    """Whether the largest budget is better than one evaluation of the same path."""
    greedy, sampled = (_once(curve, decoding) for decoding in DECODINGS)
    better = compared[greedy].word == "better"
    shares = [
        f"{demo.share(control):.3f} and T = {LARGEST} {demo.share(end):.3f}" for end, control in (greedy, sampled)
    ]
    return (
        f"{'Iterating' if better else 'That iterating'} helps {NAMES[curve]}{'' if better else ' (greedy)'}: one "
        f"evaluation of the same path, at the time chosen on validation data (t = {demo.times[CONTROLS[curve]]:g}), "
        f"solves {shares[0]} of the products, greedily: {compared[greedy]}. Sampled at temperature 1: {shares[1]}: "
        f"{compared[sampled]}."
    )


def _noise_free(demo: Demo, compared: Comparisons) -> str:
    control = at("noise_free", 2)
    against = (f"{NAMES[curve]} {compared[at(curve, 15), control]}" for curve in CURVES)
    return (
        "That noise and a trajectory help: the same path without noise, evaluated once and trained for "
        f"{demo.relative_time('noise_free'):.1f} times L2D's processor time ({steps_of('noise_free'):,} steps), solves "
        f"{demo.share(control):.3f} of the products greedily and {demo.share(at('noise_free', 2, task=SUMS)):.3f} of "
        f"the sums. Against it at T = 15: {'; '.join(against)}."
    )


def _against_finetuning(demo: Demo, compared: Comparisons) -> str:
    parts = []
    for method in FINETUNED:
        against = ", ".join(f"{NAMES[curve]} {compared[at(curve, 15), at(method, 1)]}" for curve in CURVES)
        parts.append(
            f"{NAMES[method]} ({demo.relative_time(method):.1f} times L2D's processor time) solves "
            f"{demo.share(at(method, 1)):.3f}; against it at T = 15: {against}"
        )
    return f"That L2D learns the trained skill better than finetuning (products, greedy): {'. '.join(parts)}."


def _number_of_verdicts(compared: Comparisons) -> str:
    decided = sum(one.word in ("better", "worse") for one in compared.values())
    return (
        f"Anything about other trainings: one run with one seed, and intervals over problems only. Of {len(compared)} "
        f'comparisons {decided} are decided, at 5 % after Holm\'s correction for all of them; "not told apart" means '
        "that a difference was not found, not that there is none."
    )


# ---- tables ------------------------------------------------------------------------------------------------------


def table(demo: Demo) -> list[list[str]]:
    """Header and one line per setting: method, budget, and a score with its 95 % interval per task and decoding."""
    columns = [(decoding, task) for task in TASKS for decoding in DECODINGS]
    lines = [["method", "T", *(f"{task.removeprefix('l2d_demo_')}, {decoding}" for decoding, task in columns)]]
    for setting in SETTINGS:
        scores = (mean(demo.answers[setting.method, setting.budget, *column].right) for column in columns)
        cells = (shown(score, limits=(0.0, 1.0)) for score in scores)
        lines.append([title(demo, setting.method), str(setting.budget), *cells])
    return lines


def title(demo: Demo, method: str) -> str:
    """What table and figure call a method, with the time that was chosen for one evaluation."""
    return NAMES[method] + (f", t = {demo.times[method]:g}" if method in demo.times else "")


def terminal_table(demo: Demo) -> str:
    """The table in columns of equal width."""
    lines = table(demo)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(demo: Demo, sentences: dict[str, list[str]]) -> str:
    """`report.md`."""
    header, *lines = table(demo)
    counts = {task: len(demo.answers[at("base", 1, task=task)].right) for task in TASKS}
    problems = " and ".join(f"{count:,} for `{task}`" for task, count in counts.items())
    text = ["# Demo: arithmetic with a tiny base", ""]
    text += [
        f"Exact match on held-out problems ({problems}) with 95 % intervals over problems, from the answers that "
        "`lm_eval` recorded. T is the budget: evaluations per token, 1 for plain models; a control makes one "
        "evaluation beside the base's own. Sampled: temperature 1. Everything but the base was trained on products "
        "only.",
        "",
    ]
    text += ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]]
    text += ["", "![Accuracy against budget](accuracy.png)", ""]
    text += ["## What this shows", "", *(f"- {line}" for line in sentences["shown"]), ""]
    text += ["## What this does not show", "", *(f"- {line}" for line in sentences["not shown"]), ""]
    return "\n".join(text)
