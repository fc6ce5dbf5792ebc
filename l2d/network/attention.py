"""Attention of the diffusion path over the main path's keys and values.

- `SiteLayout`: the site (row and position) of every evaluation in a flat batch, and the masks that follow from it
- `path_attention`: registered with transformers as the attention implementation of the diffusion path

Evaluations form one flat batch ordered by row, (N, ...), whatever they serve: response tokens in training, all points
of a trajectory in decoding, ragged passes over several rows. Linear layers see N evaluations and no padding; only
attention looks at rows. Legend: A query heads, G key/value heads, P evaluations of one row, S keys, D head size.
"""

import dataclasses
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from l2d.network.main_path import LayerState, MainPathState

IMPLEMENTATION = "l2d_path"
_IN_THE_MASK = -1  # a sliding window that attention is not told of


@dataclasses.dataclass
class _RowGroup:
    """Rows whose evaluations are attended in one call: equally many each, padded if they are not."""

    rows: torch.Tensor | None  # (R,) rows of the main path; None: all of them, in order
    start: int  # first evaluation of the group in the flat batch
    count: int  # P, evaluations per row
    index: torch.Tensor  # (R, P) positions of the evaluations
    scatter: torch.Tensor | None  # (R, P) flat number in each padded row, None without padding


class SiteLayout:
    """The sites of a flat batch of evaluations in a main-path state.

    Args:
        state: the main path.
        rows: (N,) row of each evaluation, not decreasing.
        index: (N,) position of each evaluation among the state's new positions.
    """

    def __init__(self, state: MainPathState, rows: torch.Tensor, index: torch.Tensor):
        self.state, self.rows, self.index = state, rows, index
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}
        self._position_ids: torch.Tensor | None = None
        self.last_only = state.hidden.shape[1] == 1
        self.answered = 0  # layers whose attention was computed so far
        batch = state.hidden.shape[0]
        counts = torch.bincount(rows, minlength=batch).tolist()
        used = [row for row in range(batch) if counts[row]]
        width = max(counts)
        self.groups: list[_RowGroup] = []
        if not used:
            return
        if len(used) == batch and min(counts) == width:
            self.groups.append(_RowGroup(None, 0, width, index.view(batch, width), None))
        elif len(used) * width <= 1.25 * len(rows) or len(used) > 4:
            self.groups.append(self._padded_group(used, counts, width))
        else:
            start = 0
            for row in used:
                part = index[start : start + counts[row]].unsqueeze(0)
                self.groups.append(_RowGroup(torch.tensor([row], device=rows.device), start, counts[row], part, None))
                start += counts[row]

    def _padded_group(self, used: list[int], counts: list[int], width: int) -> _RowGroup:
        device = self.rows.device
        sizes = torch.tensor([counts[row] for row in used], device=device)
        starts = sizes.cumsum(0) - sizes
        columns = torch.arange(width, device=device)
        scatter = starts[:, None] + torch.minimum(columns, sizes[:, None] - 1)  # padded by a row's last evaluation
        all_rows = len(used) == self.state.hidden.shape[0]
        rows = None if all_rows else torch.tensor(used, device=device)
        return _RowGroup(rows, 0, width, self.index[scatter], scatter)

    def hidden(self) -> torch.Tensor:
        """Main-path hidden states at the sites, (N, H)."""
        if self.last_only:
            return self.state.hidden[self.rows, 0]
        return self.state.hidden[self.rows, self.index]

    def inputs(self) -> torch.Tensor:
        """What the base's first layer receives at the sites, (N, H)."""
        inputs = self.state.inputs
        if inputs is None:
            raise ValueError("a warm-started path needs MainPathState.inputs: take the state from TwoPaths.main_path.")
        return inputs[self.rows, 0 if self.last_only else self.index]

    def rotary(self, layer: LayerState) -> tuple[torch.Tensor, ...] | torch.Tensor | None:
        """A layer's rotary embeddings at the sites, each (1, N, D), or one where they are complex."""
        if layer.rotary is None:
            return None
        key = tuple(id(part) for part in layer.rotary)
        if getattr(self, "_rotary_key", None) != key:  # layers of one kind share them
            rows = self.rows if layer.rotary[0].shape[0] > 1 else torch.zeros_like(self.rows)
            self._rotary_key = key
            self._rotary = tuple(part[rows, self.index].unsqueeze(0) for part in layer.rotary)
        return self._rotary if len(self._rotary) > 1 else self._rotary[0]

    def position_ids(self) -> torch.Tensor | None:
        """The base's own position numbers of the sites, (1, N) int64."""
        ids = self.state.position_ids
        if ids is None:
            return None
        if self._position_ids is None:
            rows = self.rows if ids.shape[0] > 1 else torch.zeros_like(self.rows)
            self._position_ids = ids[rows, self.index].unsqueeze(0)
        return self._position_ids

    def mask(self, group_number: int, window: int | None) -> torch.Tensor | None:
        """Bool mask (R, 1, P or 1, S) of the keys that a group's evaluations may see; `None`: all."""
        key = (group_number, window)
        if key not in self._masks:
            self._masks[key] = self._build_mask(self.groups[group_number], window)
        return self._masks[key]

    def _build_mask(self, group: _RowGroup, window: int | None) -> torch.Tensor | None:
        state = self.state
        key_mask, segments = state.key_mask, state.segments
        if group.rows is not None:
            key_mask = None if key_mask is None else key_mask[group.rows]
            segments = None if segments is None else segments[group.rows]
        if self.last_only:
            if window is not None and window < state.key_count:
                recent = torch.arange(state.key_count, device=group.index.device) >= state.key_count - window
                key_mask = recent[None] if key_mask is None else key_mask & recent
            return None if key_mask is None else key_mask[:, None, None]
        position = (group.index + state.offset).unsqueeze(-1)  # (R, P, 1)
        keys = torch.arange(state.key_count, device=position.device)
        mask = keys <= position
        if window is not None:
            mask &= keys > position - window
        if key_mask is not None:
            mask &= key_mask[:, None]
        if segments is not None:
            mask &= segments[:, None] == segments.gather(1, group.index).unsqueeze(-1)
        return mask[:, None]


def path_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    main_path: tuple[SiteLayout, LayerState],
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = _IN_THE_MASK,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """PathInputs (1, A, N, D) over the main path's keys and values to (1, N, A, D).

    `key` and `value` are what the path's attention module made itself and are not used. `s_aux` (A,) are attention
    sinks: a logit per head that takes its share of the softmax and has no value.
    """
    layout, layer = main_path
    layout.answered += 1
    window = _configured_window(module) if sliding_window == _IN_THE_MASK else sliding_window
    if layer.keys is None or layer.values is None:
        raise ValueError("base models with layers that keep no keys and values of their own are not supported.")
    dtype = query.dtype
    query = query.to(layer.keys.dtype)
    outputs = []
    for number, group in enumerate(layout.groups):
        keys, values = layer.keys, layer.values
        if group.rows is not None:
            if len(group.rows) == 1:
                row = int(group.rows[0])
                keys, values = keys[row : row + 1], values[row : row + 1]
            else:
                keys, values = keys[group.rows], values[group.rows]
        rows, heads = group.index.shape[0], query.shape[1]
        if rows == 1 and len(layout.groups) == 1:
            part = query
        elif group.scatter is not None:
            part = query[0][:, group.scatter].transpose(0, 1)  # (R, A, P, D)
        else:
            part = query[0, :, group.start : group.start + rows * group.count]
            part = part.unflatten(1, (rows, group.count)).transpose(0, 1)
        repeat = heads // keys.shape[1]
        # Query heads that share a key/value head are queries of that head: no copies of keys per head.
        folded = part.reshape(rows, keys.shape[1], repeat * group.count, part.shape[-1])
        mask = layout.mask(number, window)
        if mask is not None and mask.shape[2] > 1 and repeat > 1:
            mask = mask.repeat(1, 1, repeat, 1)
        sinks = None if s_aux is None else s_aux.repeat_interleave(group.count).view(1, keys.shape[1], -1, 1)
        output = _attend(folded, keys, values, mask, scaling, softcap, sinks)
        output = output.view(rows, heads, group.count, -1).permute(0, 2, 1, 3)  # (R, P, A, D)
        outputs.append(output.flatten(0, 1) if group.scatter is None else _unpad(output, group.scatter))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.unsqueeze(0).to(dtype), None


def _configured_window(module: Any) -> int | None:
    """The sliding window of a layer whose attention does not hand it over, since the base's mask has it."""
    kinds, number = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and number is not None and kinds[number] != "sliding_attention":
        return None
    return getattr(module.config, "sliding_window", None)


def _unpad(output: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
    """Padded rows (R, P, ...) back to the flat batch (N, ...), without the repetitions that pad them."""
    flat = scatter.flatten()
    columns = torch.arange(scatter.shape[1], device=flat.device).expand_as(scatter).flatten()
    starts = scatter[:, :1].expand_as(scatter).flatten()
    own = torch.nonzero(flat - starts == columns, as_tuple=True)[0]
    return output.flatten(0, 1).index_select(0, own)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return weights[..., : values.shape[-2]] @ values


AttentionInterface.register(IMPLEMENTATION, path_attention)
