"""What the study found: means over seeds with standard errors, paired comparisons, and `study.md`.

* `read_scores`: per problem, from the files that `evaluate` left
* `Score`: a method at a setting; its mean over the seeds, and over the problems of each depth
* `COMPARISONS`: the differences that the study is about, with a verdict at two standard errors
* `results`, `markdown`: everything as plain values, and for people

Standard errors are over problems: of every problem the mean over the seeds is one observation, so that they also hold
for seeds that are tested on the same problems. Differences are paired by problem. What another pair of seeds would
give is not in them: the seeds are therefore shown one by one, too.
"""

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path
from typing import Any

from training.compare_budgets import BUDGETS
from training.demo.runner import ROOT
from training.studies.evaluate import VOTES
from training.studies.plan import METHODS, SEEDS, Run, result_file, timing_file
from training.studies.tasks import TASKS

DECODINGS = ("greedy", "sampled")
SETTINGS = {
    "single": "one evaluation",
    "votes": f"one evaluation, {VOTES} votes",
    **{f"T{budget}": f"T = {budget}" for budget in BUDGETS},
    "plain": "",
}
# (what it is about, first method and setting, second method and setting): first minus second
COMPARISONS = (
    ("corruption, at T = 15", ("corrupted", "T15"), ("plain", "T15")),
    ("corruption, at one evaluation", ("corrupted", "single"), ("plain", "single")),
    ("rollout, at T = 15", ("rollout", "T15"), ("plain", "T15")),
    ("carried state, at T = 7", ("carried", "T7"), ("rollout", "T7")),
    ("more evaluations: plain, T = 31 against one", ("plain", "T31"), ("plain", "single")),
    ("more evaluations: corrupted, T = 31 against one", ("corrupted", "T31"), ("corrupted", "single")),
    ("more evaluations: rollout, T = 7 against one", ("rollout", "T7"), ("rollout", "single")),
    ("more evaluations: carried, T = 7 against one", ("carried", "T7"), ("carried", "single")),
    ("beyond the unroll: carried, T = 31 against 7", ("carried", "T31"), ("carried", "T7")),
    ("votes at one evaluation: plain", ("plain", "votes"), ("plain", "single")),
    (
        "corrupted at T = 15 against a noise-free path of twice the steps",
        ("corrupted", "T15"),
        ("noise_free_long", "single"),
    ),
    ("carried at T = 7 against a noise-free path", ("carried", "T7"), ("noise_free", "single")),
    ("carried at T = 7 against a noise-free path of twice the steps", ("carried", "T7"), ("noise_free_long", "single")),
    ("carried at T = 7 against LoRA finetuning", ("carried", "T7"), ("lora", "plain")),
    ("carried at T = 7 against full finetuning", ("carried", "T7"), ("full", "plain")),
    ("three times the steps: carried, T = 7 against one", ("carried_long", "T7"), ("carried_long", "single")),
    ("three times the steps: carried at T = 7 against full finetuning", ("carried_long", "T7"), ("full_long", "plain")),
)

Problems = dict[str, list[list[float]]]
"""Decoding -> per seed, a number for every problem."""
Key = tuple[str, str]
"""Method and setting."""


@dataclass(frozen=True)
class Score:
    """Exact match of one method at one setting.

    Attributes:
        value, stderr: over the problems, of the mean over the seeds.
        seeds: the value of each seed.
        depths: depth -> value over the problems of that depth.
    """

    value: float
    stderr: float
    seeds: list[float]
    depths: dict[int, float]


@dataclass(frozen=True)
class TaskScores:
    """Everything that was measured on one task.

    Attributes:
        problems: per method and setting, decoding, seed and problem.
        depths: of the problems.
        times: method -> per seed, the time of its single evaluation.
        seconds: method -> processor time of its training.
        base_steps: of each seed's base.
    """

    problems: dict[Key, Problems]
    depths: list[int]
    times: dict[str, list[float]]
    seconds: dict[str, float]
    base_steps: list[int]


# ---- reading -----------------------------------------------------------------------------------------------------


def read_scores(out: Path, task: str) -> TaskScores | None:
    """What the folder holds of a task, methods of which every seed is there; `None` before its bases are evaluated."""
    problems: dict[Key, Problems] = {}
    times, depths = {}, []
    for method in ("base", *METHODS):
        names = [Run(task, method, seed).name for seed in SEEDS]
        files = [result_file(out, name) for name in names]
        if not all(file.exists() for file in files):
            continue
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        depths = found[0]["depths"]
        for setting in found[0]["scores"]:
            per_seed = [one["scores"][setting] for one in found]
            problems[method, setting] = {decoding: [one[decoding] for one in per_seed] for decoding in DECODINGS}
        if found[0]["times"]:
            times[method] = [one["best_time"] for one in found]
    if ("base", "plain") not in problems:
        return None
    bases = [out / "runs" / Run(task, "base", seed).name / "pretraining.json" for seed in SEEDS]
    steps = [json.loads(base.read_text(encoding="utf-8"))["steps"] for base in bases]
    timed = timing_file(out, task)
    per_step = json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else {}
    seconds = {name: value * METHODS[name].length * TASKS[task].steps for name, value in per_step.items()}
    return TaskScores(problems, depths, times, seconds, steps)


def score(task: TaskScores, key: Key, decoding: str) -> Score:
    """Means and standard error of a method at a setting."""
    seeds = task.problems[key][decoding]
    means = _over_seeds(seeds)
    depths = {}
    for depth in sorted(set(task.depths)):
        chosen = [value for value, own in zip(means, task.depths, strict=True) if own == depth]
        depths[depth] = sum(chosen) / len(chosen)
    value, stderr = mean_and_error(means)
    return Score(value, stderr, [sum(seed) / len(seed) for seed in seeds], depths)


def difference(task: TaskScores, first: Key, second: Key, decoding: str) -> tuple[float, float]:
    """First minus second, and its standard error, paired by problem."""
    one, other = (_over_seeds(task.problems[key][decoding]) for key in (first, second))
    return mean_and_error([a - b for a, b in zip(one, other, strict=True)])


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = sum(values) / len(values)
    return mean, sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _over_seeds(seeds: list[list[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*seeds, strict=True)]


def verdict(value: float, error: float) -> str:
    """What a difference says at two standard errors."""
    return "better" if value > 2 * error else "worse" if value < -2 * error else "no difference"


# ---- writing -----------------------------------------------------------------------------------------------------


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
    """Everything as plain values, rounded to what the standard errors allow."""
    content: dict[str, Any] = {**about, "tasks": {}}
    for name, task in tasks.items():
        rows = []
        for method, setting in task.problems:
            for decoding in DECODINGS:
                found = score(task, (method, setting), decoding)
                row = {"method": method, "setting": setting, "decoding": decoding, "value": round(found.value, 4)}
                row |= {"stderr": round(found.stderr, 4), "seeds": [round(value, 4) for value in found.seeds]}
                if len(found.depths) > 1:
                    row["depths"] = {depth: round(value, 4) for depth, value in found.depths.items()}
                rows.append(row)
        compared = []
        for text, first, second in _measured_comparisons(task):
            for decoding in DECODINGS:
                value, error = difference(task, first, second, decoding)
                compared.append(
                    {"about": text, "first": first, "second": second, "decoding": decoding}
                    | {"difference": round(value, 4), "stderr": round(error, 4), "verdict": verdict(value, error)}
                )
        own = {"problems": len(task.depths), "base_steps": task.base_steps, "single_times": task.times}
        content["tasks"][name] = {
            **own,
            "training_seconds": {name: round(value, 1) for name, value in task.seconds.items()},
            "rows": rows,
            "comparisons": compared,
        }
    return content


def _measured_comparisons(task: TaskScores) -> list[tuple[str, Key, Key]]:
    return [one for one in COMPARISONS if one[1] in task.problems and one[2] in task.problems]


def markdown(tasks: dict[str, TaskScores], about: dict[str, str]) -> str:
    """`study.md`: tables; what they mean is for a reader to say."""
    text = ["# Does more compute help? A study on two tasks", ""]
    text += [f"`{about['command']}`, {about['date']}, commit {about['commit']}, on {about['machine']}.", ""]
    text += [
        "Exact match on held-out problems: mean over two seeds of base and training ± standard error over problems, "
        "and in parentheses each seed. T is the budget: evaluations per token, midpoint solver; T = 1 is the base. One "
        "evaluation is at the time that did best on validation problems. Sampled: the probability that sampling at "
        "temperature 1 gives the whole answer. Training time is processor time, relative to plain L2D.",
        "",
        "![accuracy against budget](study.png)",
        "",
    ]
    for name, task in tasks.items():
        text += [f"## {TASKS[name].title[0].upper()}{TASKS[name].title[1:]}", ""]
        text += [f"{len(task.depths):,} problems; bases trained for {_list(task.base_steps)} steps.", ""]
        text += _table(["method", "setting", "training time", *DECODINGS], _score_lines(task))
        if len(set(task.depths)) > 1:
            depths = sorted(set(task.depths))
            text += ["Greedy, by depth:", ""]
            text += _table(["method", "setting", *map(str, depths)], _depth_lines(task))
        text += ["Differences, paired by problem; the verdict is at two standard errors.", ""]
        text += _table(["about", "greedy", "", "sampled", ""], _comparison_lines(task))
    return "\n".join(text)


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]] + [""]


def _list(values: list[Any]) -> str:
    return " and ".join(f"{value:,}" for value in values)


def title(method: str) -> str:
    """What tables and figures call a method."""
    return METHODS[method].title if method in METHODS else "base"


def setting_title(task: TaskScores, key: Key) -> str:
    """What tables call a setting, with the times of a single evaluation."""
    method, setting = key
    if setting == "single" and method in task.times:
        times = sorted(set(task.times[method]))
        return f"{SETTINGS[setting]}, t = {' / '.join(f'{time:g}' for time in times)}"
    return SETTINGS[setting]


def _score_lines(task: TaskScores) -> list[list[str]]:
    lines = []
    for key in task.problems:
        method = key[0]
        spent = f"{relative_time(task, method):.2f}" if method in task.seconds and "plain" in task.seconds else ""
        cells = []
        for decoding in DECODINGS:
            found = score(task, key, decoding)
            seeds = " / ".join(f"{value:.3f}" for value in found.seeds)
            cells.append(f"{found.value:.3f} ± {found.stderr:.3f} ({seeds})")
        lines.append([title(method), setting_title(task, key), spent, *cells])
    return lines


def relative_time(task: TaskScores, method: str) -> float:
    """Processor time of a method's training, divided by plain L2D's."""
    return task.seconds[method] / task.seconds["plain"]


def _depth_lines(task: TaskScores) -> list[list[str]]:
    lines = []
    for key in task.problems:
        depths = score(task, key, "greedy").depths
        lines.append([title(key[0]), setting_title(task, key), *(f"{value:.2f}" for value in depths.values())])
    return lines


def _comparison_lines(task: TaskScores) -> list[list[str]]:
    lines = []
    for text, first, second in _measured_comparisons(task):
        cells = []
        for decoding in DECODINGS:
            value, error = difference(task, first, second, decoding)
            cells += [f"{value:+.3f} ± {error:.3f}", verdict(value, error)]
        lines.append([text, *cells])
    return lines
