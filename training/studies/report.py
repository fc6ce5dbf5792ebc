"""The study in words: tables, `study.md` and `results.json`.

* `results`: everything as plain values, with every outcome, so that all of it can be computed again
* `markdown`: tables of scores and of paired differences with their verdicts
* `findings`: sentences computed from the figures

Every score and difference has two intervals of 95 %: over problems, for these trainings, and over trainings, from the
seeds (Student's t). A verdict is one at 5 % after Holm's correction for all comparisons of the study.
"""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from l2d.statistics import Estimate, shown
from training.demo.runner import ROOT
from training.studies.plan import METHODS
from training.studies.scores import (
    DECODINGS,
    MARGIN,
    SETTINGS,
    Comparison,
    Key,
    TaskScores,
    compare,
    pack_scores,
    score,
)
from training.studies.tasks import TASKS

INTRODUCTION = f"""\
Exact match on held-out problems. The first interval (95 %) is over problems, for these trainings; the second one is
over trainings, a t interval of the values of the seeds, which follow it. A seed is that of base and training. T is the
budget: evaluations per token, midpoint solver; T = 1 is the base. One evaluation is at a time that validation problems
choose: the lowest loss among the times within one error of the highest exact match. Sampled: the probability that
sampling at temperature 1 gives the whole answer. Every training takes about the same processor time, for which methods
with cheaper steps take more of them.

Differences are paired by problem and by seed, over the seeds that both methods have; means of methods with different
seeds do not compare. Verdicts are at 5 % after Holm's correction for all of them together, separately over problems and
over trainings. "Equal within {MARGIN:g}" is said where two one-sided tests, at 5 % each and not corrected, exclude a
larger difference; "not told apart" says that the data do not decide.
"""


def circumstances(command: str) -> dict[str, str]:
    """Command, date, commit and machine."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True
    )
    commit = head.stdout.strip() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit + (" with changes" if changed.stdout.strip() else ""),
        "machine": f"{len(os.sched_getaffinity(0))} cores of {processor}, no accelerator",
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if os.path.exists(path) else []


def results(tasks: dict[str, TaskScores], about: dict[str, str]) -> dict[str, Any]:
    """Everything as plain values: statistics, and what they were computed from."""
    rows = [
        {"task": name, "method": method, "setting": setting, "decoding": decoding}
        | _both(score(task, (method, setting), decoding))
        for name, task in tasks.items()
        for method, setting in task.outcomes
        for decoding in DECODINGS
    ]
    compared = [
        {"task": one.task, "about": one.about, "first": one.first, "second": one.second, "decoding": one.decoding}
        | _both(one.difference)
        | {"adjusted": one.adjusted, "verdicts": one.verdicts()}
        for one in compare(tasks)
    ]
    measured = {name: pack_scores(task) for name, task in tasks.items()}
    return {**about, "rows": rows, "comparisons": compared, "measured": measured}


def _both(estimates: tuple[Estimate, Estimate]) -> dict[str, Any]:
    return {"problems": estimates[0].record(), "trainings": estimates[1].record()}


# ---- words -------------------------------------------------------------------------------------------------------


def markdown(tasks: dict[str, TaskScores], about: dict[str, str]) -> str:
    """`study.md`."""
    comparisons = compare(tasks)
    text = ["# Does more compute help? A study", ""]
    text += [f"`{about['command']}`, {about['date']}, commit {about['commit']}, on {about['machine']}.", ""]
    text += [INTRODUCTION, "![accuracy against budget](study.png)", ""]
    text += ["## What the figures say", "", *(f"- {line}" for line in findings(tasks, comparisons)), ""]
    for name, task in tasks.items():
        title = TASKS[name].title
        text += [f"## {title[0].upper()}{title[1:]}", ""]
        steps = joined([f"{steps:,}" for steps in task.base_steps.values()])
        text += [f"{len(task.depths):,} problems; the bases were trained for {steps} steps.", ""]
        text += table(["method", "setting", *DECODINGS], _score_lines(task))
        if len(set(task.depths)) > 1:
            depths = sorted(set(task.depths))
            text += ["Greedy, by depth:", "", *table(["method", "setting", *map(str, depths)], _depth_lines(task))]
        own = [one for one in comparisons if one.task == name]
        if own:
            text += ["Differences:", ""]
            text += table(
                ["first against second", "decoding", "difference", "problems", "trainings (number)"], _lines_of(own)
            )
    return "\n".join(text)


def findings(tasks: dict[str, TaskScores], comparisons: list[Comparison]) -> list[str]:
    """Sentences computed from the figures: training time, verdicts and their number."""
    sentences = []
    for name, task in tasks.items():
        if "plain" in task.step_seconds:
            times = (
                f"{title(method)} {task.relative_time(name, method):.1f} ({METHODS[method].steps(name):,} steps)"
                for method in task.step_seconds
            )
            sentences.append(
                f"Processor time of a training relative to plain L2D's, the median time of a step times the number of "
                f"steps ({TASKS[name].title}): {'; '.join(times)}."
            )
    for number, kind in enumerate(("over problems, for these trainings", "over trainings")):
        decided = [one for one in comparisons if one.verdicts()[number] in ("better", "worse")]
        equal = [one for one in comparisons if one.verdicts()[number].startswith("equal")]
        sentences.append(
            f"{kind[0].upper()}{kind[1:]}, {len(decided)} of {len(comparisons)} comparisons are decided at 5 % after "
            f"Holm's correction, and {len(equal)} are equal within {MARGIN:g}."
        )
    for one in comparisons:
        if one.decoding == DECODINGS[0] and one.verdicts()[1] in ("better", "worse"):
            sentences.append(
                f"Decided over trainings, too ({TASKS[one.task].title}, greedy): {one.about}: "
                f"{shown(one.difference.trainings, signed=True)}, {one.verdicts()[1]}."
            )
    return sentences


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, with an empty one after it."""
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]] + [""]


def joined(words: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def title(method: str) -> str:
    """What tables and figures call a method."""
    return METHODS[method].title if method in METHODS else "base"


def setting_title(task: TaskScores, key: Key) -> str:
    """What tables call a setting, with the times of a single evaluation."""
    method, setting = key
    if setting == "single" and method in task.times:
        times = sorted(set(task.times[method].values()))
        return f"{SETTINGS[setting]}, t = {' / '.join(f'{time:g}' for time in times)}"
    return SETTINGS[setting]


def _score_lines(task: TaskScores) -> list[list[str]]:
    lines = []
    for key, decodings in task.outcomes.items():
        cells = []
        for decoding in DECODINGS:
            seeds = " / ".join(f"{values.mean():.3f}" for values in decodings[decoding].values())
            cells.append(f"{_intervals(*score(task, key, decoding))} ({seeds})")
        lines.append([title(key[0]), setting_title(task, key), *cells])
    return lines


def _intervals(problems: Estimate, trainings: Estimate, signed: bool = False) -> str:
    """The value with both intervals; one that is not known is left out, and none leaves the range of the value."""
    limits = (-1.0 if signed else 0.0, 1.0)
    first, second = (shown(one, signed=signed, limits=limits) for one in (problems, trainings))
    return first + second.removeprefix(second.split(" ")[0])


def _depth_lines(task: TaskScores) -> list[list[str]]:
    lines = []
    for key, decodings in task.outcomes.items():
        means, depths = np.mean(list(decodings["greedy"].values()), axis=0), np.array(task.depths)
        by_depth = (f"{means[depths == depth].mean():.2f}" for depth in sorted(set(task.depths)))
        lines.append([title(key[0]), setting_title(task, key), *by_depth])
    return lines


def _lines_of(comparisons: list[Comparison]) -> list[list[str]]:
    lines = []
    for one in comparisons:
        problems, trainings = one.verdicts()
        difference, number = _intervals(*one.difference, signed=True), one.difference.trainings.units
        lines.append([one.about, one.decoding, difference, problems, f"{trainings} ({number})"])
    return lines
