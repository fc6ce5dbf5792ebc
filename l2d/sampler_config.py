"""What a user may set at inference, validated in one place and without torch.

- `SamplerConfig`: budget, solver, guidance, choice of the clean token, noise seed
- `temperature_at`: the choice temperature at a time, constant or scheduled
- `NOISE_FREE_SAMPLER`: the only trajectory of a noise-free path
"""

import dataclasses
import difflib
import math
import re
from typing import Any

from l2d.budget import ADAPTIVE_SOLVERS, FIXED_SOLVERS, levels_for_budget

NOISE_FREE_SAMPLER: dict[str, Any] = {"solver": "euler", "budget": 2}
"""The base's answer at t = 0, which costs nothing, and one evaluation of the path at t = 1."""

_SCHEDULE = re.compile(r"polynomial_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Settings of one diffusion solve per token. Every wrong value raises a one-sentence `ValueError`.

    Attributes:
        budget: evaluations T per token, the last one included; 1 is the base model. Adaptive solvers choose their own
            number, so for them only `budget=1` (the base) has a meaning of its own.
        solver: one of `FIXED_SOLVERS` or `ADAPTIVE_SOLVERS`.
        start_time, final_time: the trajectory runs from `start_time` (0 is noise) to `final_time` (1 is the token),
            where the last evaluation reads the output.
        rtol, atol, first_step, max_evaluations: adaptive solvers only; `max_evaluations` is a cap per token.
        guidance_scale: g in `v = g v(class) + (1 - g) v(no class)`; 1 is no guidance.
        guidance_class: name or index of the class; `None` is "no class".
        choice: `"sample"` draws a token from `softmax(logits / choice_temperature)` (argmax at 0) and moves towards
            its embedding, `"average"` moves towards the probability-weighted mean of the vocabulary table.
        choice_temperature: a number, or `"polynomial_p_end"`: `(1 - t / end) ** p`, 0 beyond `end`.
        normalize_average: bring averaged embeddings back to the norm of a token's.
        end_velocity: what a solver is told where it asks at t = 1: `"straight"` (the last stage's velocity) or
            `"zero"` (what the released implementation does for heun2 and rk4).
        votes: noise draws per token, each solved at the whole budget, whose probabilities are averaged before the token
            is chosen, and where it is scored.
        mc_samples: noise draws whose probabilities are averaged when a given continuation is scored, and only then.
        seed: all noise is a function of (seed, request, position, draw).
        speculation: evaluate a whole trajectory in one batch under the assumption that the chosen token stays; the
            result is that of the sequential solver.
        draft_tokens: how many tokens the base may draft ahead, so that their positions are decided in one batch while
            its guesses mostly hold; the result is that of deciding one by one. 0 turns it off.
    """

    budget: int = 15
    solver: str = "midpoint"
    start_time: float = 0.0
    final_time: float = 1.0
    rtol: float = 1e-5
    atol: float = 1e-5
    first_step: float = 0.05
    max_evaluations: int = 1000
    guidance_scale: float = 1.0
    guidance_class: str | int | None = None
    choice: str = "sample"
    choice_temperature: float | str = 0.0
    normalize_average: bool = False
    end_velocity: str = "straight"
    votes: int = 1
    mc_samples: int = 1
    seed: int = 0
    speculation: bool = True
    draft_tokens: int = 3

    def __post_init__(self) -> None:
        for name, low in _LOWEST.items():
            self._set(name, _whole_number(_ARGUMENT.get(name, name), getattr(self, name), low))
        for name in ("start_time", "final_time", "rtol", "atol", "first_step", "guidance_scale"):
            self._set(name, _number(name, getattr(self, name)))
        for name in ("normalize_average", "speculation"):
            self._set(name, _truth(name, getattr(self, name)))
        if self.seed >= 1 << 64:
            raise ValueError(f"seed={self.seed} must be below 2**64.")
        _one_of("solver", self.solver, (*FIXED_SOLVERS, *ADAPTIVE_SOLVERS))
        _one_of("choice", self.choice, ("sample", "average"))
        _one_of("end_velocity", self.end_velocity, ("straight", "zero"))
        if not 0 <= self.start_time < self.final_time <= 1:
            raise ValueError(
                f"start_time={self.start_time:g}, final_time={self.final_time:g} is not a trajectory: "
                "use 0 <= start_time < final_time <= 1."
            )
        for name in ("rtol", "atol", "first_step"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name):g} must be a number above 0.")
        if self.solver in FIXED_SOLVERS:
            levels_for_budget(self.solver, self.budget)
        if self.votes > 1 and self.mc_samples > 1:
            raise ValueError(
                f"votes={self.votes} and mc_samples={self.mc_samples} both average over noise draws: leave one at 1."
            )
        if isinstance(self.guidance_class, bool) or not isinstance(self.guidance_class, (str, int, type(None))):
            raise ValueError(f"guidance_class={self.guidance_class!r} must be a class name or its index.")
        self._set("choice_temperature", _check_temperature(self.choice_temperature))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

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

    @property
    def scored_draws(self) -> int:
        """Noise draws averaged where a given continuation is scored."""
        return 1 if self.is_base else max(self.votes, self.mc_samples)

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
            usual = SamplerConfig()
            once = all(getattr(self, name) == value for name, value in NOISE_FREE_SAMPLER.items())
            for name in ("start_time", "final_time", "guidance_scale", "votes", "mc_samples"):
                once = once and getattr(self, name) == getattr(usual, name)
            if not once:
                raise ValueError(
                    f"diffusion_budget={self.budget}, solver={self.solver!r} cannot be spent by a noise-free path, "
                    "which is evaluated once: use diffusion_budget=2 with solver=euler and no times, guidance, votes "
                    "or draws, or diffusion_budget=1 for the base."
                )
        return dataclasses.replace(self, speculation=False) if carried_state else self

    def replace(self, **changes: Any) -> "SamplerConfig":
        """A copy with `changes`, validated; unknown names raise `ValueError` with the nearest known one."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
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

        Raises `ValueError` if the model has no such class, or if guidance is asked for without a class.
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


_LOWEST = {"budget": 1, "max_evaluations": 1, "votes": 1, "mc_samples": 1, "seed": 0, "draft_tokens": 0}
_ARGUMENT = {"budget": "diffusion_budget"}  # the name under which users know a field


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    return number


def _whole_number(name: str, value: Any, low: int) -> int:
    try:
        number = int(value)
        whole = not isinstance(value, bool) and number == float(value) and number >= low
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}.")
    return number


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false.")
    return value


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of: {', '.join(allowed)}.")


def _check_temperature(value: Any) -> float | str:
    if isinstance(value, str) and (match := _SCHEDULE.fullmatch(value)) and float(match[2]) > 0:
        return value
    try:
        number = _number("choice_temperature", value)
    except ValueError:
        number = -1.0
    if number < 0:
        raise ValueError(
            f"choice_temperature={value!r} must be a number of at least 0 or a schedule 'polynomial_p_end', "
            "for example 'polynomial_1_1.0'."
        )
    return number
