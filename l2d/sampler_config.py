"""What a user may set at inference, declared and validated in one place and without torch.

- `SamplerConfig`: budget, solver, guidance, choice of the clean token, noise seed
- `FIXED_SOLVERS`, `ADAPTIVE_SOLVERS`: the solvers by name
- `budget_for_levels`, `levels_for_budget`, `nearest_budgets`: number of time levels <-> budget T
- `unusual`: in words, what of a sampler is not the default
- `temperature_at`: the choice temperature at a time, constant or scheduled
- `NOISE_FREE_SAMPLER`: the only trajectory of a noise-free path; `single_evaluation`: of one evaluation at a time

A budget T counts every evaluation of the diffusion path, the last one (which reads the output) included. T = 1 is the
base model. With `n` time levels a solver of `s` stages spends `s (n - 1) + 1`; Euler spends `n`.
A new field of `SamplerConfig` needs no other change: commands, `lm_eval`, sweeps, results and the leaderboard read its
declaration.
"""

import dataclasses
import difflib
import re
from collections.abc import Container, Mapping
from typing import Any

from l2d.settings import Kind, check_settings, declared, matching, number, one_of, positive, setting, truth, whole

FIXED_SOLVERS: dict[str, int] = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""Fixed-grid solvers and their evaluations per grid step."""

ADAPTIVE_SOLVERS: tuple[str, ...] = ("adaptive_heun", "bosh3", "fehlberg2", "dopri5")
"""Solvers that choose the number of evaluations themselves."""


NOISE_FREE_SAMPLER: dict[str, Any] = {"solver": "euler", "budget": 2}
"""The base's answer at t = 0, which costs nothing, and one evaluation of the path at t = 1."""

SINGLE: dict[str, Any] = {
    **NOISE_FREE_SAMPLER, "start_time": 0.0, "mc_samples": 1, "early_confidence": 1.0,
}  # fmt: skip
"""One evaluation of the path, at `final_time`: the one before it, at t = 0, is the base's own."""


def single_evaluation(time: float) -> dict[str, Any]:
    """Changes to a sampler that make it one evaluation of the path at `time`."""
    return {**SINGLE, "final_time": time}


REMOVED = {"votes": "votes was removed, since averaging over noise draws gained no accuracy: leave it out."}
"""Settings of earlier versions, and what to tell whoever still names them."""

_SCHEDULE = re.compile(r"polynomial_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)")


def _check_temperature(name: str, value: Any) -> float | str:
    if isinstance(value, str) and (match := _SCHEDULE.fullmatch(value)) and float(match[2]) > 0:
        return value
    return _not_negative.check(name, value)


_not_negative = number("a number of at least 0, or polynomial_p_end, e.g. polynomial_1_1.0", lambda value: value >= 0)
_temperature = Kind("a number of at least 0, or polynomial_p_end", _check_temperature)
_sure = _time = number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
_share = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
_class = matching(
    "a class name or its index", lambda value: isinstance(value, (str, int, type(None))) and not isinstance(value, bool)
)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of one diffusion solve per token. Every wrong value raises a one-sentence `ValueError`.

    Numbers may arrive as text. `guidance_class` may be a name, an index, or `None` for "no class". A temperature
    `"polynomial_p_end"` is `(1 - t / end) ** p`, 0 beyond `end`. All noise is a function of (seed, request, position,
    draw).
    """

    budget: int = setting(
        15,
        whole(1),
        "evaluations per token, the last one included; 1 is the base model",
        argument="diffusion_budget",
        compute=True,
        shown="",
    )
    solver: str = setting(
        "midpoint",
        one_of(*FIXED_SOLVERS, *ADAPTIVE_SOLVERS),
        "ODE solver; the last four choose their own budget",
        compute=True,
        shown="{}",
    )
    start_time: float = setting(
        0.0, _share, "where the trajectory starts; 0 is pure noise", compute=True, shown="from t = {}"
    )
    final_time: float = setting(
        1.0, _share, "where the trajectory ends and the output is read", compute=True, shown="to t = {}"
    )
    rtol: float = setting(1e-5, positive, "relative tolerance (adaptive solvers)", compute=True, adaptive=True)
    atol: float = setting(1e-5, positive, "absolute tolerance (adaptive solvers)", compute=True, adaptive=True)
    first_step: float = setting(0.05, positive, "first step (adaptive solvers)", compute=True, adaptive=True)
    max_evaluations: int = setting(
        1000, whole(1), "cap per token (adaptive solvers), counted when reached", compute=True, adaptive=True
    )
    guidance_scale: float = setting(1.0, number(), "strength of classifier-free guidance; 1 is none", shown="")
    guidance_class: str | int | None = setting(
        None, _class, "class to guide towards; in lm_eval auto chooses it by task", shown=""
    )
    choice: str = setting(
        "sample",
        one_of("sample", "average"),
        "move towards one token's embedding, or towards the mean of all",
        shown="{}",
    )
    choice_temperature: float | str = setting(
        0.0, _temperature, "temperature of that choice; 0 is the most likely token", shown="τ = {}"
    )
    normalize_average: bool = setting(
        False, truth, "bring averaged embeddings back to a token's norm", shown="normalised"
    )
    end_velocity: str = setting(
        "straight",
        one_of("straight", "zero"),
        "velocity where a solver asks at t = 1; zero is the released behaviour",
        compute=True,
        shown="end velocity {}",
    )
    mc_samples: int = setting(
        1, whole(1), "noise draws averaged when a given continuation is scored", compute=True, shown="{} noise draws"
    )
    skip_confidence: float = setting(
        1.0,
        _sure,
        "take the base's answer, without evaluations, where its most likely token is at least so likely; 1: nowhere",
        shown="the base's answer from p = {} on",
    )
    early_confidence: float = setting(
        1.0,
        _sure,
        "take the answer of one evaluation at early_time where its most likely token is at least so likely; 1: nowhere",
        compute=True,
        shown="one evaluation's answer from p = {} on",
    )
    early_time: float = setting(
        0.5, _time, "time of the evaluation that early_confidence asks", compute=True, shown="at t = {}"
    )
    seed: int = setting(0, whole(0, (1 << 64) - 1, "2**64 - 1"), "seed of all noise", shown="seed {}")
    speculation: bool = setting(
        True, truth, "evaluate whole trajectories at once; the result is the same", changes_answers=False
    )
    draft_tokens: int = setting(
        3, whole(0), "tokens that the base drafts ahead; the result is the same", changes_answers=False
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 <= self.start_time < self.final_time <= 1:
            raise ValueError(
                f"start_time={self.start_time:g}, final_time={self.final_time:g} is not a trajectory: "
                "use 0 <= start_time < final_time <= 1."
            )
        if self.solver in FIXED_SOLVERS:
            levels_for_budget(self.solver, self.budget)

    @property
    def is_base(self) -> bool:
        """Whether the output is the base model's own (budget 1)."""
        return self.budget == 1

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own number of evaluations."""
        return self.solver in ADAPTIVE_SOLVERS

    @property
    def guided(self) -> bool:
        """Whether every evaluation needs both a class-conditional and an unconditional answer."""
        return self.guidance_scale != 1.0

    def for_path(self, carried_state: bool, noise_free: bool) -> "SamplerConfig":
        """These settings as a path with a carried state, or without noise, can follow them.

        Raises `ValueError` for settings that such a path cannot follow at all.
        """
        if carried_state and self.adaptive and not self.is_base:
            raise ValueError(
                f"solver={self.solver!r} repeats steps, and this model carries a state from one evaluation to the "
                f"next: use one of {', '.join(FIXED_SOLVERS)}."
            )
        if noise_free and not self.is_base:
            fixed = {one.name: one.default for one in declared(type(self)).values() if one.compute}
            fixed |= {"guidance_scale": 1.0, **NOISE_FREE_SAMPLER}
            if any(getattr(self, name) != value for name, value in fixed.items()):
                raise ValueError(
                    f"diffusion_budget={self.budget}, solver={self.solver!r} cannot be spent by a noise-free path, "
                    "which is evaluated once: use diffusion_budget=2 with solver=euler and no times, early answers, "
                    "guidance or draws, or diffusion_budget=1 for the base."
                )
        return dataclasses.replace(self, speculation=False) if carried_state else self

    def replace(self, **changes: Any) -> "SamplerConfig":
        """A copy with `changes`, validated; unknown names raise `ValueError` with the nearest known one."""
        names = declared(type(self))
        for name in changes:
            if name in REMOVED:
                raise ValueError(REMOVED[name])
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known settings are {', '.join(names)}."
                raise ValueError(f"sampler setting {name!r} is not known: {hint}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return dataclasses.asdict(self)

    def class_index(self, guidance_classes: list[str] | None) -> int | None:
        """Index of `guidance_class` among a model's classes, or `None` for "no class".

        Raises `ValueError` if the model has no such class, or for guidance without a class.
        """
        name = self.guidance_class
        if not guidance_classes:
            if self.guided or name is not None:
                asked = f"guidance_scale={self.guidance_scale:g}" if self.guided else f"guidance_class={name!r}"
                raise ValueError(
                    f"{asked} needs a model that was trained with guidance classes, and this one was not: "
                    "leave guidance_scale at 1.0 and guidance_class unset."
                )
            return None
        allowed = ", ".join(guidance_classes)
        if name is None:
            if self.guided:
                raise ValueError(f"guidance_scale={self.guidance_scale:g} needs guidance_class, one of: {allowed}.")
            return None
        index = guidance_classes.index(name) if name in guidance_classes else name
        if isinstance(index, str) and index.isdigit():
            index = int(index)
        if isinstance(index, str) or not 0 <= index < len(guidance_classes):
            raise ValueError(f"guidance_class={name!r} is not a class of this model; choose one of: {allowed}.")
        return index


def temperature_at(temperature: float | str, time: float) -> float:
    """Choice temperature at `time`: a constant, or the schedule `polynomial_p_end`."""
    match = _SCHEDULE.fullmatch(temperature) if isinstance(temperature, str) else None
    if match is None:
        return float(temperature)
    power, end = float(match[1]), float(match[2])
    return (1 - time / end) ** power if time < end else 0.0


def unusual(values: Mapping[str, Any], leave_out: Container[str] = ()) -> list[str]:
    """A phrase for each of a sampler's `values` that is not the default and may change an answer.

    Budget and guidance, which every description names, and the names in `leave_out` have none. `values` may lack names,
    and have others, which are ignored.
    """
    adaptive = values.get("solver") in ADAPTIVE_SOLVERS
    return [
        one.phrase(values[name])
        for name, one in declared(SamplerConfig).items()
        if one.changes_answers and one.shown != "" and name not in leave_out and (adaptive or not one.adaptive)
        if name in values and values[name] != one.default
    ]


# ---- budgets ----------------------------------------------------------------------------------------------------


def stages(solver: str) -> int:
    """Evaluations per grid step of a fixed-grid solver; `ValueError` for any other name."""
    if solver not in FIXED_SOLVERS:
        raise ValueError(f"solver={solver!r} has no fixed grid; choose one of {', '.join(FIXED_SOLVERS)}.")
    return FIXED_SOLVERS[solver]


def budget_for_levels(solver: str, levels: int) -> int:
    """Budget T that `levels` time levels cost with a fixed-grid `solver`."""
    if levels < 1:
        raise ValueError(f"levels={levels} is not possible: a grid has at least 1 time level (the base model).")
    return stages(solver) * (levels - 1) + 1


def levels_for_budget(solver: str, budget: int) -> int:
    """Number of time levels that spend exactly `budget` evaluations.

    Raises `ValueError`, naming the nearest budgets that `solver` can meet, if there is none.
    """
    steps, rest = divmod(budget - 1, stages(solver))
    if rest or budget < 1:
        near = " or ".join(str(b) for b in nearest_budgets(solver, budget))
        raise ValueError(
            f"diffusion_budget={budget} cannot be met by solver={solver!r}, which spends "
            f"{_formula(solver)} evaluations on n time levels: use {near}."
        )
    return steps + 1


def nearest_budgets(solver: str, budget: int) -> list[int]:
    """The one or two budgets next to `budget` that a fixed-grid `solver` can meet, in rising order."""
    count = stages(solver)
    below = max(1, (budget - 1) // count * count + 1)
    return [below] if below >= budget else [below, below + count]


def _formula(solver: str) -> str:
    count = stages(solver)
    return "n" if count == 1 else f"{count}(n-1)+1"
