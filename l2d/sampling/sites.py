"""Sites: the (row, position) pairs whose next tokens are predicted, and what a solver returns for them.

- `Sites`: rows, positions and noise of N sites
- `SiteSolution`: hidden states, cost and, on request, the trajectory of each
- `make_sites`: sites with the noise of their requests

Legend: N sites, E velocity evaluations, V vocabulary, H hidden size, d diffusion dimension.
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from l2d.config import L2DConfig
from l2d.network.transfers import take, upload
from l2d.sampler_config import SamplerConfig, temperature_at
from l2d.sampling.fixed_grid import fixed_grid
from l2d.sampling.noise import RequestNoise


@dataclasses.dataclass
class Sites:
    """Sites to solve.

    rows (N,) int64, not decreasing; index (N,) int64 among the state's new positions; both are kept on the host.
    noise (N, d) float64, scaled; uniforms (N, >= E) float64 for sampled choices, or `None` where choices are argmax.
    """

    rows: torch.Tensor
    index: torch.Tensor
    noise: torch.Tensor
    uniforms: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.rows, self.index = self.rows.cpu(), self.index.cpu()

    def __len__(self) -> int:
        return self.rows.shape[0]

    def take(self, keep: torch.Tensor) -> "Sites":
        """The sites `keep` (M,), numbers of the host, in their order."""
        keep = keep.cpu()
        uniforms = None if self.uniforms is None else take(self.uniforms, keep)
        return Sites(self.rows[keep], self.index[keep], take(self.noise, keep), uniforms)


@dataclasses.dataclass
class SiteSolution:
    """Result per site.

    hidden (N, H): fused hidden state of the last evaluation, before the final norm; logits (N, V): its logits, where
    the solver computed them.
    nfe_requested, nfe_computed, passes, changes (N,) int64: evaluations requested (T: the free one at t = 0 counts, two
    branches are one), evaluations computed by the network, batched passes, and changes of the chosen token.
    capped (N,) bool: the adaptive solver reached `max_evaluations`. These five are on the host.
    clean (N, E, d) float64 and chosen (N, E, branches) int64: recorded on request, fixed grids only; the sequential
    solver also records the fused hidden states of all evaluations, evaluated (N, E + 1, H), of the first branch.
    """

    hidden: torch.Tensor
    nfe_requested: torch.Tensor
    nfe_computed: torch.Tensor
    passes: torch.Tensor
    changes: torch.Tensor
    capped: torch.Tensor
    clean: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    evaluated: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("nfe_requested", "nfe_computed", "passes", "changes", "capped"):
            setattr(self, name, getattr(self, name).cpu())

    @classmethod
    def join(cls, parts: "list[SiteSolution]") -> "SiteSolution":
        """Solutions of consecutive sites as one."""
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls)}
        whole: dict[str, Any] = {
            name: None if any(v is None for v in values) else torch.cat(values) for name, values in columns.items()
        }
        return cls(**whole)

    def take(self, order: torch.Tensor) -> "SiteSolution":
        """The solutions of sites `order` (M,), numbers of the host, in that order."""
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        taken: dict[str, Any] = {name: None if v is None else take(v, order) for name, v in columns.items()}
        return SiteSolution(**taken)


def make_sites(
    config: L2DConfig,
    sampler: SamplerConfig,
    rows: torch.Tensor,
    index: torch.Tensor,
    positions: list[int],
    noises: list[RequestNoise],
    draw: int = 0,
    device: torch.device | None = None,
) -> Sites:
    """Sites (N,) with draw `draw` of the noise of their requests `noises` (N) at sequence positions `positions` (N).

    `device`: where they are solved; by default that of `rows`.
    """
    dim, device = config.diffusion_dim, rows.device if device is None else device
    if sampler.is_base:
        return Sites(rows, index, torch.zeros(len(rows), dim, dtype=torch.float64, device=device))
    pairs = list(zip(noises, positions, strict=True))
    normal = torch.from_numpy(np.stack([noise.normal(position, draw, dim) for noise, position in pairs]))
    start = upload((normal * config.noise_std).double(), device)
    uniforms = None
    if _needs_uniforms(sampler):
        count = sampler.max_evaluations if sampler.adaptive else fixed_grid(sampler).evaluations
        drawn = np.stack([noise.choices(position, draw, count) for noise, position in pairs])
        uniforms = upload(torch.from_numpy(drawn), device)
    return Sites(rows, index, start, uniforms)


def _needs_uniforms(sampler: SamplerConfig) -> bool:
    """Whether the tokens of a trajectory are sampled, so that every evaluation needs a uniform number."""
    tau = sampler.choice_temperature
    return sampler.choice == "sample" and (isinstance(tau, str) or temperature_at(tau, 0.0) > 0)
