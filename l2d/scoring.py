"""Scoring: log-probabilities of given continuations at any budget.

- `score`: one main-path forward, then all scored positions of all rows as sites of one solve
- `ScoreOutput`: log-probabilities, greedy flags and their cost

Positions are independent given the main path, so nothing here is sequential. The estimate depends on the start noise;
`mc_samples` averages probabilities over several draws. Noise belongs to (request, position): a token is scored under
the noise under which it would have been generated.
"""

import dataclasses
import math

import torch

from l2d.network.main_path import MainPathState
from l2d.network.transfers import upload
from l2d.network.two_paths import TwoPaths
from l2d.sampler_config import SamplerConfig
from l2d.sampling.noise import RequestNoise, default_keys
from l2d.sampling.sites import make_sites
from l2d.sampling.solve import solve_sites

_SITES_PER_SOLVE = 256


@dataclasses.dataclass
class ScoreOutput:
    """Per position (B, S), zero where nothing was scored.

    logprobs float32 (natural logarithm); greedy bool: the token is the most likely one; best int64 and best_logprobs:
    the most likely token; nfe_requested, nfe_computed, passes int64: evaluations requested, evaluations computed,
    batched passes (summed over the draws); capped: number of solves that reached `max_evaluations`.
    """

    logprobs: torch.Tensor
    greedy: torch.Tensor
    best: torch.Tensor
    best_logprobs: torch.Tensor
    nfe_requested: torch.Tensor
    nfe_computed: torch.Tensor
    passes: torch.Tensor
    capped: int = 0


@torch.no_grad()
def score(
    paths: TwoPaths,
    sampler: SamplerConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    continuation_mask: torch.Tensor | None = None,
    request_keys: list[bytes | str | int] | None = None,
) -> ScoreOutput:
    """Score the tokens of right-padded rows that `continuation_mask` marks.

    Args:
        input_ids, attention_mask: (B, S), padding on the right.
        continuation_mask: (B, S) bool, true at tokens to score; position 0 has nothing before it. Default: all others.
        request_keys: identity of each row for its noise; default: the tokens before its first scored one, so that all
            continuations of one context share their noise.

    Raises `ValueError` for masks of another shape, one that marks position 0 or padding, padding before tokens, or a
    wrong number of keys.
    """
    paths.prepare_inference()
    mask = _scored_tokens(input_ids, attention_mask, continuation_mask)
    keys = request_keys if request_keys is not None else _context_keys(input_ids, mask)
    if len(keys) != len(input_ids):
        raise ValueError(f"request_keys has {len(keys)} entries for {len(input_ids)} rows: give one key per row.")
    noises = [RequestNoise(sampler.seed, key) for key in keys]
    rows, positions = torch.nonzero(mask, as_tuple=True)
    shape = input_ids.shape
    count = torch.zeros(shape, dtype=torch.int64, device=input_ids.device)
    output = ScoreOutput(
        logprobs=torch.zeros(shape, device=input_ids.device),
        greedy=torch.zeros(shape, dtype=torch.bool, device=input_ids.device),
        best=count.clone(),
        best_logprobs=torch.zeros(shape, device=input_ids.device),
        nfe_requested=count,
        nfe_computed=count.clone(),
        passes=count.clone(),
    )
    if not len(rows):
        return output
    shorter = None if attention_mask is None else attention_mask[:, :-1]
    state = paths.main_path(input_ids[:, :-1], shorter)  # nothing is predicted from the last token
    for r, p in zip(rows.split(_SITES_PER_SOLVE), positions.split(_SITES_PER_SOLVE), strict=True):
        _score_sites(paths, state, input_ids, r, p, sampler, noises, output)
    return output


def _scored_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, continuation_mask: torch.Tensor | None
) -> torch.Tensor:
    """Tokens to score, (B, S) bool, after a check of both masks."""
    for name, mask in (("attention_mask", attention_mask), ("continuation_mask", continuation_mask)):
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}, and input_ids {tuple(input_ids.shape)}: they must be the same."
            )
    present = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if bool((present[:, 1:] & ~present[:, :-1]).any()):
        raise ValueError("attention_mask marks padding before tokens: pad rows to be scored on the right.")
    if continuation_mask is None:
        scored = present.clone()
        scored[:, 0] = False
        return scored
    scored = continuation_mask.bool()
    if bool(scored[:, 0].any()) or bool((scored & ~present).any()):
        raise ValueError("continuation_mask marks position 0 or padding: only tokens with a context can be scored.")
    return scored


def _context_keys(input_ids: torch.Tensor, mask: torch.Tensor) -> list[bytes]:
    first = mask.float().argmax(1).tolist()
    return [default_keys([row[:count]])[0] for row, count in zip(input_ids.tolist(), first, strict=True)]


def _score_sites(
    paths: TwoPaths,
    state: MainPathState,
    input_ids: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    sampler: SamplerConfig,
    noises: list[RequestNoise],
    output: ScoreOutput,
) -> None:
    """Write scores and costs of the tokens at rows, positions (N,) into `output`."""
    tokens = input_ids[rows, positions]
    requests = [noises[row] for row in rows.tolist()]
    site_class = sampler.class_index(paths.config.guidance_classes)

    def logprobs(draw: int) -> torch.Tensor:
        sites = make_sites(paths.config, sampler, rows, positions - 1, positions.tolist(), requests, draw)
        solved = solve_sites(paths, state, sites, sampler, site_class)
        for name in ("nfe_requested", "nfe_computed", "passes"):
            getattr(output, name)[rows, positions] += upload(getattr(solved, name), rows.device)
        output.capped += int(solved.capped.sum())
        return torch.log_softmax(paths.logits(solved.hidden, sampler.is_base).float(), dim=-1).to(rows.device)

    draws = 1 if sampler.is_base else sampler.mc_samples
    total = logprobs(0)
    for draw in range(1, draws):
        total = torch.logaddexp(total, logprobs(draw))
    total -= math.log(draws)
    output.logprobs[rows, positions] = total.gather(-1, tokens[:, None]).squeeze(-1)
    best = total.argmax(-1)
    output.greedy[rows, positions] = best == tokens
    output.best[rows, positions] = best
    output.best_logprobs[rows, positions] = total.gather(-1, best[:, None]).squeeze(-1)
