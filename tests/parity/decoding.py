"""Checks of the greedy decode.

- `check_decode`: tokens of L2D and of the base through `generate`, and each step's logits through the solver
"""

from typing import Any

import torch

from l2d.network.main_path import MainPathState
from l2d.sampler_config import ADAPTIVE_SOLVERS, SamplerConfig, budget_for_levels
from l2d.sampling.solve import Solution
from tests.parity.context import Context
from tests.parity.released_solver import ReleasedSolver, released_solve
from tests.parity.report import TOLERANCES


def check_decode(context: Context) -> None:
    """`decode.tokens`, `decode.logits` and `decode.base_tokens`."""
    case, record = context.case, context.record
    settings = case.meta.get("decode")
    if not settings:
        return
    if case.has("decode.base_tokens"):
        with record.attempt("decode tokens", "base"):
            want = case.expected("decode.base_tokens")
            tokens, _ = _generate(context, SamplerConfig(budget=1), None, want.shape[1], slice(None))
            record.same("decode tokens", "base", tokens, want)
    if not case.has("decode.tokens"):
        return
    with record.attempt("decode tokens", "L2D"):
        want = case.expected("decode.tokens")
        sampler, classes = _sampler(context, settings)
        tokens, logits = _decode(context, sampler, classes, want.shape[1])
        record.same("decode tokens", "L2D", tokens, want)
        if case.has("decode.logits"):
            want = case.expected("decode.logits")
            # The own adaptive solvers step row by row and not batch by batch: their logits are no one's fixture.
            if not sampler.adaptive:
                record.close("decode logits", "generate", logits, want)
            tolerance = TOLERANCES["adaptive final logits" if sampler.adaptive else "decode logits"]
            solved = _solved_logits(context, settings, sampler, classes)
            record.close("decode logits", "solve", solved, want, tolerance=tolerance)


def _sampler(context: Context, settings: dict[str, Any]) -> tuple[SamplerConfig, torch.Tensor | None]:
    """The decoder's settings and the class of each row, `None` for a decode without classes."""
    flow = context.case.flow
    solver = {"heun": "heun2"}.get(settings["method"], settings["method"])
    guidance, ode = settings.get("guidance_parameter"), flow.get("ode_kwargs") or {}
    greedy = str(settings.get("x1", "")).startswith("argmax")
    sampler = SamplerConfig(
        budget=2 if solver in ADAPTIVE_SOLVERS else budget_for_levels(solver, settings["ode_steps"]),
        solver=solver,
        rtol=ode.get("rtol", 1e-5),
        atol=ode.get("atol", 1e-5),
        first_step=(ode.get("options") or {}).get("first_step", 0.05),
        final_time=flow.get("nstep_final_timestep", 1.0),
        guidance_scale=1.0 if guidance is None else guidance,
        guidance_class=None if guidance is None else 0,
        choice="sample" if greedy else flow.get("nstep_x1_estimation", "sample"),
        choice_temperature=0.0 if greedy else flow.get("nstep_temperature_schedule", 0.0),
        normalize_average=flow.get("nstep_normalize_x1_predictions", False),
        end_velocity="zero",
    )
    if sampler.choice == "sample" and sampler.choice_temperature != 0.0:
        raise ValueError("a decode with tokens drawn at a temperature above 0 cannot be compared")
    return sampler, None if guidance is None else context.required_classes()


def _decode(
    context: Context, sampler: SamplerConfig, classes: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, count) and logits (count, B, V): all rows in one batch, or the rows of each class in one."""
    noise = context.case.given("decode.noise").flatten(2)  # (count, B, d)
    if classes is None:
        return _generate(context, sampler, noise, count, slice(None))
    tokens, logits = torch.zeros(len(classes), count, dtype=torch.int64), None
    for number in classes.unique().tolist():
        rows = classes == number
        tokens[rows], part = _generate(context, sampler.replace(guidance_class=number), noise[:, rows], count, rows)
        if logits is None:
            logits = part.new_zeros(count, len(classes), part.shape[-1])
        logits[:, rows] = part
    return tokens, logits


def _generate(
    context: Context, sampler: SamplerConfig, noise: torch.Tensor | None, count: int, rows: slice | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` new tokens and their logits; the released decode stops nowhere, so no end token is set."""
    ids, mask = context.input_ids[rows], context.attention_mask
    output = context.model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask[rows],
        sampler=sampler,
        noise=noise,
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits)


def _solved_logits(
    context: Context, settings: dict[str, Any], sampler: SamplerConfig, classes: torch.Tensor | None
) -> torch.Tensor:
    """Final logits (steps, B, V) of every step, each after the fixture's own earlier tokens."""
    case = context.case
    noise, tokens = case.given("decode.noise"), case.given("decode.tokens")
    ids = context.input_ids
    mask = torch.ones_like(ids) if context.attention_mask is None else context.attention_mask
    steps = []
    for number in range(len(noise)):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        state = context.model.paths.main_path(ids, mask, places)
        index = torch.full((len(ids), 1), ids.shape[1] - 1)
        if sampler.adaptive:
            solution = _released(context, state, index, noise[number], settings, sampler, classes)
        else:
            solution = context.model.solve(state, index, noise[number], sampler, classes=classes)
        steps.append(solution.final_logits[:, 0])
        ids = torch.cat([ids, tokens[:, number : number + 1]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return torch.stack(steps)


def _released(
    context: Context,
    state: MainPathState,
    index: torch.Tensor,
    x0: torch.Tensor,
    settings: dict[str, Any],
    sampler: SamplerConfig,
    classes: torch.Tensor | None,
) -> Solution:
    """One step of an adaptive decode, with one step size for the batch as the released decoder has it."""
    solver = ReleasedSolver(
        method=sampler.solver,
        steps=settings["ode_steps"],
        family=context.case.meta["family"],
        choice=sampler.choice,
        temperature=sampler.choice_temperature,
        normalize=sampler.normalize_average,
        guidance_scale=None if classes is None else sampler.guidance_scale,
        final_time=sampler.final_time,
        rtol=sampler.rtol,
        atol=sampler.atol,
        options={"first_step": sampler.first_step},
    )
    return released_solve(context.model, state, index, x0, solver, classes)
