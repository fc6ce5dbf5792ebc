"""The solve: from start noise to the logits of a token, at any number of sites at once.

- `solve_sites`: picks the sequential, speculative or adaptive method
- `solve_sequentially`: the plain solver, to which every faster one must be equal
- `solve_next`: the next token's logits, under the noise of its request
- `solve`: the same for padded sites (B, Q), with the trajectory

Legend: B rows, Q sites per row, N sites, E velocity evaluations, V vocabulary, H hidden size, d diffusion dimension.
"""

import dataclasses

import torch

from l2d.network.main_path import MainPathState
from l2d.network.two_paths import TwoPaths
from l2d.sampler_config import SamplerConfig
from l2d.sampling.adaptive import solve_adaptive
from l2d.sampling.confidence import solve_where_unsure
from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.fixed_grid import FixedGrid, fixed_grid
from l2d.sampling.noise import RequestNoise
from l2d.sampling.sites import Sites, SiteSolution, make_sites
from l2d.sampling.speculation import solve_speculatively

_STATE_ELEMENTS = 1 << 23  # float64 states alive at once


def solve_sites(
    paths: TwoPaths,
    state: MainPathState,
    sites: Sites,
    sampler: SamplerConfig,
    site_class: int | None = None,
    record: bool = False,
) -> SiteSolution:
    """Solve all sites with `sampler` and return the hidden state that the output is read from.

    Args:
        site_class: index of the guidance class, `None` for "no class".
        record: keep clean estimates and chosen tokens of all evaluations (fixed grids).
    """
    evaluator = PathEvaluator(paths, state, sampler, site_class)
    if sampler.is_base:
        nothing = torch.zeros(len(sites), dtype=torch.int64)
        return SiteSolution(evaluator.base_hidden(sites), nothing + 1, nothing, nothing, nothing, nothing.bool())

    def solve_all(sites: Sites) -> SiteSolution:
        return _solve_by_path(evaluator, sites, record)

    if sampler.skip_confidence < 1 and len(sites):
        return solve_where_unsure(evaluator, sites, solve_all, record)
    return solve_all(sites)


def _solve_by_path(evaluator: PathEvaluator, sites: Sites, record: bool) -> SiteSolution:
    """Solve all sites by evaluations of the path, as many at a time as fit into memory."""
    sampler = evaluator.sampler
    if sampler.adaptive:
        return solve_adaptive(evaluator, sites)
    grid = fixed_grid(sampler)
    method = solve_speculatively if speculates(evaluator.paths, sampler) else solve_sequentially
    limit = max(1, _STATE_ELEMENTS // (grid.evaluations * sites.noise.shape[1]))
    if len(sites) <= limit:
        return method(evaluator, sites, grid, record)
    parts = [method(evaluator, sites.take(keep), grid, record) for keep in torch.arange(len(sites)).split(limit)]
    return SiteSolution.join(parts)


def speculates(paths: TwoPaths, sampler: SamplerConfig) -> bool:
    """Whether a fixed-grid `sampler` is solved by speculation along the trajectory."""
    known = sampler.choice == "sample" or sampler.choice_temperature == 0  # states, while the chosen token stays
    return sampler.speculation and known and paths.path.carried_state is None


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


def solve_next(
    paths: TwoPaths,
    state: MainPathState,
    sampler: SamplerConfig,
    rows: torch.Tensor,
    index: torch.Tensor,
    positions: list[int],
    noises: list[RequestNoise],
    start: torch.Tensor | None = None,
) -> tuple[SiteSolution, torch.Tensor]:
    """Solve sites rows, index (N,) of `state` at sequence positions `positions` (N); costs and logits (N, V) float32.

    Args:
        noises: (N) noise of the requests that the sites belong to.
        start: (N, d) float64 start noise in place of theirs.
    """
    sites = make_sites(paths.config, sampler, rows, index, positions, noises, device=paths.device)
    if start is not None and not sampler.is_base:
        sites.noise = start
    solved = solve_sites(paths, state, sites, sampler, sampler.class_index(paths.config.guidance_classes))
    logits = solved.logits
    if logits is None:
        if sampler.is_base:  # with the shape that the base gives its head
            logits = paths.logits(solved.hidden[:, None])[:, 0]
        else:
            logits = PathEvaluator(paths, state, sampler, None).logits(solved.hidden)
    return solved, logits.float().to(paths.device)


# ---- padded sites ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Solution:
    """What `solve` returns for sites (B, Q); padding is zero.

    final_logits (B, Q, V); trajectory (n, B, Q, d) float64 at the time levels `times` (n,); evaluation_times (E,) and
    temperatures (E,) of the velocity evaluations that reach the network; chosen (E, B, Q) int64 tokens, with guidance
    (E, B, Q, 2) for class and no class.
    """

    final_logits: torch.Tensor
    trajectory: torch.Tensor | None = None
    times: torch.Tensor | None = None
    evaluation_times: torch.Tensor | None = None
    temperatures: torch.Tensor | None = None
    chosen: torch.Tensor | None = None


@torch.no_grad()
def solve(
    paths: TwoPaths,
    state: MainPathState,
    index: torch.Tensor,
    x0: torch.Tensor,
    sampler: SamplerConfig,
    classes: torch.Tensor | None = None,
    record: bool = True,
    uniforms: torch.Tensor | None = None,
) -> Solution:
    """Integrate from start noise to the output at sites of a main-path state.

    Args:
        index: (B, Q) int64 positions, -1 at padding; x0: (B, Q, d), already scaled by `noise_std`.
        classes: (B,) int64 guidance class per row; `None` takes `sampler.guidance_class`.
        uniforms: (B, Q, E) numbers for sampled choices.
        record: also return the trajectory and the chosen tokens (fixed grids).

    Returns `Solution`. Source: Cetin et al., 2025, section 3.
    Raises `ValueError` for classes that the model does not have.
    """
    paths.release_stale()
    rows, columns = torch.nonzero(index >= 0, as_tuple=True)
    grid = None if sampler.is_base or sampler.adaptive else fixed_grid(sampler)
    parts, members = [], []
    for site_class, member in _by_class(paths, rows, sampler, classes):
        r, q = rows[member], columns[member]
        sites = Sites(r, index[r, q], x0[r, q].double(), None if uniforms is None else uniforms[r, q])
        parts.append(solve_sites(paths, state, sites, sampler, site_class, record and grid is not None))
        members.append(member)
    solved, order = SiteSolution.join(parts), torch.cat(members)
    rows, columns = rows[order], columns[order]
    final = paths.logits(solved.hidden).to(index.device)
    logits = final.new_zeros(*index.shape, final.shape[-1])
    logits[rows, columns] = final
    if grid is None or solved.clean is None or solved.chosen is None:
        return Solution(logits)
    trajectory = x0.new_zeros(len(grid.levels), *x0.shape, dtype=torch.float64)
    trajectory[:, rows, columns] = grid.trajectory(x0[rows, columns].double(), solved.clean)
    chosen = index.new_zeros(grid.evaluations, *index.shape, solved.chosen.shape[-1])
    chosen[:, rows, columns] = solved.chosen.transpose(0, 1)
    return Solution(
        final_logits=logits,
        trajectory=trajectory,
        times=grid.levels,
        evaluation_times=grid.times[:-1],
        temperatures=torch.tensor(grid.temperatures, dtype=torch.float64),
        chosen=chosen[..., 0] if chosen.shape[-1] == 1 else chosen,
    )


def _by_class(
    paths: TwoPaths, rows: torch.Tensor, sampler: SamplerConfig, classes: torch.Tensor | None
) -> list[tuple[int | None, torch.Tensor]]:
    """Guidance classes of sites with rows (N,), each with the numbers of its sites."""
    names = paths.config.guidance_classes
    if classes is None or not len(rows):
        return [(sampler.class_index(names), torch.arange(len(rows), device=rows.device))]
    used = classes[rows].unique().tolist()
    if not names or not 0 <= min(used) <= max(used) <= len(names):
        raise ValueError(f"classes={used} must be at least 0 and at most the model's {len(names or [])} classes.")
    return [(one, torch.nonzero(classes[rows] == one, as_tuple=True)[0]) for one in used]
