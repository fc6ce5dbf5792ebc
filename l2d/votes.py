"""The next token's logits, over one noise draw or the average of several.

- `solve_next`: sites with their requests' noise, solved; with `SamplerConfig.votes` above 1 all draws in one batch

A token's distribution under M votes is the mean of those that M draws of the start noise give, so that a vote counts by
how sure it is. Draws are numbered, and each is the same noise at every budget and in scoring.
"""

from typing import TYPE_CHECKING

import torch

from l2d.network.main_path import MainPathState
from l2d.sampler_config import SamplerConfig
from l2d.sampling.evaluator import LOGIT_ELEMENTS, Sites, SiteSolution
from l2d.sampling.noise import RequestNoise
from l2d.sampling.solve import solve_sites
from l2d.scoring import make_sites

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM


def solve_next(
    model: "L2DForCausalLM",
    state: MainPathState,
    sampler: SamplerConfig,
    rows: torch.Tensor,
    index: torch.Tensor,
    positions: list[int],
    noises: list[RequestNoise],
    start: torch.Tensor | None = None,
) -> tuple[SiteSolution, torch.Tensor]:
    """Solve places rows, index (N,) of `state`, at sequence positions `positions` (N).

    Args:
        noises: (N) noise of the requests that the places belong to.
        start: (N, d) float64 start noise in place of theirs; for one vote only.

    Returns what was spent per place, summed over the votes (rounds: the most of any), and logits (N, V) float32; with
    more than one vote these are log-probabilities.
    """
    votes = 1 if sampler.is_base else sampler.votes
    site_class = sampler.class_index(model.config.guidance_classes)
    draws = [make_sites(model, sampler, rows, index, positions, noises, draw) for draw in range(votes)]
    if votes == 1:
        (sites,) = draws
        if start is not None and not sampler.is_base:
            sites.noise = start
        solved = solve_sites(model, state, sites, sampler, site_class)
        logits = solved.logits
        if logits is None:
            logits = model._decoder.logits(solved.hidden[:, None], plain=sampler.is_base)[:, 0]
        return solved, logits.float()
    solved = solve_sites(model, state, _interleave(draws), sampler, site_class)
    return _sum_votes(solved, votes), _average(model, solved.hidden, votes)


def _interleave(draws: list[Sites]) -> Sites:
    """Sites (N * M,) of M draws of the same places (N,), draws of one place next to each other."""

    def woven(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts, dim=1).flatten(0, 1)

    rows, index, noise = (woven([getattr(draw, name) for draw in draws]) for name in ("rows", "index", "noise"))
    uniforms = [draw.uniforms for draw in draws if draw.uniforms is not None]
    return Sites(rows, index, noise, woven(uniforms) if uniforms else None)


def _sum_votes(solved: SiteSolution, votes: int) -> SiteSolution:
    """What M votes (N * M,) cost together, per place (N,); the hidden states stay those of the first draws."""
    nfe_requested, nfe_computed, passes, changes, capped = (
        column.view(-1, votes)
        for column in (solved.nfe_requested, solved.nfe_computed, solved.passes, solved.changes, solved.capped)
    )
    return SiteSolution(
        hidden=solved.hidden[::votes],
        nfe_requested=nfe_requested.sum(1),
        nfe_computed=nfe_computed.sum(1),
        passes=passes.amax(1),
        changes=changes.sum(1),
        capped=capped.any(1),
    )


def _average(model: "L2DForCausalLM", hidden: torch.Tensor, votes: int) -> torch.Tensor:
    """Logarithm (N, V) float32 of the mean of the votes' probabilities, from hidden states (N * M, H), in chunks."""
    vocabulary = model.config.get_text_config().vocab_size
    means = []
    for part in hidden.split(votes * max(1, LOGIT_ELEMENTS // (vocabulary * votes))):
        votes_of = torch.log_softmax(model._decoder.logits(part, plain=False).float(), dim=-1).unflatten(0, (-1, votes))
        means.append(votes_of.logsumexp(1) - torch.tensor(float(votes), device=hidden.device).log())
    return torch.cat(means)
