"""What the study of a real model measured: outcomes per problem, and the statistics that follow from them.

* `Study`: everything; `read_study` reads it from the folder of a run, `pack_study` and `unpack_study` turn it into
  plain values and back, so that `results.json` is complete in itself
* `METRICS`, `score`: token accuracy, loss, and exact match of whole solutions
* `COMPARISONS`, `compare`: the differences that the study is about, with p-values corrected for their number

Every error is over problems: the tokens of one problem are one cluster. Differences are paired by problem.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from l2d.statistics import Estimate, holm, mean, paired, ratio, verdict
from training.studies.packing import pack, unpack
from training.studies.real.elsewhere import ASKED, BUDGET, LOSSES, Limits, read_answers
from training.studies.real.equal import saved_steps
from training.studies.real.evaluate import (
    BUDGETS,
    EARLY_END,
    GATED_BUDGET,
    early_gate,
    ended_setting,
    gated_setting,
    whole_setting,
)
from training.studies.real.plan import (
    EQUAL_TIME,
    METHODS,
    at_equal_time,
    losses_file,
    run_folder,
    score_file,
    timing_file,
)

Key = tuple[str, str]
"""Method, and setting: `T3` and so on, `single`, or `plain`."""
GATES = sorted({p for method in METHODS.values() for p in method.gates})
EARLY_GATES = [
    (setting, p)
    for setting in (whole_setting(), ended_setting())
    for p in sorted({p for method in METHODS.values() for p in method.early_gates})
]
_TRAJECTORIES = {
    **{f"T{budget}": f"T = {budget}" for budget in BUDGETS},
    ended_setting(): f"T = {GATED_BUDGET}, ending at t = {EARLY_END:g}",
}
SETTINGS = {
    **_TRAJECTORIES,
    **{gated_setting(p): f"T = {GATED_BUDGET}, base from p = {p:g}" for p in GATES},
    **{early_gate(at, p): f"{_TRAJECTORIES[at]}, one evaluation from p = {p:g}" for at, p in EARLY_GATES},
    "single": "one evaluation",
    "plain": "",
}
METRICS = {"accuracy": "token accuracy", "loss": "loss", "exact": "whole solutions"}
EQUAL = {name: at_equal_time(name) for name in METHODS}
# (what it is about, first method and setting, second method and setting): first minus second
COMPARISONS: tuple[tuple[str, Key, Key], ...] = (
    ("L2D, warm start, at T = 15 against the base", ("warm", "T15"), ("base", "plain")),
    ("L2D as published at T = 15 against the base", ("plain", "T15"), ("base", "plain")),
    ("warm start, at T = 15", ("warm", "T15"), ("plain", "T15")),
    ("more evaluations: warm start, T = 31 against T = 3", ("warm", "T31"), ("warm", "T3")),
    ("more evaluations: warm start, T = 15 against one", ("warm", "T15"), ("warm", "single")),
    ("ending at t = 0.75: warm start, at T = 15", ("warm", ended_setting()), ("warm", "T15")),
    ("ending at t = 0.75: warm start, T = 15 against one", ("warm", ended_setting()), ("warm", "single")),
    *(
        (f"base from p = {p:g}: warm start, at T = 15", ("warm", gated_setting(p)), ("warm", whole_setting()))
        for p in GATES
    ),
    *(
        (f"one evaluation from p = {p:g}: warm start, {_TRAJECTORIES[at]}", ("warm", early_gate(at, p)), ("warm", at))
        for at, p in EARLY_GATES
    ),
    ("corruption, warm start, at T = 15", ("warm_corrupted", "T15"), ("warm", "T15")),
    ("own keys and values, warm start, at T = 15", ("warm_own", "T15"), ("warm", "T15")),
    ("own keys and values at T = 15 against LoRA, all layers", ("warm_own", "T15"), ("lora_all", "plain")),
    ("warm start at T = 15 against a noise-free path", ("warm", "T15"), ("warm_noise_free", "single")),
    ("warm start at T = 15 against LoRA, all layers", ("warm", "T15"), ("lora_all", "plain")),
    ("warm start at T = 15 against LoRA, q and v", ("warm", "T15"), ("lora_qv", "plain")),
    ("warm start at T = 15 against full finetuning", ("warm", "T15"), ("full", "plain")),
    ("noise-free path against LoRA, all layers", ("warm_noise_free", "single"), ("lora_all", "plain")),
    ("equal time: warm start at T = 15 against LoRA, all", (EQUAL["warm"], "T15"), (EQUAL["lora_all"], "plain")),
    (
        "equal time: noise-free path against LoRA, all",
        (EQUAL["warm_noise_free"], "single"),
        (EQUAL["lora_all"], "plain"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What one method reached at one setting.

    Attributes:
        right: (N,) right targets of every problem. nll: (N,) loss in nats, summed over them.
        cost: evaluations and passes of the path per scored token, and in `plain_steps` the time of a decoded token.
    """

    right: np.ndarray
    nll: np.ndarray
    cost: dict[str, float]


@dataclass(frozen=True)
class Study:
    """Everything that was measured.

    Attributes:
        targets: (N,) of every problem.
        outcomes: by method and setting.
        times: method -> time of its single evaluation.
        checkpoints: method -> training step of what was measured.
        losses: method -> training loss of every step.
        seconds: method -> processor time of a training step.
        elsewhere: what was asked beyond -> method -> `values` and `counts` of every problem.
    """

    targets: np.ndarray
    outcomes: dict[Key, Outcome]
    times: dict[str, float]
    checkpoints: dict[str, int]
    losses: dict[str, list[float]]
    seconds: dict[str, float]
    elsewhere: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)


# ---- reading -----------------------------------------------------------------------------------------------------


def read_study(out: Path, problems: int, limits: Limits) -> Study | None:
    """What the folder holds of so many test problems and others; `None` before anything was measured."""
    targets: list[int] = []
    outcomes: dict[Key, Outcome] = {}
    times, checkpoints = {}, {}
    for name in ("base", *METHODS, *EQUAL.values()):
        content = _read(score_file(out, name, problems))
        if content is None:
            continue
        targets = content["targets"]
        if "best" in content["times"]:
            times[name] = content["times"]["best"]
        if content["model"].startswith("checkpoint-"):
            checkpoints[name] = int(content["model"].removeprefix("checkpoint-"))
        elif name in METHODS:
            checkpoints[name] = saved_steps(run_folder(out, name))[-1]
        for setting, score in content["scores"].items():
            outcomes[name, setting] = _outcome(score)
    if not outcomes:
        return None
    losses = {name: found for name in METHODS if (found := _read(losses_file(out, name))) is not None}
    elsewhere = {asked: _answers(out, asked, limits) for asked in ASKED}
    return Study(
        *(np.array(targets, np.int16), outcomes, times, checkpoints, losses, _read(timing_file(out)) or {}),
        elsewhere={asked: found for asked, found in elsewhere.items() if found},
    )


def _answers(out: Path, asked: str, limits: Limits) -> dict[str, dict[str, list[float]]]:
    found = {name: read_answers(out, asked, limits, name) for name in ("base", *METHODS)}
    return {name: answers for name, answers in found.items() if answers is not None}


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _outcome(score: dict[str, Any]) -> Outcome:
    cost = {"evaluations": score["evaluations"], "passes": score["passes"]}
    cost["plain_steps"] = score["decoding"]["plain_steps"] if "decoding" in score else 1.0
    return Outcome(np.array(score["right"], np.int16), np.array(score["nll"], np.float32), cost)


def pack_study(study: Study) -> dict[str, Any]:
    """Plain values of everything; arrays are compressed, as text."""
    packed = {
        " ".join(key): {"right": pack(one.right), "nll": pack(one.nll), "cost": one.cost}
        for key, one in study.outcomes.items()
    }
    return {**vars(study), "targets": pack(study.targets), "outcomes": packed}


def unpack_study(content: dict[str, Any]) -> Study:
    """What `pack_study` made, after a way through JSON."""
    outcomes = {}
    for name, one in content["outcomes"].items():
        method, setting = name.split()
        right, nll = unpack(one["right"], np.int16), unpack(one["nll"], np.float32)
        outcomes[method, setting] = Outcome(right, nll, one["cost"])
    return Study(**{**content, "targets": unpack(content["targets"], np.int16), "outcomes": outcomes})


# ---- statistics --------------------------------------------------------------------------------------------------


def score(study: Study, key: Key, metric: str) -> Estimate:
    """One of `METRICS` of a method at a setting."""
    one = study.outcomes[key]
    if metric == "exact":
        return mean(one.right == study.targets)
    return ratio(one.right if metric == "accuracy" else one.nll, study.targets)


def difference(study: Study, first: Key, second: Key, metric: str) -> Estimate:
    """First minus second, on the same problems."""
    one, other = study.outcomes[first], study.outcomes[second]
    if metric == "exact":
        return paired(one.right == study.targets, other.right == study.targets)
    sums = (one.right - other.right) if metric == "accuracy" else (one.nll - other.nll)
    return ratio(sums, study.targets)


def answered(study: Study, asked: str, method: str) -> Estimate:
    """Share of right answers, or loss per token, with the error over problems."""
    found = study.elsewhere[asked][method]
    return ratio(found["values"], found["counts"], bounds=None if asked in LOSSES else (0.0, 1.0))


@dataclass(frozen=True)
class Comparison:
    """One difference of `COMPARISONS`, or to the base elsewhere; `adjusted`: its p-value after Holm's correction.

    Attributes:
        metric: of `METRICS` or `ASKED`.
    """

    about: str
    first: Key
    second: Key
    metric: str
    difference: Estimate
    adjusted: float | None

    @property
    def verdict(self) -> str:
        """In words, by the corrected p-value."""
        higher = self.metric != "loss" and self.metric not in LOSSES
        return verdict(self.difference, higher_is_better=higher, corrected=self.adjusted)


def compare(study: Study) -> list[Comparison]:
    """All comparisons that were measured; they are corrected together."""
    measured = [
        (about, first, second, metric, difference(study, first, second, metric))
        for about, first, second in COMPARISONS
        if first in study.outcomes and second in study.outcomes
        for metric in METRICS
    ]
    measured += [
        (f"{title(method)} against the base", (method, setting_of(method)), ("base", "plain"), asked, difference)
        for asked, by_method in study.elsewhere.items()
        for method, difference in _against_base(asked, by_method).items()
    ]
    adjusted = holm([one[-1].p_value for one in measured])
    return [Comparison(*one, p_value) for one, p_value in zip(measured, adjusted, strict=True)]


def _against_base(asked: str, by_method: dict[str, dict[str, list[float]]]) -> dict[str, Estimate]:
    """Every method's scores minus the base's, problem by problem."""
    base = by_method.get("base")
    if base is None:
        return {}
    bounds = None if asked in LOSSES else (-1.0, 1.0)
    return {
        method: ratio(np.subtract(found["values"], base["values"]), base["counts"], bounds=bounds)
        for method, found in by_method.items()
        if method != "base"
    }


def setting_of(method: str) -> str:
    """The setting at which a method answers elsewhere."""
    options = METHODS[method].options if method in METHODS else {}
    return "plain" if options.get("method") != "l2d" else "single" if options.get("noise_free") else f"T{BUDGET}"


def title(method: str) -> str:
    """What tables and figures call a method."""
    plain = method.removesuffix(EQUAL_TIME)
    return METHODS[plain].title if plain in METHODS else "base"
