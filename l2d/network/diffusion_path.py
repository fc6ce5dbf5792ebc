"""The diffusion path: the base's layers again, with a few trained weights, over the main path's keys and values.

- `PathInputs`, `NoisedTargets`: evaluations at padded sites, with given states, and with noised targets for training
- `Modulation`: scales, shifts and gates of every layer for a list of times
- `DiffusionPath`: the trained modules; a flat batch of evaluations in, hidden states out

A site is a (row, position) whose next token is predicted. An evaluation of the path at a site has a state x, a time t
and a class. Evaluations never see each other, so any number of them is one batch.
Legend: N evaluations, Q sites per row, H hidden size, C conditioning width, d diffusion dimension, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from l2d.config import L2DConfig
from l2d.network.attention import SiteLayout
from l2d.network.embeddings import (
    CarriedState,
    InputProjection,
    TimeEmbedding,
    VocabularyEmbedding,
    at_least_float32,
    full_precision,
    modulation_head,
    version,
)
from l2d.network.main_path import Decoder, LayerState
from l2d.network.own_keys_values import OwnKeys, OwnValues, read
from l2d.network.path_layers import TwinLayer, build_twin
from l2d.network.transfers import spacing, take, upload

_AT_ONCE = 64 << 20  # bytes of modulation that are copied for all layers at once


@dataclasses.dataclass
class PathInputs:
    """One evaluation per site: index (B, Q) int64 with -1 at padding, x (B, Q, d), time (B, Q), classes (B, Q) or None.

    Classes are int64; `None` is "no class" everywhere.
    """

    index: torch.Tensor
    x: torch.Tensor
    time: torch.Tensor
    classes: torch.Tensor | None = None


@dataclasses.dataclass
class NoisedTargets:
    """Training targets with K noise draws for every site, each evaluated once or rolled out.

    Attributes:
        index: (B, Q) int64, position whose next token is predicted; -1 at padding.
        targets: (B, Q) int64, that next token.
        time: (K, B, Q) float32, t of every draw; for a rollout (J, K, B, Q), rising, of its J evaluations.
        noise: (K, B, Q, d) float32, unit normal.
        classes: (K, B, Q) int64 after dropout, or `None` for "no class" everywhere.
        sources: (K, B, Q) int64 tokens that `x_t` is built from in place of the targets; -1 for a sample
            of the base's distribution without the target, which `uniforms` (K, B, Q) float64 fix.
        unscored: makes it a rollout: how many of its first evaluations have no loss.
        spared: (B, Q) bool, sites that are left out where the base is almost sure of the target; `None` for no site.
    """

    index: torch.Tensor
    targets: torch.Tensor
    time: torch.Tensor
    noise: torch.Tensor
    classes: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    uniforms: torch.Tensor | None = None
    unscored: int | None = None
    spared: torch.Tensor | None = None

    @property
    def scored_time(self) -> torch.Tensor:
        """Times (K', B, Q) of all evaluations that have a loss; K' is K times their number per draw."""
        return self.time if self.unscored is None else self.time[self.unscored :].flatten(0, 1)

    def select(self, index: torch.Tensor, draws: slice) -> "NoisedTargets":
        """Some of the draws, at the sites `index` (B, Q)."""
        time = self.time[draws] if self.unscored is None else self.time[:, draws]
        per_draw = {name: getattr(self, name) for name in ("noise", "classes", "sources", "uniforms")}
        chosen: dict[str, Any] = {name: None if values is None else values[draws] for name, values in per_draw.items()}
        return dataclasses.replace(self, index=index, time=time, **chosen)


@dataclasses.dataclass
class Modulation:
    """What time and class do to the path: a row per evaluation, or per evaluation of a pattern that the batch repeats.

    Attributes (P rows for N = repeats * P evaluations):
        output: (P, H), the factor of the path in the output: `w(t) - w(0)`, with a warm start `t + w(t) - w(0)`.
        input_std: (P, 1), by which states are divided.
        embedding: (P, C), of which each layer makes its own modulation once it is its turn, so that training need not
            keep those of all layers.
        stacks: (n, P, 6H) for each run of n layers on one device, precomputed for a grid of times: scale, shift and
            gate of attention, then of the MLP, with the norms' weights added to the scales.
        repeats: how many times the batch repeats the P rows.
        rows: (P,) rows of `stacks` that are meant, `None` for all.
    """

    output: torch.Tensor
    input_std: torch.Tensor
    embedding: torch.Tensor | None = None
    stacks: list[torch.Tensor] | None = None
    repeats: int = 1
    rows: torch.Tensor | None = None

    def select(self, rows: torch.Tensor, repeats: int = 1) -> "Modulation":
        """The modulation of rows (P,) of a table, numbers of the host, for a batch that repeats them.

        Rows that follow each other are a view of the table. Others are copied: those of all layers at once where that
        is little memory, otherwise each layer's once it is its turn.
        """
        if self.stacks is None:
            raise ValueError("only a table of modulations has rows: make one with `modulation_table`.")
        output, std = take(self.output, rows), take(self.input_std, rows)
        even = spacing(rows)
        if even is not None:
            return Modulation(output, std, None, [stack[:, even] for stack in self.stacks], repeats)
        size = sum(stack[:, 0].nbytes for stack in self.stacks) * len(rows)
        if size > _AT_ONCE:
            return Modulation(output, std, None, self.stacks, repeats, rows)
        stacks = [stack[:, upload(rows, stack.device)] for stack in self.stacks]
        return Modulation(output, std, None, stacks, repeats)

    def layer(self, number: int) -> torch.Tensor | None:
        """(P, 6H) of a layer, `None` where it is to be made from the embedding."""
        for stack in self.stacks or ():
            if number < len(stack):
                return stack[number] if self.rows is None else stack[number][upload(self.rows, stack.device)]
            number -= len(stack)
        return None


class DiffusionLayer(nn.Module):
    """One layer of the path: a twin of the base's layer and the head that modulates it.

    `gate` is added to both gates, whose head starts at zero: 1 for a warm start, so that weight decay pulls towards it.
    """

    def __init__(self, twin: TwinLayer, width: int, hidden_size: int, gate: float = 0.0):
        super().__init__()
        self.twin, self.gate = twin, gate
        self.modulation = modulation_head(width, 6 * hidden_size)
        self.own_keys: OwnKeys | None = None
        self.own_values: OwnValues | None = None

    def own_parts(self) -> list[nn.Module]:
        """The modules that are not the twin's."""
        return [self.modulation, *(part for part in (self.own_keys, self.own_values) if part is not None)]

    def modulate(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scale, shift and gate (P, H) of attention and of the MLP for embeddings (P, C); norms' weights are in."""
        embedding = embedding.to(next(self.modulation.parameters()).device)
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(embedding).chunk(6, dim=-1)
        weight1, weight2 = self.twin.norm_weights()
        if self.gate:
            gate1, gate2 = gate1 + self.gate, gate2 + self.gate
        return weight1 + scale1, shift1, gate1, weight2 + scale2, shift2, gate2

    def forward(
        self,
        hidden: torch.Tensor,
        modulation: Any,
        embedding: Any,
        layout: SiteLayout,
        layer: LayerState,
    ) -> torch.Tensor:
        """Hidden stream (R, P, H) through attention and MLP; R P evaluations in flat order.

        `modulation` (P, 6H) of this layer, or `None` to compute it from `embedding` (P, C).
        """
        if self.own_keys is not None or self.own_values is not None:
            layer = read(layer, layout.state.position_ids, self.own_keys, self.own_values)
        parts = self.modulate(embedding) if modulation is None else modulation.chunk(6, dim=-1)
        scale1, shift1, gate1, scale2, shift2, gate2 = parts
        attended = self.twin.attend(hidden, scale1, shift1, layout, layer)
        hidden = torch.addcmul(hidden, gate1.to(hidden.dtype), attended)
        return torch.addcmul(hidden, gate2.to(hidden.dtype), self.twin.transform(hidden, scale2, shift2))


class DiffusionPath(nn.Module):
    """All trained weights of an L2D model, over the frozen layers of `decoder`.

    As published, gates and output weight start at zero. With `config.warm_start` the path starts as the base: its
    stream begins with the base's own, gates are 1, and its hidden state replaces the base's as t goes to 1:
    `h_main + a(t) (h - h_main)` with `a(t) = t + w(t) - w(0)` in place of `h_main + (w(t) - w(0)) h`.
    """

    def __init__(self, config: L2DConfig, decoder: Decoder):
        super().__init__()
        base_config = decoder.base.config
        hidden_size, width = base_config.get_text_config().hidden_size, config.conditioning_width
        self.vocabulary = VocabularyEmbedding(
            decoder.embeddings.weight.shape[1], config.diffusion_dim, config.token_norm
        )
        self.input_projection = InputProjection(
            config.diffusion_dim,
            config.input_width,
            hidden_size,
            config.noise_std,
            config.token_norm**2 / config.diffusion_dim,
            config.input_scale,
        )
        self.time_embedding = TimeEmbedding(config.frequency_width, width)
        classes = len(config.guidance_classes or [])
        self.class_embedding = nn.Embedding(classes + 1, width, dtype=torch.float32) if classes else None
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        twins = build_twin(decoder, base_config, config)
        gate = 1.0 if config.warm_start else 0.0
        self.layers: Any = nn.ModuleList(DiffusionLayer(twin, width, hidden_size, gate) for twin in twins)
        self.output_modulation = modulation_head(width, hidden_size)
        self.noise_free, self.warm_start = config.noise_free, config.warm_start
        if self.warm_start:
            self.input_projection.start_at_zero()
        # Initialised last, so that all other weights are those of a model without them.
        self.carried_state = CarriedState(hidden_size) if config.carried_state else None
        for layer, original in zip(self.layers, decoder.layers, strict=True):
            if config.own_values_rank:
                layer.own_values = OwnValues(original.self_attn, config.own_values_rank)
            if config.own_keys_rank:
                layer.own_keys = OwnKeys(original.self_attn, config.own_keys_rank)
        self.checkpointing: tuple[Callable, int] | None = None  # function, and every how many layers
        self._decoder = decoder
        # Modules whose weights a table of modulations depends on.
        parts: tuple[Any, ...] = (
            self.time_embedding,
            self.class_embedding,
            self.output_modulation,
            *(layer.modulation for layer in self.layers),
            *(norm for twin in twins for norm in twin.modulated_norms()),
        )
        self._conditioning = tuple(m for part in parts if part is not None for m in part.modules() if m._parameters)
        self._tables: dict[tuple, Modulation] = {}

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., d) float32 of tokens (...), with gradients to the vocabulary embedding."""
        weight = self._decoder.embeddings.weight
        return self.vocabulary(nn.functional.embedding(tokens.to(weight.device), weight).detach())

    def vocabulary_table(self) -> torch.Tensor:
        """Embeddings of all tokens, (V, d) float32, cached."""
        return self.vocabulary.table(self._decoder.embeddings.weight)

    def forget(self) -> None:
        """Drop the tables that were computed from the weights for inference."""
        self.vocabulary.forget()
        self._tables = {}

    def conditioning(self, time: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        """Time embedding plus class embedding, (..., C); `classes=None` is "no class"."""
        embedding = self.time_embedding(time)
        if self.class_embedding is None:
            return embedding
        if classes is None:
            return embedding + self.class_embedding.weight[-1]
        return embedding + self.class_embedding(classes)

    def modulate(self, time: torch.Tensor, classes: torch.Tensor | None = None) -> Modulation:
        """Modulation at times (N,) for classes (N,) or "no class"."""
        embedding = self.conditioning(time, classes)
        at_zero = self.conditioning(torch.zeros_like(time[:1]) if classes is None else torch.zeros_like(time), classes)
        output = self.output_modulation(embedding) - self.output_modulation(at_zero)
        if self.warm_start:
            output = output + time.unsqueeze(-1)
        output = output * (time != 0).unsqueeze(-1)  # exactly the base at t = 0, whatever the rounding of the two terms
        return Modulation(output, self.input_projection.std(time), embedding)

    @torch.no_grad()
    def modulation_table(self, times: torch.Tensor, kinds: tuple[int, ...] | None) -> Modulation:
        """Modulation at grid times (E,) for each class of `kinds` (`None`: "no class").

        Row `k * E + e` belongs to class `kinds[k]` and time `times[e]`. The last two tables are kept until weights
        change: a solver's, and that of a gate before it.
        """
        device = next(self.output_modulation.parameters()).device
        weights = tuple(
            (p.data_ptr(), p.dtype, version(p)) for module in self._conditioning for p in module._parameters.values()
        )
        key = (tuple(times.tolist()), kinds, device, weights)
        kept = self._tables  # another thread may replace them
        if key not in kept:
            grid = times.to(device, torch.float32)
            classes = None
            if kinds is not None:
                classes = torch.tensor(kinds, device=device).repeat_interleave(len(grid))
                grid = grid.repeat(len(kinds))
            with full_precision(grid):
                table = self.modulate(grid, classes)
                runs: list[list[torch.Tensor]] = []
                for layer in self.layers:
                    made = torch.cat(layer.modulate(table.embedding), dim=-1)
                    if not runs or runs[-1][0].device != made.device:
                        runs.append([])
                    runs[-1].append(made)
            stacks = [torch.stack(run) for run in runs]
            last = dict(list(kept.items())[-1:])
            self._tables = kept = {**last, key: Modulation(table.output, table.input_std, None, stacks)}
        return kept[key]

    def forward(
        self,
        x: torch.Tensor,
        modulation: Modulation,
        layout: SiteLayout,
        carried: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate states x (N, d) at the times of `modulation`, with what was carried (N, H) from the
        evaluations before, or nothing.

        Returns the fused hidden states (N, H) before the final norm, and the path's own (N, H), to be carried on.
        """
        main = layout.hidden()
        if not len(main):
            return main + modulation.output.to(main), main
        if self.noise_free:
            x = torch.ones_like(x)
        x = x.to(modulation.input_std.device).unflatten(0, (modulation.repeats, -1))
        hidden = self.input_projection(x, modulation.input_std).flatten(0, 1)
        if carried is not None and self.carried_state is not None:
            hidden = hidden + self.carried_state(carried.to(hidden.device))
        if self.warm_start:
            hidden = hidden + layout.inputs().to(hidden.device)
        hidden = hidden.to(self.layers[0].twin.stream_dtype(main.dtype))
        hidden = hidden.unflatten(0, (modulation.repeats, -1))
        for number, (layer, kept) in enumerate(zip(self.layers, layout.state.layers, strict=True)):
            ready = modulation.layer(number)
            if kept.keys is not None and kept.keys.device != hidden.device:  # a base that is spread over devices
                hidden = hidden.to(kept.keys.device)
            if self.checkpointing is not None and torch.is_grad_enabled() and number % self.checkpointing[1] == 0:
                hidden = self.checkpointing[0](layer, hidden, ready, modulation.embedding, layout, kept)
            else:
                hidden = layer(hidden, ready, modulation.embedding, layout, kept)
        hidden = hidden.to(main.device)
        return self._fuse(main, hidden, modulation.output.to(main.device)), hidden.flatten(0, 1)

    def _fuse(self, main: torch.Tensor, hidden: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Fused hidden states (N, H): `main` (N, H), and as much of `hidden` (R, P, H) as `factor` (P, H) says."""
        if not self.warm_start:
            start = main.unflatten(0, hidden.shape[:2])
            return torch.addcmul(start, factor.to(main.dtype), hidden.to(main.dtype)).flatten(0, 1)
        start = at_least_float32(main).unflatten(0, hidden.shape[:2])
        return torch.lerp(start, hidden.to(start.dtype), factor.to(start.dtype)).flatten(0, 1).to(main.dtype)
