"""The solve: from start noise to the logits of a token, at any number of places at once.

- `Site`s: places (row, position) of a main-path state whose next token is wanted
- `clean_estimate`: from logits to the embedding that the velocity points to
- `PathEvaluator`: the network at given evaluations of given sites; vocabulary table and modulation are made once
- `solve_sites`: picks the sequential, speculative or adaptive method; `solve`: the same for padded (B, Q) places

Legend: N sites, E velocity evaluations, M flat queries, V vocabulary, H hidden size, d diffusion dimension.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch

from l2d.attention import QueryLayout
from l2d.diffusion_path import Modulation
from l2d.embeddings import at_least_float32
from l2d.main_path import MainPathState
from l2d.noise import draw_token
from l2d.sampler_config import SamplerConfig, temperature_at
from l2d.solvers import FixedGrid, fixed_grid

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM

_LOGIT_ELEMENTS = 1 << 23  # logits alive at once while tokens are chosen
_STATE_ELEMENTS = 1 << 23  # float64 states alive at once


@dataclasses.dataclass
class Sites:
    """Places to solve.

    rows (N,) int64, not decreasing; index (N,) int64 among the state's new positions; noise (N, d) float64, scaled;
    uniforms (N, >= E) float64 for sampled choices, or `None` where choices are argmax.
    """

    rows: torch.Tensor
    index: torch.Tensor
    noise: torch.Tensor
    uniforms: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.rows.shape[0]

    def take(self, keep: torch.Tensor) -> "Sites":
        """Some of the sites, in their order."""
        uniforms = None if self.uniforms is None else self.uniforms[keep]
        return Sites(self.rows[keep], self.index[keep], self.noise[keep], uniforms)


@dataclasses.dataclass
class SiteSolution:
    """Result per site.

    hidden (N, H): fused hidden state of the last evaluation, before the final norm.
    computed, rounds, changes (N,) int64: network queries, batched passes, and changes of the chosen token.
    capped (N,) bool: the adaptive solver ran into `max_evaluations`.
    clean (N, E, d) float64 and chosen (N, E, branches) int64: recorded on request, fixed grids only.
    """

    hidden: torch.Tensor
    computed: torch.Tensor
    rounds: torch.Tensor
    changes: torch.Tensor
    capped: torch.Tensor
    clean: torch.Tensor | None = None
    chosen: torch.Tensor | None = None


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


def clean_estimate(
    logits: torch.Tensor,
    table: torch.Tensor,
    choice: str,
    temperature: float,
    normalize: bool = False,
    uniforms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding (..., d) that the velocity points to and the token (...) chosen or most likely, from logits (..., V).

    Args:
        table: (V, d) vocabulary embeddings.
        choice, temperature: see `SamplerConfig`; temperature 0 is argmax for both choices.
        normalize: bring averages to the norm of the table's rows.
        uniforms: (...) numbers in [0, 1) that fix the tokens drawn where `choice` is "sample" and temperature above 0.
    """
    if temperature <= 0:
        token = logits.argmax(-1)
        return table[token], token
    probabilities = torch.softmax(at_least_float32(logits) / temperature, dim=-1)
    if choice == "sample":
        if uniforms is None:
            raise ValueError("choice='sample' at a temperature above 0 needs uniform numbers, one per place.")
        token = draw_token(probabilities, uniforms)
        return table[token], token
    mean = probabilities @ table.to(probabilities.dtype)
    if normalize:
        mean = torch.nn.functional.normalize(mean, dim=-1) * table[0].norm()
    return mean, logits.argmax(-1)


class PathEvaluator:
    """The diffusion path over one main-path state, for one sampler.

    With guidance every velocity evaluation has two branches, class and no class, in one batch; the last evaluation is
    class-conditional only. Modulation at grid times is made once and kept on the model's path.
    """

    def __init__(self, model: "L2DForCausalLM", state: MainPathState, sampler: SamplerConfig, site_class: int | None):
        self.model, self.state, self.sampler = model, state, sampler
        self.table = model.vocabulary_table()
        classes = len(model.config.guidance_classes or [])
        own = classes if site_class is None else site_class
        self.branches: tuple[int | None, ...] = (
            (None,) if not classes else ((own, classes) if sampler.guided else (own,))
        )

    def at_evaluations(
        self,
        sites: Sites,
        grid: FixedGrid,
        site: torch.Tensor,
        evaluation: torch.Tensor,
        x: torch.Tensor,
        branches: int,
    ) -> torch.Tensor:
        """Hidden states (M, branches, H) at evaluations of a grid: sites in order, evaluation (M,), x (M, d)."""
        table = self._grid_table(grid)
        time = grid.times.to(x.device)[evaluation]
        if branches > 1:
            site, time, x = (value.repeat_interleave(branches, dim=0) for value in (site, time, x))
            kinds = torch.arange(branches, device=x.device) * len(grid.times)
            evaluation = (evaluation[:, None] + kinds).flatten()
        return self._run(sites, site, x, time, table.select(evaluation), branches)

    def at_times(self, sites: Sites, x: torch.Tensor, time: torch.Tensor, branches: int) -> torch.Tensor:
        """Hidden states (N, branches, H) of one point per site at its own time: x (N, d), time (N,)."""
        site = torch.arange(len(sites), device=x.device).repeat_interleave(branches)
        time, x = time.repeat_interleave(branches), x.repeat_interleave(branches, dim=0)
        classes = None
        if self.branches[0] is not None:
            classes = torch.tensor(self.branches[:branches], device=x.device).repeat(len(sites))
        return self._run(sites, site, x, time, self.model.path.modulate(time.float(), classes), branches)

    def _grid_table(self, grid: FixedGrid) -> Modulation:
        kinds = None if self.branches[0] is None else self.branches
        return self.model.path.modulation_table(grid.times, kinds)

    def _run(
        self,
        sites: Sites,
        site: torch.Tensor,
        x: torch.Tensor,
        time: torch.Tensor,
        modulation: Modulation,
        branches: int,
    ) -> torch.Tensor:
        layout = QueryLayout(self.state, sites.rows[site], sites.index[site])
        hidden = self.model.path(x, time, modulation, layout)
        return hidden.view(-1, branches, hidden.shape[-1])

    def choose(self, hidden: torch.Tensor, temperature: float, uniforms: torch.Tensor | None) -> tuple:
        """Clean estimates (M, branches, d) and tokens (M, branches) for hidden states (M, branches, H), in chunks.

        `uniforms` (M,) serve both branches of a guided evaluation.
        """
        flat = hidden.flatten(0, 1)
        if uniforms is not None:
            uniforms = uniforms.repeat_interleave(hidden.shape[1], dim=0)
        chunk = max(1, _LOGIT_ELEMENTS // self.table.shape[0])
        parts = [
            self.estimate(
                self.model._decoder.logits(part),
                temperature,
                None if uniforms is None else uniforms[start * chunk : start * chunk + len(part)],
            )
            for start, part in enumerate(flat.split(chunk))
        ]
        clean, tokens = (torch.cat(column) for column in zip(*parts, strict=True))
        return clean.unflatten(0, hidden.shape[:2]), tokens.view(hidden.shape[:2])

    def choose_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """Most likely tokens (M, branches) for hidden states (M, branches, H), in chunks."""
        chunk = max(1, _LOGIT_ELEMENTS // self.table.shape[0])
        parts = [self.model._decoder.logits(part).argmax(-1) for part in hidden.flatten(0, 1).split(chunk)]
        return torch.cat(parts).view(hidden.shape[:2])

    def estimate(self, logits: torch.Tensor, temperature: float, uniforms: torch.Tensor | None) -> tuple:
        """`clean_estimate` under this sampler's settings."""
        s = self.sampler
        return clean_estimate(logits, self.table, s.choice, temperature, s.normalize_average, uniforms)

    def mix(self, clean: torch.Tensor) -> torch.Tensor:
        """Guided clean estimate (..., d) float64 from branches (..., branches, d)."""
        clean = clean.double()
        if clean.shape[-2] == 1:
            return clean[..., 0, :]
        scale = self.sampler.guidance_scale
        return scale * clean[..., 0, :] + (1 - scale) * clean[..., 1, :]

    def base_hidden(self, sites: Sites) -> torch.Tensor:
        """The base's hidden states under the sites (N, H), before the final norm."""
        return self.state.hidden[sites.rows, sites.index]


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
    from l2d.adaptive import solve_adaptive
    from l2d.speculation import solve_speculatively

    evaluator = PathEvaluator(model, state, sampler, site_class)
    if sampler.is_base:
        nothing = torch.zeros(len(sites), dtype=torch.int64, device=sites.rows.device)
        return SiteSolution(evaluator.base_hidden(sites), nothing, nothing, nothing, nothing.bool())
    if sampler.adaptive:
        return solve_adaptive(evaluator, sites)
    grid = fixed_grid(sampler)
    method = solve_speculatively if _may_speculate(sampler) else solve_sequentially
    limit = max(1, _STATE_ELEMENTS // (grid.evaluations * sites.noise.shape[1]))
    parts = [
        method(evaluator, sites.take(keep), grid, record)
        for keep in torch.arange(len(sites), device=sites.rows.device).split(limit)
    ]
    return parts[0] if len(parts) == 1 else _concatenate(parts)


def _may_speculate(sampler: SamplerConfig) -> bool:
    return sampler.speculation and (sampler.choice == "sample" or sampler.choice_temperature == 0)


def _concatenate(parts: list[SiteSolution]) -> SiteSolution:
    columns = {}
    for field in dataclasses.fields(SiteSolution):
        values = [getattr(part, field.name) for part in parts]
        columns[field.name] = None if values[0] is None else torch.cat(values)
    return SiteSolution(**columns)


def solve_sequentially(evaluator: PathEvaluator, sites: Sites, grid: FixedGrid, record: bool) -> SiteSolution:
    """The plain solver: one evaluation after the other, all sites in step; the first one, at t = 0, is the base's."""
    count, device = grid.evaluations, sites.noise.device
    branches = len(evaluator.branches)
    clean = sites.noise.new_zeros(len(sites), count, sites.noise.shape[1])
    chosen = torch.zeros(len(sites), count, branches, dtype=torch.int64, device=device)
    computed = 0
    everyone = torch.arange(len(sites), device=device)

    def evaluate(number: int, branches: int) -> torch.Tensor:
        x = grid.states(sites.noise, clean, number)[:, 0]
        return evaluator.at_evaluations(sites, grid, everyone, torch.full_like(everyone, number), x, branches)

    for number in range(count):
        uniforms = None if sites.uniforms is None else sites.uniforms[:, number]
        if grid.times[number] == 0:
            hidden = evaluator.base_hidden(sites)[:, None].expand(-1, branches, -1)
        else:
            hidden = evaluate(number, branches)
            computed += branches
        estimates, chosen[:, number] = evaluator.choose(hidden, grid.temperatures[number], uniforms)
        clean[:, number] = evaluator.mix(estimates)
    hidden = evaluate(count, 1)[:, 0]
    rounds = torch.full((len(sites),), count + 1 - (grid.times[0] == 0).long(), dtype=torch.int64, device=device)
    return SiteSolution(
        hidden=hidden,
        computed=torch.full_like(rounds, computed + 1),
        rounds=rounds,
        changes=(chosen.diff(dim=1) != 0).any(-1).sum(1),
        capped=torch.zeros_like(rounds, dtype=torch.bool),
        clean=clean if record else None,
        chosen=chosen if record else None,
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
    """
    valid = index >= 0
    rows, slots = torch.nonzero(valid, as_tuple=True)
    default = sampler.class_index(model.config.guidance_classes) if not (classes is not None) else None
    groups = [(default, torch.ones_like(rows, dtype=torch.bool))]
    if classes is not None:
        groups = [(int(c), classes[rows] == c) for c in classes.unique()]
    logits = final = chosen = None
    grid = None if sampler.is_base or sampler.adaptive else fixed_grid(sampler)
    trajectory = None
    for site_class, member in groups:
        r, q = rows[member], slots[member]
        sites = Sites(r, index[r, q], x0[r, q].double(), None if uniforms is None else uniforms[r, q])
        solved = solve_sites(model, state, sites, sampler, site_class, record and grid is not None)
        final = model._decoder.logits(solved.hidden)
        if logits is None:
            logits = final.new_zeros(*index.shape, final.shape[-1])
            if record and grid is not None:
                trajectory = x0.new_zeros(len(grid.levels), *x0.shape, dtype=torch.float64)
                chosen = index.new_zeros(grid.evaluations, *index.shape, solved.chosen.shape[-1])
        logits[r, q] = final
        if trajectory is not None:
            trajectory[:, r, q] = grid.trajectory(sites.noise, solved.clean)
            chosen[:, r, q] = solved.chosen.transpose(0, 1)
    if trajectory is None:
        return Solution(logits)
    return Solution(
        final_logits=logits,
        trajectory=trajectory,
        times=grid.levels,
        evaluation_times=grid.times[:-1],
        temperatures=torch.tensor(grid.temperatures, dtype=torch.float64),
        chosen=chosen[..., 0] if chosen.shape[-1] == 1 else chosen,
    )


def choice_uniforms_needed(sampler: SamplerConfig) -> bool:
    """Whether the tokens of a trajectory are drawn, so that every evaluation needs a uniform number."""
    tau = sampler.choice_temperature
    return sampler.choice == "sample" and (isinstance(tau, str) or temperature_at(tau, 0.0) > 0)
