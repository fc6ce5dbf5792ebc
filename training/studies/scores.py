"""What the study measured: outcomes per problem and seed, and the statistics that follow from them.

* `TaskScores`: everything that was measured on one task; `read_scores` reads it from the folder of a run,
  `pack_scores` and `unpack_scores` turn it into plain values and back, so that `results.json` is complete in itself
* `score`, `difference`: estimates over problems, for these trainings, and over trainings, from the seeds
* `COMPARISONS`, `compare`: the differences that the study is about, with p-values corrected for their number

Differences are paired: by problem, and by seed, since methods of one seed share their base. Every statistic is made
by `l2d.statistics`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2d.statistics import Estimate, Trainings, holm, over_trainings, verdict
from training.studies.evaluate import BUDGETS
from training.studies.packing import pack, unpack
from training.studies.plan import METHODS, Run, base_seeds, result_file, timing_file

DECODINGS = ("greedy", "sampled")
MARGIN = 0.02
"""The largest difference in exact match that does not matter, for claims of equality."""

Key = tuple[str, str]
"""Method and setting."""
SETTINGS = {"single": "one evaluation", **{f"T{budget}": f"T = {budget}" for budget in BUDGETS}, "plain": ""}
# (what it is about, first method and setting, second method and setting): first minus second
COMPARISONS: tuple[tuple[str, Key, Key], ...] = (
    ("corruption, at T = 15", ("corrupted", "T15"), ("plain", "T15")),
    ("corruption, at one evaluation", ("corrupted", "single"), ("plain", "single")),
    ("more evaluations: plain, T = 31 against one", ("plain", "T31"), ("plain", "single")),
    ("more evaluations: corrupted, T = 31 against one", ("corrupted", "T31"), ("corrupted", "single")),
    ("more evaluations: carried, T = 7 against one", ("carried", "T7"), ("carried", "single")),
    ("beyond the unroll: carried, T = 31 against 7", ("carried", "T31"), ("carried", "T7")),
    ("corrupted at T = 15 against a noise-free path", ("corrupted", "T15"), ("noise_free", "single")),
    ("carried at T = 7 against a noise-free path", ("carried", "T7"), ("noise_free", "single")),
    ("carried at T = 7 against LoRA finetuning", ("carried", "T7"), ("lora", "plain")),
    ("warm start: L2D, at T = 15", ("warm", "T15"), ("plain", "T15")),
    ("warm start: corrupted, at T = 15", ("warm_corrupted", "T15"), ("corrupted", "T15")),
    ("warm start: carried, at T = 7", ("warm_carried", "T7"), ("carried", "T7")),
    ("warm start: noise-free path", ("warm_noise_free", "single"), ("noise_free", "single")),
    ("more evaluations: warm L2D, T = 31 against one", ("warm", "T31"), ("warm", "single")),
    ("more evaluations: warm carried, T = 7 against one", ("warm_carried", "T7"), ("warm_carried", "single")),
    ("warm carried at T = 7 against LoRA finetuning", ("warm_carried", "T7"), ("lora", "plain")),
    ("own keys and values: warm L2D, at T = 15", ("warm_own", "T15"), ("warm", "T15")),
    ("own keys and values: warm carried, at T = 7", ("warm_carried_own", "T7"), ("warm_carried", "T7")),
    ("more evaluations: own, T = 31 against one", ("warm_own", "T31"), ("warm_own", "single")),
    ("more evaluations: carried, own, T = 7 against one", ("warm_carried_own", "T7"), ("warm_carried_own", "single")),
    ("carried, own at T = 7 against a noise-free path", ("warm_carried_own", "T7"), ("warm_noise_free_own", "single")),
    ("carried, own at T = 7 against LoRA finetuning", ("warm_carried_own", "T7"), ("lora", "plain")),
)


@dataclass(frozen=True)
class TaskScores:
    """Everything that was measured on one task.

    Attributes:
        outcomes: per method and setting, decoding and seed, a number in [0, 1] for every problem (N,).
        depths: of the problems.
        times: method -> seed -> time of its single evaluation.
        step_seconds: method -> processor time of a training step.
        base_steps: seed -> steps that its base was trained for.
    """

    outcomes: dict[Key, dict[str, dict[int, np.ndarray]]]
    depths: list[int]
    times: dict[str, dict[int, float]]
    step_seconds: dict[str, float]
    base_steps: dict[int, int]

    def relative_time(self, task: str, method: str) -> float:
        """Processor time of a method's training, divided by plain L2D's."""
        whole = {name: seconds * METHODS[name].steps(task) for name, seconds in self.step_seconds.items()}
        return whole[method] / whole["plain"]


# ---- reading -----------------------------------------------------------------------------------------------------


def read_scores(out: Path, task: str) -> TaskScores | None:
    """What the folder holds of a task; `None` before its first base was measured."""
    outcomes: dict[Key, dict[str, dict[int, np.ndarray]]] = {}
    times: dict[str, dict[int, float]] = {}
    depths, base_steps = [], {}
    for method in ("base", *METHODS):
        for seed in base_seeds(task) if method == "base" else METHODS[method].seeds(task):
            name = Run(task, method, seed).name
            if not result_file(out, name).exists():
                continue
            content = json.loads(result_file(out, name).read_text(encoding="utf-8"))
            depths = content["depths"]
            for setting, decodings in content["scores"].items():
                for decoding in DECODINGS:
                    by_seed = outcomes.setdefault((method, setting), {}).setdefault(decoding, {})
                    by_seed[seed] = _unpack(_pack(decodings[decoding]))  # as the packed values will be read
            if content["best_time"] is not None:
                times.setdefault(method, {})[seed] = content["best_time"]
            if method == "base":
                pretraining = (out / "runs" / name / "pretraining.json").read_text(encoding="utf-8")
                base_steps[seed] = json.loads(pretraining)["steps"]
    if not outcomes:
        return None
    timed = timing_file(out, task)
    seconds = json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else {}
    return TaskScores(outcomes, depths, times, seconds, base_steps)


def pack_scores(task: TaskScores) -> dict[str, Any]:
    """Plain values of everything; outcomes are bytes (0 to 255 for 0 to 1), compressed, as text."""
    packed = {
        " ".join((*key, decoding, str(seed))): _pack(values)
        for key, decodings in task.outcomes.items()
        for decoding, by_seed in decodings.items()
        for seed, values in by_seed.items()
    }
    return {**vars(task), "outcomes": packed}


def unpack_scores(content: dict[str, Any]) -> TaskScores:
    """What `pack_scores` made, after a way through JSON."""
    outcomes: dict[Key, dict[str, dict[int, np.ndarray]]] = {}
    for name, text in content["outcomes"].items():
        method, setting, decoding, seed = name.split()
        outcomes.setdefault((method, setting), {}).setdefault(decoding, {})[int(seed)] = _unpack(text)
    times = {name: {int(seed): time for seed, time in own.items()} for name, own in content["times"].items()}
    steps = {int(seed): steps for seed, steps in content["base_steps"].items()}
    return TaskScores(outcomes, content["depths"], times, content["step_seconds"], steps)


def _pack(values: Any) -> str:
    return pack(np.round(np.asarray(values, dtype=np.float64) * 255).astype(np.uint8))


def _unpack(text: str) -> np.ndarray:
    return unpack(text, np.uint8) / 255


# ---- statistics --------------------------------------------------------------------------------------------------


def score(task: TaskScores, key: Key, decoding: str) -> Trainings:
    """Exact match of a method at a setting, over all its seeds."""
    return over_trainings(list(task.outcomes[key][decoding].values()))


def difference(task: TaskScores, first: Key, second: Key, decoding: str) -> Trainings:
    """First minus second, over the seeds that both have."""
    one, other = (task.outcomes[key][decoding] for key in (first, second))
    return over_trainings([one[seed] - other[seed] for seed in one if seed in other], bounds=(-1.0, 1.0))


@dataclass(frozen=True)
class Comparison:
    """One difference of `COMPARISONS` on one task; `adjusted`: its p-values after Holm's correction.

    Both pairs are of the problems, for these trainings, and of the trainings.
    """

    task: str
    about: str
    first: Key
    second: Key
    decoding: str
    difference: Trainings
    adjusted: tuple[float | None, float | None]

    def verdicts(self) -> tuple[str, str]:
        """In words, over problems and over trainings."""
        problems, trainings = self.difference
        return corrected_verdict(problems, self.adjusted[0]), corrected_verdict(trainings, self.adjusted[1])


def corrected_verdict(estimate: Estimate, adjusted: float | None) -> str:
    """Better or worse by the corrected p-value; equal by two one-sided tests; else "not told apart"."""
    return "one training" if estimate.units < 2 else verdict(estimate, MARGIN, corrected=adjusted)


def compare(tasks: dict[str, TaskScores]) -> list[Comparison]:
    """All comparisons that were measured, of all tasks and decodings; they are corrected together."""
    measured = [
        (name, text, first, second, decoding, difference(task, first, second, decoding))
        for name, task in tasks.items()
        for text, first, second in COMPARISONS
        if first in task.outcomes and second in task.outcomes and _common_seeds(task, first, second)
        for decoding in DECODINGS
    ]
    adjusted = zip(
        holm([one[-1].problems.p_value for one in measured]),
        holm([one[-1].trainings.p_value for one in measured]),
        strict=True,
    )
    return [Comparison(*one, own) for one, own in zip(measured, adjusted, strict=True)]


def _common_seeds(task: TaskScores, first: Key, second: Key) -> bool:
    one, other = (task.outcomes[key][DECODINGS[0]] for key in (first, second))
    return bool(one.keys() & other.keys())
