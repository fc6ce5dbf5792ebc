"""Speculation along the trajectory: a whole solve in about one batched pass, with the sequential solver's result.

- `solve_speculatively`: assume that the chosen token stays, evaluate all remaining points at once, accept, correct
- `evaluations_per_pass`: how many evaluations cost about as much as one

While the choice stays the same all remaining states are known (`FixedGrid`), so they are evaluated in one batch.
Evaluations up to and including the first one whose choice differs from the assumption saw the right state and are
accepted; the rest is computed again with the new choice. Passes per token: 1 + number of changes of the chosen token.
Sampled choices work alike, since the uniform number of every evaluation is fixed beforehand.

A pass of few evaluations costs about as much as a pass of one, so a few sites look ahead all the way. Many sites fill a
pass by themselves and look ahead only as far as it takes to fill it: less of what is computed is discarded.
"""

import dataclasses

import torch

from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.fixed_grid import FixedGrid
from l2d.sampling.sites import Sites, SiteSolution

_PER_PASS = 128  # up to which looking further ahead costs little on a CPU,
_PER_PASS_OVERHEAD = 2048  # and where a pass is mostly overhead: on an accelerator, or in a tiny model
_TINY = 256  # hidden size


@dataclasses.dataclass
class _Pass:
    """One batched pass over pending sites (N): evaluations (M,) ordered by site, number and branch."""

    site: torch.Tensor
    evaluation: torch.Tensor
    hidden: torch.Tensor  # (M, H)


def solve_speculatively(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, record: bool) -> SiteSolution:
    """Same arguments and result as `sampling.solve_sequentially`; `nfe_computed` and `passes` record the cost."""
    count, device = grid.evaluations, sites.noise.device
    branches, total = len(evaluator.branches), len(sites)
    chosen = _first_choice(evaluator, sites, grid).unsqueeze(1).repeat(1, count, branches)  # accepted, then assumed
    accepted = torch.full((total,), int(grid.times[0] == 0), dtype=torch.int64, device=device)
    nfe_computed, passes = torch.zeros_like(accepted), torch.zeros_like(accepted)
    output, logits = torch.empty_like(evaluator.base_hidden(sites)), None
    numbers = torch.arange(count, device=device)

    pending = torch.arange(total, device=device)
    while len(pending):
        everyone = len(pending) == total
        current, assumed = (sites, chosen) if everyone else (sites.take(pending), chosen[pending])
        start = accepted if everyone else accepted[pending]
        ahead = max(1, evaluations_per_pass(output) // (len(pending) * branches))
        end = (start + ahead).clamp(max=count + 1)
        done = _evaluate(evaluator, current, grid, assumed, start, end)
        answers, read = _answers(evaluator, current, grid, done, assumed, keep_logits=total <= evaluator.chunk)
        differs = (answers != assumed).any(-1) & (numbers >= start[:, None])
        change = torch.where(differs, numbers, count).amin(1)  # the first evaluation that differs; `count`: none
        right = change == count
        solved = right & (end > count)
        finished = pending[solved]
        last = done.evaluation == count
        output[finished] = done.hidden[last][right[done.site[last]]]
        if read is not None:
            logits = read.new_empty(total, read.shape[-1]) if logits is None else logits
            logits[finished] = read[right[done.site[last]]]
        nfe_computed[pending] += torch.bincount(done.site, minlength=len(pending))
        passes[pending] += 1
        answer = answers.gather(1, change.clamp(max=count - 1)[:, None, None].expand(-1, 1, branches))
        chosen[pending] = torch.where((numbers >= change[:, None]).unsqueeze(-1), answer, assumed)
        accepted[pending] = torch.where(right, end, change + 1).clamp(max=count)
        pending = pending[~solved]
    return SiteSolution(
        hidden=output,
        nfe_requested=torch.full_like(nfe_computed, grid.budget),
        nfe_computed=nfe_computed,
        passes=passes,
        changes=(chosen.diff(dim=1) != 0).any(-1).sum(1),
        capped=torch.zeros(total, dtype=torch.bool, device=device),
        clean=evaluator.mix(evaluator.table[chosen]) if record else None,
        chosen=chosen if record else None,
        logits=logits,
    )


def _first_choice(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid) -> torch.Tensor:
    """What the base chooses at t = 0 (N, 1): the first evaluation's answer, or a guess where the grid starts later."""
    uniforms = None if sites.uniforms is None else sites.uniforms[:, 0]
    _, tokens = evaluator.choose(evaluator.base_hidden(sites)[:, None], grid.temperatures[0], uniforms)
    return tokens


def evaluations_per_pass(hidden: torch.Tensor) -> int:
    """Evaluations that fill a pass; `hidden` (..., H) gives device and model size."""
    costly = hidden.device.type == "cpu" and hidden.shape[-1] > _TINY
    return _PER_PASS if costly else _PER_PASS_OVERHEAD


def _evaluate(
    evaluator: PathEvaluator,
    sites: Sites,
    grid: FixedGrid,
    chosen: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
) -> _Pass:
    """Evaluations `start` to `end - 1` (N,) of each site; the last one of the grid for the first branch only."""
    count, branches = grid.evaluations, chosen.shape[-1]
    numbers = torch.arange(count + 1, device=start.device)
    pending = (numbers >= start[:, None]) & (numbers < end[:, None])
    pending = pending.unsqueeze(-1).repeat(1, 1, branches)
    pending[:, count, 1:] = False
    site, evaluation, branch = torch.nonzero(pending, as_tuple=True)
    first = int(start.min())
    states = grid.states(sites.noise, evaluator.mix(evaluator.table[chosen]), first)
    x = states[site, evaluation - first]
    hidden, _ = evaluator.at_evaluations(sites, grid, site, evaluation, branch, x)
    return _Pass(site, evaluation, hidden)


def _answers(
    evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, done: _Pass, assumed: torch.Tensor, keep_logits: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens chosen (N, E, branches), as assumed where nothing was evaluated, and logits of the last evaluations."""
    count, branches = grid.evaluations, assumed.shape[-1]
    velocity = done.evaluation < count
    site, evaluation = done.site[velocity][::branches], done.evaluation[velocity][::branches]
    answers = assumed.clone()
    if sites.uniforms is None:
        tokens, logits = evaluator.read(done.hidden, ~velocity if keep_logits else None)
        answers[site, evaluation] = tokens[velocity].view(-1, branches)
        return answers, logits
    hidden = done.hidden[velocity].unflatten(0, (-1, branches))
    for number in evaluation.unique().tolist():  # every evaluation has its own temperature
        here = evaluation == number
        uniforms = sites.uniforms[site[here], number]
        answers[site[here], number] = evaluator.choose(hidden[here], grid.temperatures[number], uniforms)[1]
    return answers, None
