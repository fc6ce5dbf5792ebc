"""Checks of whole ODE solves.

- `check_solves`: every entry of `solves`; fixed grids through the model's own solver (speculative and sequential) and
  through the released procedure, adaptive solvers through the released procedure

Solves that the fixture does not call reproducible get tolerances from its own noise floor and no counts.
"""

import dataclasses
from typing import Any

import torch

from l2d.sampler_config import ADAPTIVE_SOLVERS, FIXED_SOLVERS, SamplerConfig, budget_for_levels
from l2d.sampling.solve import Solution
from tests.parity.context import Context
from tests.parity.released_solver import ReleasedSolver, released_solve
from tests.parity.report import TOLERANCES

_LOOSER = 10  # factor on tolerance and noise floor where the fixture calls a solve not reproducible
_MOVED_STARTS = 8  # repetitions that show how far rounding alone changes a solve
_OVERRIDES = {"final_timestep", "start_timestep", "x1_estimation", "temperature_schedule", "guidance_parameter"}
_ITEMS = ("traj", "times", "evals", "x1_tokens", "temps", "final_logits")


@dataclasses.dataclass(frozen=True)
class SolveSettings:
    """One entry of `solves`, with defaults filled in from the released model's keyword arguments."""

    name: str
    method: str
    steps: int
    last: bool
    start: float
    final: float
    choice: str
    temperature: float | str
    normalize: bool
    guidance: float | None  # None: one branch, guided by nothing
    with_classes: bool
    solver: dict[str, Any]
    reproducible: bool
    smallest_margin: float

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.method in ADAPTIVE_SOLVERS

    @classmethod
    def read(cls, name: str, entry: dict[str, Any], flow: dict[str, Any]) -> "SolveSettings":
        """From the JSON; raises `ValueError` for anything that no check here would honour."""
        overrides = entry.get("call_overrides") or {}
        if unknown := sorted(set(overrides) - _OVERRIDES):
            raise ValueError(f"call_overrides {unknown} are not known to the parity checks")
        with_classes = bool(entry.get("uses_class_labels"))
        guidance = overrides.get("guidance_parameter", flow.get("nstep_guidance_parameter"))
        solve = cls(
            name=name,
            method={"heun": "heun2"}.get(entry["method"], entry["method"]),
            steps=entry["steps"],
            last=entry["last"],
            start=overrides.get("start_timestep", 0.0),
            final=overrides.get("final_timestep", flow.get("nstep_final_timestep", 1.0)),
            choice=entry.get("x1_estimation") or flow.get("nstep_x1_estimation", "sample"),
            temperature=entry.get("temperature", flow.get("nstep_temperature_schedule", 0.0)),
            normalize=flow.get("nstep_normalize_x1_predictions", False),
            guidance=guidance if with_classes else None,
            with_classes=with_classes,
            solver=entry.get("solver") or flow.get("ode_kwargs") or {},
            reproducible=bool(entry.get("tightly_reproducible")),
            smallest_margin=entry.get("min_argmax_margin") or 0.0,
        )
        if solve.method not in FIXED_SOLVERS and not solve.adaptive:
            raise ValueError(f"method {entry['method']!r} is not a solver of this project")
        if solve.choice == "sample" and solve.temperature != 0.0:
            raise ValueError("tokens drawn at a temperature above 0 cannot be compared")
        return solve


def check_solves(context: Context) -> None:
    """Every solve of the case."""
    for name, entry in (context.case.meta.get("solves") or {}).items():
        if entry.get("error") is not None:
            reason = f"the released code gave no result: {' '.join(str(entry['error']).split()) or 'error'}"
            context.record.skip("solve", name, reason)
            continue
        with context.record.attempt("solve", name):
            settings = SolveSettings.read(name, entry, context.case.flow)
            want = {item: context.case.expected(f"ode.{name}.{item}") for item in _ITEMS}
            _check_one(context, settings, entry, want)


def _check_one(context: Context, settings: SolveSettings, entry: dict[str, Any], want: dict[str, torch.Tensor]) -> None:
    routes = {"released procedure": _released}
    if not settings.adaptive:
        routes |= {"own solver": _own, "own solver, sequential": _own_sequential}
    kind = "adaptive" if settings.adaptive else "fixed-grid"
    tolerances = _tolerances(context, settings, entry, kind)
    for route, solve in routes.items():
        label = f"{settings.name} ({route})"
        with context.record.attempt("solve", label):
            solution = solve(context, settings)
            _compare_states(context, settings, want, solution, kind, tolerances, label)
            _compare_evaluations(context, settings, want, solution, label, own=route != "released procedure")


def _places(context: Context, settings: SolveSettings) -> tuple[torch.Tensor, torch.Tensor | None]:
    index = context.index[:, -1:] if settings.last else context.index
    return index, context.required_classes() if settings.with_classes else None


def _own(context: Context, settings: SolveSettings, speculation: bool = True) -> Solution:
    index, classes = _places(context, settings)
    guidance = 1.0 if settings.guidance is None else settings.guidance
    sampler = SamplerConfig(
        budget=budget_for_levels(settings.method, settings.steps),
        solver=settings.method,
        start_time=settings.start,
        final_time=settings.final,
        guidance_scale=guidance,
        guidance_class=0 if settings.with_classes else None,
        choice=settings.choice,
        choice_temperature=settings.temperature,
        normalize_average=settings.normalize,
        end_velocity="zero",
        speculation=speculation,
    )
    x0 = context.case.given(f"ode.{settings.name}.x0")
    return context.model.solve(context.state, index, x0, sampler, classes=classes)


def _own_sequential(context: Context, settings: SolveSettings) -> Solution:
    return _own(context, settings, speculation=False)


def _released(context: Context, settings: SolveSettings, moved: int | None = None) -> Solution:
    """The released procedure; with a seed `moved`, from a start that differs by a few float32 rounding units."""
    index, classes = _places(context, settings)
    x0 = context.case.given(f"ode.{settings.name}.x0")
    if moved is not None:
        directions = torch.randn(x0.shape, generator=torch.Generator().manual_seed(moved))
        x0 = x0 * (1 + 2 * torch.finfo(torch.float32).eps * directions)
    solver = ReleasedSolver(
        method=settings.method,
        steps=settings.steps,
        family=context.case.meta["family"],
        start_time=settings.start,
        final_time=settings.final,
        choice=settings.choice,
        temperature=settings.temperature,
        normalize=settings.normalize,
        guidance_scale=settings.guidance,
        atol=settings.solver.get("atol", 1e-5),
        rtol=settings.solver.get("rtol", 1e-5),
        options=settings.solver.get("options"),
    )
    return released_solve(context.model, context.state, index, x0, solver, classes)


def _tolerances(context: Context, settings: SolveSettings, entry: dict[str, Any], kind: str) -> tuple[float, float]:
    """For trajectory and final logits: those of the table, or looser ones for a solve that is not reproducible.

    Its noise floor is what the fixture recorded, or what a few rounding units in x0 do here, whichever is larger.
    """
    plain = TOLERANCES[f"{kind} trajectory"], TOLERANCES[f"{kind} final logits"]
    if settings.reproducible:
        return plain
    solution = _released(context, settings)
    moved = [_released(context, settings, moved=seed) for seed in range(_MOVED_STARTS)]
    floors = (
        [entry.get("dev_traj_vs_float64_weights") or 0.0],
        [entry.get("dev_final_logits_vs_float64_weights") or 0.0],
    )
    valid = context.valid[:, -1:] if settings.last else context.valid
    for other in moved:
        floors[0].append((other.trajectory - solution.trajectory)[:, valid].abs().max().item())
        floors[1].append((other.final_logits - solution.final_logits)[valid].abs().max().item())
    return tuple(_LOOSER * max(value, *floor) for value, floor in zip(plain, floors, strict=True))


def _compare_states(
    context: Context,
    settings: SolveSettings,
    want: dict[str, torch.Tensor],
    solution: Solution,
    kind: str,
    tolerances: tuple[float, float],
    label: str,
) -> None:
    record = context.record
    valid = context.valid[:, -1:] if settings.last else context.valid
    record.close("times", f"{label} times", solution.times, want["times"])
    trajectory, expected = solution.trajectory.transpose(0, 2), want["traj"].transpose(0, 2)  # (Q, B, n, d)
    record.close(f"{kind} trajectory", label, trajectory, expected, where=valid.t(), tolerance=tolerances[0])
    logits = want["final_logits"]
    logits = logits[:, None] if logits.dim() == 2 else logits
    record.close(f"{kind} final logits", label, solution.final_logits, logits, where=valid, tolerance=tolerances[1])


def _compare_evaluations(
    context: Context,
    settings: SolveSettings,
    want: dict[str, torch.Tensor],
    solution: Solution,
    label: str,
    own: bool,
) -> None:
    """Times, temperatures and tokens of the evaluations; for adaptive solvers their number alone is comparable."""
    record = context.record
    if settings.adaptive and not settings.reproducible:
        record.skip("adaptive evaluations", label, "the fixture calls this solve not reproducible")
        return
    asked, temperatures, tokens = want["evals"], want["temps"], want["x1_tokens"]
    chosen = solution.chosen
    if own:  # per evaluation, not per network call, and never where the released code answers with zeros
        asked = asked[asked < 1]
        branches = 1 if settings.guidance is None else 2
        temperatures = temperatures[::branches]
        if chosen.dim() == 4:
            chosen = chosen.movedim(-1, 1).flatten(0, 1)
        elif branches == 2:  # at scale 1 the unconditional branch is left out
            tokens = tokens[::2]
    scheduled = "scheduled temperature"
    if settings.adaptive:
        _compare_counts(context, settings, solution, (len(asked), len(tokens)), label)
        if len(solution.evaluation_times) != len(asked) or len(chosen) != len(tokens):
            made = f"{len(solution.evaluation_times)} evaluations instead of {len(asked)}"
            record.skip("chosen tokens", label, f"{made}: other steps, so token by token there is nothing to compare")
            return
        scheduled = "adaptive scheduled temperature"
    else:
        record.close("times", f"{label} evaluations", solution.evaluation_times, asked)
    record.close(scheduled, label, solution.temperatures, temperatures)
    _compare_tokens(context, settings, chosen, tokens, label)


def _compare_counts(
    context: Context, settings: SolveSettings, solution: Solution, wanted: tuple[int, int], label: str
) -> None:
    """Evaluations asked for and network calls of an adaptive solve.

    They must be equal, unless rounding alone changes them: where they differ, the same solve is repeated from starts
    moved by a few float32 rounding units, and the difference may be twice the spread of its counts.
    """
    runs = [_counts(solution)]
    if runs[0] != wanted:
        runs += [_counts(_released(context, settings, moved=seed)) for seed in range(_MOVED_STARTS)]
    for what, want, counts in zip(("asked", "computed"), wanted, zip(*runs, strict=True), strict=True):
        spread = max(counts) - min(counts)
        message = f"{counts[0]} instead of {want}; {min(counts)} to {max(counts)} when x0 moves by rounding units"
        off = abs(counts[0] - want)
        context.record.measured("adaptive evaluations", f"{label} {what}", off, 2 * spread, message if off else "")


def _counts(solution: Solution) -> tuple[int, int]:
    return len(solution.evaluation_times), len(solution.chosen)


def _compare_tokens(
    context: Context, settings: SolveSettings, chosen: torch.Tensor, tokens: torch.Tensor, label: str
) -> None:
    """Chosen tokens (calls, B, Q); a choice that is as near to a tie as the logits' tolerance may differ."""
    record = context.record
    valid = (context.valid[:, -1:] if settings.last else context.valid).expand_as(tokens)
    tie = 2 * TOLERANCES["adaptive final logits" if settings.adaptive else "fixed-grid final logits"]
    close_call = settings.smallest_margin < tie or not settings.reproducible  # the fixture tells how near ties are
    if close_call and tokens.shape == chosen.shape and bool((tokens != chosen)[valid].any()):
        reason = f"smallest margin {settings.smallest_margin:.1e}: a tie may fall either way"
        record.skip("chosen tokens", label, reason)
    else:
        record.same("chosen tokens", label, chosen, tokens, where=valid)
