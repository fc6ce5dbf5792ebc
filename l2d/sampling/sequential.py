"""The plain solver, to which every faster one must be equal: `solve_sequentially`.

Legend: N sites, H hidden size, d diffusion dimension.
"""

import torch

from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.fixed_grid import FixedGrid
from l2d.sampling.sites import Sites, SiteSolution


def solve_sequentially(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, record: bool) -> SiteSolution:
    """The plain solver: one evaluation after the other, all sites in step; the first one, at t = 0, is the base's.

    A path with a carried state gets at each evaluation its own hidden state of the one before; the base leaves none.
    """
    count, branches, device = grid.evaluations, len(evaluator.branches), sites.noise.device
    base = evaluator.base_hidden(sites)
    clean = sites.noise.new_zeros(len(sites), count, sites.noise.shape[1])
    chosen = torch.zeros(len(sites), count, branches, dtype=torch.int64, device=device)
    carried = None
    if evaluator.paths.path.carried_state is not None:
        carried = base.new_zeros(len(sites), branches, base.shape[1])
    evaluated: list[torch.Tensor] = []
    for number in range(count):
        # 1. The state x is a linear map of the noise and the clean estimates so far (`FixedGrid`).
        x = grid.states(sites.noise, clean, number)[:, 0]
        # 2. The path's hidden state there; at t = 0 it is the base's.
        if grid.times[number] == 0:
            hidden = base[:, None].expand(-1, branches, -1)
        else:
            hidden = _evaluate(evaluator, sites, grid, number, x, branches, carried)
        # 3. Its logits choose a token; 4. the token's embedding is the clean estimate that the velocity points to.
        uniforms = None if sites.uniforms is None else sites.uniforms[:, number]
        estimates, chosen[:, number] = evaluator.choose(hidden, grid.temperatures[number], uniforms)
        clean[:, number] = evaluator.mix(estimates)
        if record:
            evaluated.append(hidden[:, 0])
    # 5. The output is read at the end of the trajectory, class-conditional only.
    x = grid.states(sites.noise, clean, count)[:, 0]
    output = _evaluate(evaluator, sites, grid, count, x, 1, carried)[:, 0]
    network = count - int(grid.times[0] == 0)  # velocity evaluations that the network computed
    ones = torch.ones(len(sites), dtype=torch.int64)
    return SiteSolution(
        hidden=output,
        nfe_requested=ones * grid.budget,
        nfe_computed=ones * (network * branches + 1),
        passes=ones * (network + 1),
        changes=(chosen.diff(dim=1) != 0).any(-1).sum(1),
        capped=torch.zeros_like(ones, dtype=torch.bool),
        clean=clean if record else None,
        chosen=chosen if record else None,
        evaluated=torch.stack([*evaluated, output], dim=1) if record else None,
    )


def _evaluate(
    evaluator: PathEvaluator,
    sites: Sites,
    grid: FixedGrid,
    number: int,
    x: torch.Tensor,
    branches: int,
    carried: torch.Tensor | None,
) -> torch.Tensor:
    """Hidden states (N, branches, H) of evaluation `number` at states x (N, d); replaces `carried` (N, branches, H)."""
    site = torch.arange(len(sites)).repeat_interleave(branches)
    branch = torch.arange(branches).repeat(len(sites))
    before = None if carried is None else carried[:, :branches].flatten(0, 1)
    x = x.repeat_interleave(branches, dim=0)
    hidden, own = evaluator.at_evaluations(sites, grid, site, torch.full_like(site, number), branch, x, before)
    if carried is not None:
        carried[:, :branches] = own.unflatten(0, (len(sites), branches))
    return hidden.unflatten(0, (len(sites), branches))
