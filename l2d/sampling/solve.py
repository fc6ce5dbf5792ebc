"""The solve: from start noise to the logits of a token, at any number of sites at once.

- `solve_sites`: picks the sequential, speculative or adaptive method, and puts gates before it
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
from l2d.sampling.confidence import behind_gates
from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.fixed_grid import fixed_grid
from l2d.sampling.noise import RequestNoise
from l2d.sampling.sequential import solve_sequentially
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

    return behind_gates(evaluator, solve_all, record)(sites)


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
