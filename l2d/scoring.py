"""Scoring: log-probabilities of given continuations at any budget.

- `score`: one main-path forward, then all wanted positions of all rows as sites of one solve
- `ScoreOutput`: log-probabilities, greedy flags and what they cost
- `make_sites`: places with the noise of their requests

Positions are independent given the main path, so nothing here is sequential. The estimate depends on the start noise;
`mc_samples` and `votes` average probabilities over several draws. Noise belongs to (request, position): the noise under
which a token is scored is the noise under which it would have been generated.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from l2d.network.main_path import MainPathState
from l2d.sampler_config import SamplerConfig
from l2d.sampling.evaluator import Sites
from l2d.sampling.fixed_grid import fixed_grid
from l2d.sampling.noise import RequestNoise, default_keys
from l2d.sampling.solve import choice_uniforms_needed, solve_sites

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM

_SITES_PER_SOLVE = 256


@dataclasses.dataclass
class ScoreOutput:
    """Per position (B, S), zero where nothing was scored.

    logprobs float32 (natural logarithm); greedy bool: the token is the most likely one; asked, computed, rounds int64:
    evaluations asked for, network queries made, batched passes (summed over the draws); capped: number of solves
    that ran into `max_evaluations`.
    """

    logprobs: torch.Tensor
    greedy: torch.Tensor
    nfe_requested: torch.Tensor
    nfe_computed: torch.Tensor
    passes: torch.Tensor
    capped: int = 0


@torch.no_grad()
def score(
    model: "L2DForCausalLM",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    continuation_mask: torch.Tensor | None = None,
    sampler: SamplerConfig | dict[str, Any] | None = None,
    request_keys: list[bytes | str | int] | None = None,
) -> ScoreOutput:
    """Score the tokens of right-padded rows that `continuation_mask` marks.

    Args:
        input_ids, attention_mask: (B, S), padding on the right.
        continuation_mask: (B, S) bool, true at tokens to score; position 0 has nothing before it. Default: all others.
        sampler: overrides of the checkpoint's sampler settings.
        request_keys: identity of each row for its noise; default: the tokens before its first scored one, so that all
            continuations of one context share their noise.

    Raises `ValueError` for masks of another shape, one that marks position 0 or padding, padding before tokens, or a
    wrong number of keys.
    """
    sampler = model.sampler(sampler)
    model.prepare_inference()
    wanted = _wanted(input_ids, attention_mask, continuation_mask)
    keys = request_keys if request_keys is not None else _context_keys(input_ids, wanted)
    if len(keys) != len(input_ids):
        raise ValueError(f"request_keys has {len(keys)} entries for {len(input_ids)} rows: give one key per row.")
    noises = [RequestNoise(sampler.seed, key) for key in keys]
    rows, places = torch.nonzero(wanted, as_tuple=True)
    shape = input_ids.shape
    count = torch.zeros(shape, dtype=torch.int64, device=input_ids.device)
    output = ScoreOutput(
        logprobs=torch.zeros(shape, device=input_ids.device),
        greedy=torch.zeros(shape, dtype=torch.bool, device=input_ids.device),
        nfe_requested=count,
        nfe_computed=count.clone(),
        passes=count.clone(),
    )
    if not len(rows):
        return output
    shorter = None if attention_mask is None else attention_mask[:, :-1]
    state = model.main_path(input_ids[:, :-1], shorter)  # nothing is predicted from the last token
    for r, p in zip(rows.split(_SITES_PER_SOLVE), places.split(_SITES_PER_SOLVE), strict=True):
        _score_sites(model, state, input_ids, r, p, sampler, noises, output)
    return output


def _wanted(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, continuation_mask: torch.Tensor | None
) -> torch.Tensor:
    """Tokens to score, (B, S) bool, after a look at both masks."""
    for name, mask in (("attention_mask", attention_mask), ("continuation_mask", continuation_mask)):
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}, and input_ids {tuple(input_ids.shape)}: they must be the same."
            )
    present = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if bool((present[:, 1:] & ~present[:, :-1]).any()):
        raise ValueError("attention_mask marks padding before tokens: pad rows to be scored on the right.")
    if continuation_mask is None:
        wanted = present.clone()
        wanted[:, 0] = False
        return wanted
    wanted = continuation_mask.bool()
    if bool(wanted[:, 0].any()) or bool((wanted & ~present).any()):
        raise ValueError("continuation_mask marks position 0 or padding: only tokens with a context can be scored.")
    return wanted


def _context_keys(input_ids: torch.Tensor, wanted: torch.Tensor) -> list[bytes]:
    first = wanted.float().argmax(1).tolist()
    return [default_keys([row[:count]])[0] for row, count in zip(input_ids.tolist(), first, strict=True)]


def _score_sites(
    model: "L2DForCausalLM",
    state: MainPathState,
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    places: torch.Tensor,
    sampler: SamplerConfig,
    noises: list[RequestNoise],
    output: ScoreOutput,
) -> None:
    tokens = input_ids[rows, places]
    owners = [noises[row] for row in rows.tolist()]
    site_class = sampler.class_index(model.config.guidance_classes)

    def logprobs(draw: int) -> torch.Tensor:
        sites = make_sites(model, sampler, rows, places - 1, places.tolist(), owners, draw)
        solved = solve_sites(model, state, sites, sampler, site_class)
        output.nfe_requested[rows, places] += solved.nfe_requested
        output.nfe_computed[rows, places] += solved.nfe_computed
        output.passes[rows, places] += solved.passes
        output.capped += int(solved.capped.sum())
        return torch.log_softmax(model._decoder.logits(solved.hidden, sampler.is_base).float(), dim=-1)

    total = logprobs(0)
    for draw in range(1, sampler.scored_draws):
        total = torch.logaddexp(total, logprobs(draw))
    total -= float(np.log(sampler.scored_draws))
    output.logprobs[rows, places] = total.gather(-1, tokens[:, None]).squeeze(-1)
    output.greedy[rows, places] = total.argmax(-1) == tokens


def make_sites(
    model: "L2DForCausalLM",
    sampler: SamplerConfig,
    rows: torch.Tensor,
    index: torch.Tensor,
    positions: list[int],
    noises: list[RequestNoise],
    draw: int = 0,
) -> Sites:
    """Sites (N,) with draw `draw` of the noise of their requests at sequence positions `positions` (N)."""
    dim, std = model.config.diffusion_dim, model.config.noise_std
    device = rows.device
    if sampler.is_base:
        return Sites(rows, index, torch.zeros(len(rows), dim, dtype=torch.float64, device=device))
    pairs = list(zip(noises, positions, strict=True))
    normal = torch.from_numpy(np.stack([noise.normal(position, draw, dim) for noise, position in pairs]))
    start = (normal * std).to(device).double()
    uniforms = None
    if choice_uniforms_needed(sampler):
        count = sampler.max_evaluations if sampler.adaptive else fixed_grid(sampler).evaluations
        drawn = np.stack([noise.choices(position, draw, count) for noise, position in pairs])
        uniforms = torch.from_numpy(drawn).to(device)
    return Sites(rows, index, start, uniforms)
