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

from l2d.network.transfers import take, upload
from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.fixed_grid import FixedGrid
from l2d.sampling.sites import Sites, SiteSolution

_PER_PASS = 128  # up to which looking further ahead costs little on a CPU,
_PER_PASS_OVERHEAD = 2048  # and where a pass is mostly overhead: on an accelerator, or in a tiny model
_TINY = 256  # hidden size


@dataclasses.dataclass
class _Plan:
    """What one batched pass over pending sites (N) evaluates: evaluations (M,) ordered by site, number and branch.

    All of it is of the host; M' velocity evaluations and, for every site that reaches it, the last one.
    """

    site: torch.Tensor  # (M,)
    evaluation: torch.Tensor  # (M,)
    branch: torch.Tensor  # (M,)
    velocity: torch.Tensor  # (M',) which of the M are velocity evaluations
    last: torch.Tensor  # which of the M are last ones

    @classmethod
    def make(cls, start: torch.Tensor, end: torch.Tensor, count: int, branches: int) -> "_Plan":
        """Evaluations `start` to `end - 1` (N,) of each site; number `count`, the last, for the first branch only."""
        numbers = torch.arange(count + 1)
        pending = (numbers >= start[:, None]) & (numbers < end[:, None])
        pending = pending.unsqueeze(-1).repeat(1, 1, branches)
        pending[:, count, 1:] = False
        site, evaluation, branch = torch.nonzero(pending, as_tuple=True)
        last = evaluation == count
        return cls(site, evaluation, branch, *(torch.nonzero(kind, as_tuple=True)[0] for kind in (~last, last)))


def solve_speculatively(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, record: bool) -> SiteSolution:
    """Same arguments and result as `sequential.solve_sequentially`; `nfe_computed` and `passes` record the cost.

    Which evaluations are pending is kept on the host, which waits once per pass: for the evaluations that differ.
    """
    count, branches, total = grid.evaluations, len(evaluator.branches), len(sites)
    chosen = _first_choice(evaluator, sites, grid).unsqueeze(1).repeat(1, count, branches)  # accepted, then assumed
    accepted = torch.full((total,), int(grid.times[0] == 0), dtype=torch.int64)
    nfe_computed, passes, changes = (torch.zeros_like(accepted) for _ in range(3))
    per_pass = evaluations_per_pass(evaluator.state.hidden)
    solved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    pending = torch.arange(total)
    while len(pending):
        current = sites if len(pending) == total else sites.take(pending)
        assumed = take(chosen, pending)
        start = accepted[pending]
        end = (start + max(1, per_pass // (len(pending) * branches))).clamp(max=count + 1)
        plan = _Plan.make(start, end, count, branches)
        hidden = _evaluate(evaluator, current, grid, assumed, plan, int(start.min()))
        answers, logits = _answers(evaluator, current, grid, hidden, plan, keep_logits=total <= evaluator.chunk)
        change = _first_change(answers, assumed, plan, len(pending))
        right = change == count
        finished = right & (end > count)
        if bool(finished.any()):
            ends = finished[plan.site[plan.last]]
            read = None if logits is None else take(logits, torch.nonzero(ends, as_tuple=True)[0])
            solved.append((pending[finished], take(hidden, plan.last[ends]), read))
        nfe_computed += torch.bincount(pending[plan.site], minlength=total)
        passes[pending] += 1
        changes[pending[~right & (change > 0)]] += 1
        if not bool(right.all()):
            _correct(chosen, answers, plan, pending, change)
        accepted[pending] = torch.where(right, end, change + 1).clamp(max=count)
        pending = pending[~finished]
    if not solved:  # no sites
        solved.append((pending, evaluator.base_hidden(sites), None))
    order = torch.argsort(torch.cat([member for member, _, _ in solved]))
    hiddens, reads = [h for _, h, _ in solved], [read for _, _, read in solved if read is not None]
    return SiteSolution(
        hidden=take(torch.cat(hiddens) if len(solved) > 1 else hiddens[0], order),
        nfe_requested=torch.full_like(nfe_computed, grid.budget),
        nfe_computed=nfe_computed,
        passes=passes,
        changes=changes,
        capped=torch.zeros(total, dtype=torch.bool),
        clean=evaluator.mix(evaluator.table[chosen]) if record else None,
        chosen=chosen if record else None,
        logits=take(torch.cat(reads) if len(reads) > 1 else reads[0], order) if reads else None,
    )


def _first_choice(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid) -> torch.Tensor:
    """What the base chooses at t = 0 (N, 1): the first evaluation's answer, or a guess where the grid starts later."""
    uniforms = None if sites.uniforms is None else sites.uniforms[:, 0]
    return evaluator.choose(evaluator.base_hidden(sites)[:, None], grid.temperatures[0], uniforms)[1]


def evaluations_per_pass(hidden: torch.Tensor) -> int:
    """Evaluations that fill a pass; `hidden` (..., H) gives device and model size."""
    costly = hidden.device.type == "cpu" and hidden.shape[-1] > _TINY
    return _PER_PASS if costly else _PER_PASS_OVERHEAD


def _evaluate(
    evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, chosen: torch.Tensor, plan: _Plan, first: int
) -> torch.Tensor:
    """Hidden states (M, H) of a plan whose earliest evaluation is `first`, for choices (N, E, branches)."""
    states = grid.states(sites.noise, evaluator.mix(evaluator.table[chosen]), first)
    x = take(states.flatten(0, 1), plan.site * states.shape[1] + plan.evaluation - first)
    return evaluator.at_evaluations(sites, grid, plan.site, plan.evaluation, plan.branch, x)[0]


def _answers(
    evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, hidden: torch.Tensor, plan: _Plan, keep_logits: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens (M',) chosen at the velocity evaluations, and logits of the last evaluations."""
    if sites.uniforms is None:
        tokens, logits = evaluator.read(hidden, plan.last if keep_logits else None)
        return take(tokens, plan.velocity), logits
    branches = len(evaluator.branches)
    site, evaluation = (column[plan.velocity][::branches] for column in (plan.site, plan.evaluation))
    hidden = take(hidden, plan.velocity).unflatten(0, (-1, branches))
    answers = torch.empty(hidden.shape[:2], dtype=torch.int64, device=evaluator.table.device)
    for number in evaluation.unique().tolist():  # every evaluation has its own temperature
        here = torch.nonzero(evaluation == number, as_tuple=True)[0]
        uniforms = take(sites.uniforms[:, number], site[here])
        tokens = evaluator.choose(take(hidden, here), grid.temperatures[number], uniforms)[1]
        answers.index_copy_(0, upload(here, answers.device), tokens)
    return answers.flatten(), None


def _first_change(answers: torch.Tensor, assumed: torch.Tensor, plan: _Plan, sites: int) -> torch.Tensor:
    """The first evaluation (N,) of each site that differs from what was assumed (N, E, branches); E where none does."""
    count, branches = assumed.shape[1:]
    site, evaluation, branch = (column[plan.velocity] for column in (plan.site, plan.evaluation, plan.branch))
    expected = take(assumed.flatten(), (site * count + evaluation) * branches + branch)
    differs = (answers != expected).cpu()
    return torch.full((sites,), count).scatter_reduce(0, site[differs], evaluation[differs], "amin")


def _correct(
    chosen: torch.Tensor, answers: torch.Tensor, plan: _Plan, pending: torch.Tensor, change: torch.Tensor
) -> None:
    """Write what sites `pending` (N,) answered at `change` (N,) to that and all later evaluations of `chosen`."""
    count, branches = chosen.shape[1:]
    evaluation, site = plan.evaluation[plan.velocity], plan.site[plan.velocity]
    at = torch.nonzero(evaluation == change[site], as_tuple=True)[0]  # all branches of each site that changed
    changed = site[at][::branches]
    tokens = take(answers, at).view(-1, 1, branches)
    rows = upload(pending[changed], chosen.device)
    later = upload(torch.arange(count) >= change[changed][:, None], chosen.device).unsqueeze(-1)
    chosen[rows] = torch.where(later, tokens, chosen[rows])
