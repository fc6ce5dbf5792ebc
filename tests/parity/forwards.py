"""Checks of single forwards: the base, the diffusion path at given times, and the velocity.

- `check_base`: logits and hidden state before the final norm
- `check_forwards`: per-token and scalar times, with and without a class, over a whole pass or a cache
- `check_velocity`: unguided, conditional, unconditional and guided, taken from the model's own solver
"""

import torch
from transformers import DynamicCache

from l2d.network.diffusion_path import PathInputs
from l2d.sampler_config import SamplerConfig
from tests.parity.context import Context


def check_base(context: Context) -> None:
    """The main path: what the model returns without targets, and what it keeps for the diffusion path."""
    case, record = context.case, context.record
    if case.has("base.logits"):
        with record.attempt("base logits", "forward"):
            want = case.expected("base.logits")
            output = context.model(context.input_ids, context.attention_mask, context.position_ids)
            record.close("base logits", "forward", output.logits, want, where=context.valid)
            kept = context.model.paths.base_logits(context.state)
            record.close("base logits", "base_logits", kept, want, where=context.valid)
            record.same("base logits, bit for bit", "base_logits", kept, output.logits, where=context.valid)
    if case.has("base.final_hidden"):
        with record.attempt("base hidden", "base.final_hidden"):
            want = case.expected("base.final_hidden")
            record.close("base hidden", "base.final_hidden", context.state.hidden, want, where=context.valid)


_FORWARD = r"fwd\.logits_(?P<time>.+?)(?P<label>_cond|_uncond)?(?P<cached>_cached)?(?P<last>_last)?"


def check_forwards(context: Context) -> None:
    """Every `fwd.logits_*`, and that the path gives the base's own result, bit for bit, at t = 0."""
    case, record = context.case, context.record
    for key, match in case.keys(_FORWARD):
        with record.attempt("forward logits", key):
            if match["time"] == "t0":  # conditional where nothing else is said
                x, time = case.given("fwd.noise"), torch.zeros(())
                classes = None if match["label"] == "_uncond" else context.classes
                _check_start(context, x, classes)
            else:
                x, time = case.given(f"fwd.x_{match['time']}"), case.given(f"fwd.t_{match['time']}")
                classes = context.required_classes() if match["label"] == "_cond" else None
            want, last = case.expected(key), match["last"] is not None
            logits = _cached_logits if match["cached"] else _plain_logits
            got = logits(context, x, time, classes, last)
            record.close("forward logits", key, got, want, where=context.valid[:, -1:] if last else context.valid)


def _check_start(context: Context, noise: torch.Tensor, classes: torch.Tensor | None) -> None:
    """Hidden states equal the base's own, and its logits too where both multiply the same rows at once."""
    quantity = "t = 0 equals base, bit for bit"
    rows, index = torch.nonzero(context.valid, as_tuple=True)
    own_class = None if classes is None else classes[rows]
    time = torch.zeros(len(rows))
    hidden, _ = context.model.paths.path_hidden(context.state, rows, index, noise[rows, index], time, own_class)
    context.record.same(quantity, "hidden", hidden, context.state.hidden[rows, index])
    if bool(context.valid.all()):
        got = context.logits(noise, torch.zeros(()), classes)
        base = context.model(context.input_ids, context.attention_mask, context.position_ids).logits
        context.record.same(quantity, "logits", got, base)


def _plain_logits(
    context: Context, x: torch.Tensor, time: torch.Tensor, classes: torch.Tensor | None, last: bool
) -> torch.Tensor:
    return context.logits(x, time, classes, last)


def _cached_logits(
    context: Context, x: torch.Tensor, time: torch.Tensor, classes: torch.Tensor | None, last: bool
) -> torch.Tensor:
    """Logits over a key/value cache that was filled before: in one pass, or for `last` by a prefill and one token."""
    ids, mask, places = context.input_ids, context.attention_mask, context.position_ids
    length, cache = ids.shape[1], DynamicCache()
    if last and length > 1:
        head = None if mask is None else mask[:, :-1]
        context.model.paths.main_path(ids[:, :-1], head, None if places is None else places[:, :-1], cache=cache)
        ids, places = ids[:, -1:], None if places is None else places[:, -1:]
    state = context.model.paths.main_path(ids, mask, places, cache=cache)
    count = ids.shape[1]
    index = torch.arange(count).expand(len(ids), -1).masked_fill(~context.valid[:, -count:], -1)
    time = time.float().expand(len(ids), length)[:, -count:]
    classes = None if classes is None else classes[:, None].expand_as(index)
    logits = context.model.paths.path_logits(state, PathInputs(index, x[:, -count:].float(), time, classes))
    return logits[:, -1:] if last else logits


def check_velocity(context: Context) -> None:
    """`vel.v*` and `vel.x1_token*`, from one Euler step of the solver that decoding uses."""
    case, record = context.case, context.record
    for key, match in case.keys(r"vel\.v(?P<label>_cond|_uncond|_guided_(?P<scale>-?[0-9.]+))?"):
        with record.attempt("velocity", key):
            scale = 1.0 if match["scale"] is None else float(match["scale"])
            classes = context.required_classes() if match["label"] not in (None, "_uncond") else None
            velocity, _ = _velocity(context, scale, classes)
            record.close("velocity", key, velocity, case.expected(key), where=context.valid)
    for key, match in case.keys(r"vel\.x1_token(_cond|_uncond)?"):
        with record.attempt("velocity token", key):
            _, tokens = _velocity(context, 1.0, context.required_classes() if match[1] == "_cond" else None)
            record.same("velocity token", key, tokens, case.expected(key), where=context.valid)


def _velocity(context: Context, scale: float, classes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity (B, L, d) and chosen tokens (B, L) at `vel.t`, `vel.x` and temperature 0."""
    start = float(context.case.given("vel.t"))
    sampler = SamplerConfig(
        budget=2,
        solver="euler",
        start_time=start,
        final_time=1.0,
        guidance_scale=scale,
        guidance_class=None if classes is None else 0,
    )
    x = context.case.given("vel.x")
    solution = context.model.solve(context.state, context.index, x, sampler, classes=classes)
    step = (solution.times[1] - solution.times[0]).double()
    velocity = (solution.trajectory[1] - solution.trajectory[0]) / step
    chosen = solution.chosen[0]
    return velocity, chosen if chosen.dim() == 2 else chosen[..., 0]
