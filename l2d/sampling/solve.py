"""The solve: from start noise to the logits of a token, at any number of places at once.

- `solve_sites`: picks the sequential, speculative or adaptive method
- `solve_sequentially`: the plain solver, to which every faster one must be equal
- `solve`: the same for padded places (B, Q), with the trajectory

Legend: N sites, E velocity evaluations, V vocabulary, H hidden size, d diffusion dimension.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch

from l2d.network.main_path import MainPathState
from l2d.sampler_config import SamplerConfig, temperature_at
from l2d.sampling.adaptive import solve_adaptive
from l2d.sampling.evaluator import PathEvaluator, Sites, SiteSolution
from l2d.sampling.fixed_grid import FixedGrid, fixed_grid
from l2d.sampling.speculation import solve_speculatively

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM

_STATE_ELEMENTS = 1 << 23  # float64 states alive at once


@dataclasses.dataclass
class Solution:
    """What `solve` returns for places (B, Q); padding is zero.

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


def solve_sites(
    model: "L2DForCausalLM",
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
    evaluator = PathEvaluator(model, state, sampler, site_class)
    if sampler.is_base:
        nothing = torch.zeros(len(sites), dtype=torch.int64, device=sites.rows.device)
        return SiteSolution(evaluator.base_hidden(sites), nothing + 1, nothing, nothing, nothing, nothing.bool())
    if sampler.adaptive:
        return solve_adaptive(evaluator, sites)
    grid = fixed_grid(sampler)
    method = solve_speculatively if speculates(model, sampler) else solve_sequentially
    limit = max(1, _STATE_ELEMENTS // (grid.evaluations * sites.noise.shape[1]))
    parts = [
        method(evaluator, sites.take(keep), grid, record)
        for keep in torch.arange(len(sites), device=sites.rows.device).split(limit)
    ]
    return SiteSolution.join(parts)


def speculates(model: "L2DForCausalLM", sampler: SamplerConfig) -> bool:
    """Whether a fixed-grid `sampler` is solved by speculation along the trajectory."""
    known = sampler.choice == "sample" or sampler.choice_temperature == 0  # states, while the chosen token stays
    return sampler.speculation and known and model.path.carried_state is None


def solve_sequentially(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, record: bool) -> SiteSolution:
    """The plain solver: one evaluation after the other, all sites in step; the first one, at t = 0, is the base's.

    A path with a carried state gets at each evaluation its own hidden state of the one before; the base leaves none.
    """
    count, device = grid.evaluations, sites.noise.device
    branches = len(evaluator.branches)
    clean = sites.noise.new_zeros(len(sites), count, sites.noise.shape[1])
    chosen = torch.zeros(len(sites), count, branches, dtype=torch.int64, device=device)
    nfe_computed = 0
    everyone = torch.arange(len(sites), device=device)
    base = evaluator.base_hidden(sites)
    evaluated, carried = [], None
    if evaluator.model.path.carried_state is not None:
        carried = base.new_zeros(len(sites), branches, base.shape[1])

    def evaluate(number: int, branches: int) -> torch.Tensor:
        x = grid.states(sites.noise, clean, number)[:, 0]
        site, x = everyone.repeat_interleave(branches), x.repeat_interleave(branches, dim=0)
        branch = torch.arange(branches, device=device).repeat(len(sites))
        before = None if carried is None else carried[:, :branches].flatten(0, 1)
        hidden, own = evaluator.at_evaluations(sites, grid, site, torch.full_like(site, number), branch, x, before)
        if carried is not None:
            carried[:, :branches] = own.unflatten(0, (len(sites), branches))
        return hidden.unflatten(0, (len(sites), branches))

    for number in range(count):
        uniforms = None if sites.uniforms is None else sites.uniforms[:, number]
        if grid.times[number] == 0:
            hidden = base[:, None].expand(-1, branches, -1)
        else:
            hidden = evaluate(number, branches)
            nfe_computed += branches
        estimates, chosen[:, number] = evaluator.choose(hidden, grid.temperatures[number], uniforms)
        clean[:, number] = evaluator.mix(estimates)
        if record:
            evaluated.append(hidden[:, 0])
    hidden = evaluate(count, 1)[:, 0]
    passes = torch.full((len(sites),), count + int(grid.times[0] != 0), dtype=torch.int64, device=device)
    return SiteSolution(
        hidden=hidden,
        nfe_requested=torch.full_like(passes, grid.budget),
        nfe_computed=torch.full_like(passes, nfe_computed + 1),
        passes=passes,
        changes=(chosen.diff(dim=1) != 0).any(-1).sum(1),
        capped=torch.zeros_like(passes, dtype=torch.bool),
        clean=clean if record else None,
        chosen=chosen if record else None,
        evaluated=torch.stack([*evaluated, hidden], dim=1) if record else None,
    )


@torch.no_grad()
def solve(
    model: "L2DForCausalLM",
    state: MainPathState,
    index: torch.Tensor,
    x0: torch.Tensor,
    sampler: SamplerConfig,
    classes: torch.Tensor | None = None,
    record: bool = True,
    uniforms: torch.Tensor | None = None,
) -> Solution:
    """Integrate from start noise to the output at places of a main-path state.

    Args:
        index: (B, Q) int64 positions, -1 at padding; x0: (B, Q, d), already scaled by `noise_std`.
        classes: (B,) int64 guidance class per row; `None` takes `sampler.guidance_class`.
        uniforms: (B, Q, E) numbers for sampled choices.
        record: also return the trajectory and the chosen tokens (fixed grids).

    Returns `Solution`. Source: Cetin et al., 2025, section 3.
    Raises `ValueError` for votes, and for classes that the model does not have.
    """
    if sampler.votes > 1 and not sampler.is_base:
        raise ValueError(f"x0 gives one start per place, and votes={sampler.votes} need several: leave votes at 1.")
    rows, slots = torch.nonzero(index >= 0, as_tuple=True)
    grid = None if sampler.is_base or sampler.adaptive else fixed_grid(sampler)
    parts, members = [], []
    for site_class, member in _classes_of(model, rows, sampler, classes):
        r, q = rows[member], slots[member]
        sites = Sites(r, index[r, q], x0[r, q].double(), None if uniforms is None else uniforms[r, q])
        parts.append(solve_sites(model, state, sites, sampler, site_class, record and grid is not None))
        members.append(member)
    solved, order = SiteSolution.join(parts), torch.cat(members)
    rows, slots = rows[order], slots[order]
    final = model._decoder.logits(solved.hidden)
    logits = final.new_zeros(*index.shape, final.shape[-1])
    logits[rows, slots] = final
    if grid is None or solved.clean is None or solved.chosen is None:
        return Solution(logits)
    trajectory = x0.new_zeros(len(grid.levels), *x0.shape, dtype=torch.float64)
    trajectory[:, rows, slots] = grid.trajectory(x0[rows, slots].double(), solved.clean)
    chosen = index.new_zeros(grid.evaluations, *index.shape, solved.chosen.shape[-1])
    chosen[:, rows, slots] = solved.chosen.transpose(0, 1)
    return Solution(
        final_logits=logits,
        trajectory=trajectory,
        times=grid.levels,
        evaluation_times=grid.times[:-1],
        temperatures=torch.tensor(grid.temperatures, dtype=torch.float64),
        chosen=chosen[..., 0] if chosen.shape[-1] == 1 else chosen,
    )


def _classes_of(
    model: "L2DForCausalLM", rows: torch.Tensor, sampler: SamplerConfig, classes: torch.Tensor | None
) -> list[tuple[int | None, torch.Tensor]]:
    """Guidance classes of places with rows (N,), each with the numbers of its places."""
    names = model.config.guidance_classes
    if classes is None or not len(rows):
        return [(sampler.class_index(names), torch.arange(len(rows), device=rows.device))]
    found = classes[rows].unique().tolist()
    if not names or not 0 <= min(found) <= max(found) <= len(names):
        raise ValueError(f"classes={found} are not classes of this model, which has {len(names or [])}.")
    return [(one, torch.nonzero(classes[rows] == one, as_tuple=True)[0]) for one in found]


def choice_uniforms_needed(sampler: SamplerConfig) -> bool:
    """Whether the tokens of a trajectory are drawn, so that every evaluation needs a uniform number."""
    tau = sampler.choice_temperature
    return sampler.choice == "sample" and (isinstance(tau, str) or temperature_at(tau, 0.0) > 0)
