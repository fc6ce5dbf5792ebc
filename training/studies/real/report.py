"""The study of a real model in words: `real.md` and `results.json`.

* `results`: everything as plain values, with every outcome, so that all of it can be computed again
* `markdown`: tables of scores with their cost, of trainings, and of paired differences with their verdicts
"""

from typing import Any

from l2d.statistics import shown
from training.studies.real.elsewhere import ASKED
from training.studies.real.plan import BATCH, EQUAL_TIME, METHODS
from training.studies.real.scores import (
    EQUAL,
    METRICS,
    SETTINGS,
    Comparison,
    Key,
    Study,
    answered,
    compare,
    pack_study,
    score,
    setting_of,
    title,
)
from training.studies.report import table

INTRODUCTION = """\
Worked solutions of GSM8K's test problems, scored by teacher forcing: whether each token is the most likely one after
the true tokens before it, its loss in nats, and whether this holds for all tokens of a solution, which is when greedy
decoding gives that solution word for word. Brackets are 95 % intervals over problems, of which the tokens are one
cluster. T is the budget: evaluations per token, midpoint solver; T = 1 is the base, whatever the path. One evaluation
is at the time that held-out training rows choose. "Base from p" is `skip_confidence`: the base's answer wherever its
most likely token is at least so likely; "one evaluation from p" is `early_confidence`: the answer of that evaluation.

Cost: evaluations and passes of the path that a scored token took, beside the model's own step, with speculation, which
changes no result; and the processor time of a decoded token, prompt and all, divided by that of the base's own greedy
decoding, on one thread.
"""
TRAININGS = """\
All trainings see the same rows in the same order, so the same supervised tokens; learning rates are constant after a
warm-up. Seconds are processor time of a step of {batch} examples, the median of a few in turns in one process. Losses
of L2D are at random times and compare within L2D only.
"""
EQUALLY_LONG = """\
Every method gets the processor time of the fastest training: what is measured is the checkpoint nearest to it, of the
same trainings.
"""
ELSEWHERE = """\
Answers by `lm_eval`, without examples, in the training wording: GSM8K's final number, greedy and sampled at temperature
1, and MMLU's letter by log-probability. The loss of HumanEval's solutions is per token, in nats. Numbers of problems
are in brackets.
"""
LIMITS = """\
- Other trainings: one seed, one base and one data set, and far fewer tokens than the paper trains on.
- The best of each method: learning rates were not searched here ({rates}).
- What a model writes by itself: here it reads the true solution up to the token that it predicts.
- Small differences between L2D and LoRA finetuning: deltas of the latter are merged into weights of the base's dtype.
"""
DIFFERENCES = """\
First minus second, paired by problem. Verdicts are at 5 % after Holm's correction for all of them together; "not told
apart" says that the data do not decide. All of it is one training of each method: other seeds may differ by more than
these intervals.
"""


def results(study: Study, about: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain values: statistics, and what they were computed from."""
    rows = [
        {"method": key[0], "setting": key[1], **outcome.cost}
        | {metric: score(study, key, metric).record() for metric in METRICS}
        for key, outcome in study.outcomes.items()
    ]
    compared = [{**vars(one), "difference": one.difference.record(), "verdict": one.verdict} for one in compare(study)]
    return {**about, "rows": rows, "comparisons": compared, "measured": pack_study(study)}


# ---- words -------------------------------------------------------------------------------------------------------


def markdown(study: Study, about: dict[str, Any]) -> str:
    """`real.md`."""
    settings = about["settings"]
    text = ["# What does L2D do to a real model?", ""]
    text += [f"`{about['command']}`, {about['date']}, commit {about['commit']}, on {about['machine']}.", ""]
    text += [INTRODUCTION, "![scores against budget](real.png)", ""]
    text += [
        f"Base: `{about['base']}`. {len(study.targets):,} problems with {int(study.targets.sum()):,} tokens. Trainings "
        f"of {settings['targets']:,} supervised tokens, in {'bfloat16' if settings['bf16'] else 'float32'}.",
        "",
    ]
    header = ["method", "setting", *METRICS.values(), "evaluations", "passes", "time"]
    text += table(header, [_line(study, key) for key in study.outcomes if key[0] not in EQUAL.values()])
    text += ["## The trainings", "", TRAININGS.format(batch=BATCH), *table(*_trainings(study))]
    equal = [key for key in study.outcomes if key[0] in EQUAL.values()]
    if equal:
        text += ["## Equal processor time", "", EQUALLY_LONG]
        lines = [[*_line(study, key)[:-3], f"{study.checkpoints[key[0]]:,}", _minutes(study, key[0])] for key in equal]
        text += table([*header[:-3], "steps", "minutes"], lines)
    if study.elsewhere:
        text += ["## Elsewhere", "", ELSEWHERE, *table(*_elsewhere(study))]
    comparisons = compare(study)
    if comparisons:
        text += ["## Differences", "", DIFFERENCES]
        text += table(
            ["first against second", "of", "difference", "verdict"], [_difference(one) for one in comparisons]
        )
    text += ["## What this does not show", "", LIMITS.format(rates=_rates())]
    return "\n".join(text)


def setting_title(study: Study, key: Key) -> str:
    """What tables call a setting, with the time of a single evaluation."""
    method, setting = key
    if setting == "single" and method in study.times:
        return f"{SETTINGS[setting]}, t = {study.times[method]:g}"
    return SETTINGS[setting]


def _line(study: Study, key: Key) -> list[str]:
    limits = {"accuracy": (0.0, 1.0), "loss": None, "exact": (0.0, 1.0)}
    scores = (shown(score(study, key, metric), limits=limits[metric]) for metric in METRICS)
    cost = study.outcomes[key].cost
    costs = (f"{cost['evaluations']:.2f}", f"{cost['passes']:.2f}", f"{cost['plain_steps']:.2f}")
    return [title(key[0]), setting_title(study, key), *scores, *costs]


def _trainings(study: Study) -> tuple[list[str], list[list[str]]]:
    header = ["method", "steps", "seconds a step", "minutes", "loss, first tenth", "loss, last tenth"]
    lines = []
    for method, losses in study.losses.items():
        tenth = max(1, len(losses) // 10)
        ends = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
        seconds = f"{study.seconds[method]:.1f}" if method in study.seconds else ""
        lines.append([title(method), f"{len(losses):,}", seconds, _minutes(study, method), *(f"{x:.3f}" for x in ends)])
    return header, lines


def _elsewhere(study: Study) -> tuple[list[str], list[list[str]]]:
    lines = []
    for method in ("base", *METHODS):
        cells = [
            shown(answered(study, asked, method)) if method in found else "" for asked, found in study.elsewhere.items()
        ]
        if any(cells):
            lines.append([title(method), SETTINGS[setting_of(method)], *cells])
    counts = [f"{ASKED[asked]} ({len(found['base']['values']):,})" for asked, found in study.elsewhere.items()]
    return ["method", "setting", *counts], lines


def _rates() -> str:
    """Learning rates of all methods, those that are equal together."""
    by_rate: dict[float, list[str]] = {}
    for method in METHODS.values():
        by_rate.setdefault(method.options["learning_rate"], []).append(method.title)
    return "; ".join(f"{rate:g}: {', '.join(titles)}" for rate, titles in by_rate.items())


def _minutes(study: Study, method: str) -> str:
    """Processor time of what was trained."""
    plain = method.removesuffix(EQUAL_TIME)
    if plain not in study.seconds:
        return ""
    return f"{study.seconds[plain] * study.checkpoints[method] / 60:.1f}"


def _difference(one: Comparison) -> list[str]:
    return [one.about, {**METRICS, **ASKED}[one.metric], shown(one.difference, digits=4, signed=True), one.verdict]
