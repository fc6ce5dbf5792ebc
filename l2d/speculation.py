"""Speculation along the trajectory: a whole solve in about one batched pass, with the sequential solver's result.

- `solve_speculatively`: assume that the chosen token stays, evaluate all remaining points at once, accept, correct

While the choice stays the same all remaining states are known (`solvers.FixedGrid`), so they are queries of one batch.
Evaluations up to and including the first one whose choice differs from the assumption saw the right state and are
accepted; the rest is done again with the new choice. Rounds per token: 1 + number of changes of the chosen token.
Sampled choices work alike, since the uniform number of every evaluation is fixed beforehand.
"""

import torch

from l2d.sampling import PathEvaluator, Sites, SiteSolution
from l2d.solvers import FixedGrid


def solve_speculatively(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, record: bool) -> SiteSolution:
    """Same arguments and result as `sampling.solve_sequentially`; `computed` and `rounds` tell what was spent."""
    count, device = grid.evaluations, sites.noise.device
    branches, total = len(evaluator.branches), len(sites)
    chosen = torch.zeros(total, count, branches, dtype=torch.int64, device=device)  # accepted, then assumed
    accepted = torch.zeros(total, dtype=torch.int64, device=device)
    computed, rounds = torch.zeros_like(accepted), torch.zeros_like(accepted)
    output = torch.empty_like(evaluator.base_hidden(sites))

    first = _first_choice(evaluator, sites, grid)
    chosen += first[:, None]
    if grid.times[0] == 0:
        accepted += 1
    pending = torch.arange(total, device=device)
    while len(pending):
        current = sites.take(pending)
        hidden, site, evaluation = _evaluate_rest(evaluator, current, grid, chosen[pending], accepted[pending])
        velocity = evaluation < count
        answers = _answers(evaluator, current, grid, hidden[velocity], site[velocity], evaluation[velocity])
        assumed = chosen[pending][site[velocity], evaluation[velocity]]
        wrong = (answers != assumed).any(-1)
        # The first wrong evaluation of each site; `count` where all were as assumed.
        place = torch.full_like(pending, count).scatter_reduce(
            0, site[velocity], torch.where(wrong, evaluation[velocity], count), "amin"
        )
        points = (count - accepted[pending]) * branches + 1
        computed[pending] += points
        rounds[pending] += 1
        done = place == count
        last = ~velocity
        output[pending[done]] = hidden[last][done][:, 0]
        hit = wrong & (evaluation[velocity] == place[site[velocity]])
        tail = torch.arange(count, device=device) >= place[:, None]  # (pending, E), from the wrong one on
        replacement = torch.zeros_like(chosen[pending][:, 0])
        replacement[site[velocity][hit]] = answers[hit]
        chosen[pending] = torch.where(tail[..., None], replacement[:, None], chosen[pending])
        accepted[pending] = torch.minimum(place + 1, torch.full_like(place, count))
        pending = pending[~done]
    return SiteSolution(
        hidden=output,
        computed=computed,
        rounds=rounds,
        changes=(chosen.diff(dim=1) != 0).any(-1).sum(1),
        capped=torch.zeros(total, dtype=torch.bool, device=device),
        clean=evaluator.mix(evaluator.table[chosen]) if record else None,
        chosen=chosen if record else None,
    )


def _first_choice(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid) -> torch.Tensor:
    """What the base chooses at t = 0 (N, 1): the first evaluation's answer, or a guess where the grid starts later."""
    uniforms = None if sites.uniforms is None else sites.uniforms[:, 0]
    _, tokens = evaluator.choose(evaluator.base_hidden(sites)[:, None], grid.temperatures[0], uniforms)
    return tokens


def _evaluate_rest(
    evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, chosen: torch.Tensor, accepted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All evaluations from each site's first unaccepted one on: hidden (M, branches, H), site and evaluation (M,)."""
    count = grid.evaluations
    numbers = torch.arange(count + 1, device=accepted.device)
    site, evaluation = torch.nonzero(numbers >= accepted[:, None], as_tuple=True)
    first = int(accepted.min())
    states = grid.states(sites.noise, evaluator.mix(evaluator.table[chosen]), first)
    x = states[site, evaluation - first]
    branches = len(evaluator.branches)
    return evaluator.at_evaluations(sites, grid, site, evaluation, x, branches), site, evaluation


def _answers(
    evaluator: PathEvaluator,
    sites: Sites,
    grid: FixedGrid,
    hidden: torch.Tensor,
    site: torch.Tensor,
    evaluation: torch.Tensor,
) -> torch.Tensor:
    """Chosen tokens (M, branches) at given evaluations, with each evaluation's temperature and uniform number."""
    if sites.uniforms is None:
        return evaluator.choose_tokens(hidden)
    tokens = torch.empty(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    for number in evaluation.unique().tolist():
        here = evaluation == number
        uniforms = sites.uniforms[site[here], number]
        tokens[here] = evaluator.choose(hidden[here], grid.temperatures[number], uniforms)[1]
    return tokens
