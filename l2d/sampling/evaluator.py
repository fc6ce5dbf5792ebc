"""The network as the solvers see it: from states at given sites and times to chosen tokens.

- `clean_estimate`: from logits to the embedding that the velocity points to
- `PathEvaluator`: the diffusion path over one main-path state, for one sampler

Legend: N sites, E velocity evaluations, M flat evaluations, V vocabulary, H hidden size, d diffusion dimension.
"""

from collections.abc import Sequence

import torch

from l2d.network.attention import SiteLayout
from l2d.network.diffusion_path import Modulation
from l2d.network.embeddings import at_least_float32
from l2d.network.main_path import MainPathState
from l2d.network.memory import logit_rows
from l2d.network.transfers import take
from l2d.network.two_paths import TwoPaths
from l2d.sampler_config import SamplerConfig
from l2d.sampling.fixed_grid import FixedGrid, fixed_grid
from l2d.sampling.fixed_shapes import FixedCalls, evaluations_per_row
from l2d.sampling.noise import draw_token
from l2d.sampling.sites import Sites

_ON_CPU = 6 << 20  # logits alive at once
_SHARE = 1 / 64  # of an accelerator's memory


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
        token = logits.argmax(-1).to(table.device)
        return table[token], token
    logits = logits.to(table.device)
    probabilities = torch.softmax(at_least_float32(logits) / temperature, dim=-1)
    if choice == "sample":
        if uniforms is None:
            raise ValueError("choice='sample' at a temperature above 0 needs uniform numbers: give one per site.")
        token = draw_token(probabilities, uniforms)
        return table[token], token
    mean = probabilities @ table.to(probabilities.dtype)
    if normalize:
        mean = torch.nn.functional.normalize(mean, dim=-1) * table[0].norm()
    return mean, logits.argmax(-1)


class PathEvaluator:
    """The diffusion path over one main-path state, for one sampler.

    With guidance every velocity evaluation has two branches, class and no class, in one batch; the last evaluation is
    class-conditional only. Modulation at grid times is computed once and kept by the path.
    """

    def __init__(self, paths: TwoPaths, state: MainPathState, sampler: SamplerConfig, site_class: int | None):
        self.paths, self.state, self.sampler, self.site_class = paths, state, sampler, site_class
        self.table = paths.vocabulary_table()
        self.chunk = logit_rows(self.table.shape[0], state.hidden.device, _ON_CPU, _SHARE)
        classes = len(paths.config.guidance_classes or [])
        own = classes if site_class is None else site_class
        self.branches: tuple[int | None, ...] = (
            (None,) if not classes else ((own, classes) if sampler.guided else (own,))
        )
        self._places: int | None = None  # evaluations of each row in a call
        if not sampler.is_base and not sampler.adaptive:
            ahead = 1 if paths.path.carried_state is not None else fixed_grid(sampler).evaluations
            self._places = evaluations_per_row(state, ahead * len(self.branches) + 1)
        if self._places is not None:
            self.chunk = min(self.chunk, self._places * state.hidden.shape[0])

    def at_evaluations(
        self,
        sites: Sites,
        grid: FixedGrid,
        site: torch.Tensor,
        evaluation: torch.Tensor,
        branch: torch.Tensor | None,
        x: torch.Tensor,
        carried: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused and own hidden states, (M, H) each, of a flat batch of grid evaluations.

        site (M,) in order, evaluation (M,) and branch (M,) are of the host; state x (M, d), carried (M, H): see
        `DiffusionPath.forward`. In half precision on an accelerator, as calls of one shape (`fixed_shapes`).
        """
        kinds = tuple(kind for kind in self.branches if kind is not None) or None
        table = self.paths.path.modulation_table(grid.times, kinds)
        row = evaluation if branch is None else evaluation + branch * len(grid.times)
        if self._places is not None:
            return self._in_fixed_calls(sites, site, row, table, x, carried, self._places)
        # Where all sites are evaluated at the same times, one copy is enough.
        pattern = row[: len(row) // max(1, len(sites))]
        if len(row) and len(pattern) * len(sites) == len(row) and bool((row.view(len(sites), -1) == pattern).all()):
            modulation = table.select(pattern, len(sites))
        else:
            modulation = table.select(row)
        return self._run(sites, site, x, modulation, carried)

    def _in_fixed_calls(
        self,
        sites: Sites,
        site: torch.Tensor,
        row: torch.Tensor,
        table: Modulation,
        x: torch.Tensor,
        carried: torch.Tensor | None,
        count: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`at_evaluations` in calls of `count` evaluations of every row; `row` (M,) is that of the table."""
        calls = FixedCalls.make(sites.rows[site], self.state.hidden.shape[0], count)
        results = []
        for filled, own in zip(calls.filled, calls.own, strict=True):
            # What repeats an evaluation of another row has a position that every row has.
            index = torch.zeros_like(filled).index_copy(0, own, sites.index[site[filled[own]]])
            layout = SiteLayout(self.state, calls.rows, index, masked=True)
            before = None if carried is None else take(carried, filled)
            found = self.paths.path(take(x, filled), table.select(row[filled]), layout, before)
            results.append([take(part, own) for part in found])
        hidden, own_hidden = (take(_joined(parts), calls.order) for parts in zip(*results, strict=True))
        return hidden, own_hidden

    def at_times(self, sites: Sites, x: torch.Tensor, time: torch.Tensor, branches: int) -> torch.Tensor:
        """Hidden states (N, branches, H) of one point per site at its own time: x (N, d), time (N,)."""
        site = torch.arange(len(sites)).repeat_interleave(branches)
        time, x = time.repeat_interleave(branches), x.repeat_interleave(branches, dim=0)
        classes = None
        if self.branches[0] is not None:
            classes = torch.tensor(self.branches[:branches], device=x.device).repeat(len(sites))
        hidden, _ = self._run(sites, site, x, self.paths.path.modulate(time.float(), classes))
        return hidden.unflatten(0, (len(sites), branches))

    def _run(
        self,
        sites: Sites,
        site: torch.Tensor,
        x: torch.Tensor,
        modulation: Modulation,
        carried: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout = SiteLayout(self.state, sites.rows[site], sites.index[site])
        return self.paths.path(x, modulation, layout, carried)

    def choose(self, hidden: torch.Tensor, temperature: float, uniforms: torch.Tensor | None) -> tuple:
        """Clean estimates (M, branches, d) and tokens (M, branches) for hidden states (M, branches, H), in chunks.

        `uniforms` (M,) serve both branches of a guided evaluation.
        """
        flat = hidden.flatten(0, 1)
        if uniforms is not None:
            uniforms = uniforms.repeat_interleave(hidden.shape[1], dim=0)
        parts = [
            self.estimate(
                self._chunk_logits(part),
                temperature,
                None if uniforms is None else uniforms[start * self.chunk : (start + 1) * self.chunk],
            )
            for start, part in enumerate(flat.split(self.chunk))
        ]
        clean, tokens = (_joined(column) for column in zip(*parts, strict=True))
        return clean.unflatten(0, hidden.shape[:2]), tokens.view(hidden.shape[:2])

    def read(self, hidden: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Most likely tokens (M,) for hidden states (M, H), in chunks, and the logits of rows `keep` of the host."""
        kept: list[torch.Tensor] = []
        tokens = []
        for number, part in enumerate(hidden.split(self.chunk)):
            logits = self._chunk_logits(part)
            tokens.append(logits.argmax(-1).to(self.table.device))
            if keep is not None:
                first = number * self.chunk
                kept.append(take(logits, keep[(keep >= first) & (keep < first + self.chunk)] - first))
        return _joined(tokens), _joined(kept) if kept else None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) for hidden states (M, H), in chunks."""
        return _joined([self._chunk_logits(part) for part in hidden.split(self.chunk)])

    def _chunk_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of at most a chunk; in calls of one shape, of exactly a chunk, of which the rest is not used."""
        count = len(hidden)
        if self._places is not None and 0 < count < self.chunk:
            hidden = torch.cat([hidden, hidden[-1:].expand(self.chunk - count, -1)])
        return self.paths.logits(hidden, plain=False)[:count]

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
        hidden = self.state.hidden.flatten(0, 1)
        return take(hidden, sites.rows * self.state.hidden.shape[1] + sites.index)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
