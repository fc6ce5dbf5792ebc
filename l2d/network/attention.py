"""Attention of the diffusion path over the main path's keys and values.

- `SiteLayout`: the site (row and position) of every evaluation in a flat batch, and the masks that follow from it
- `path_attention`: registered with transformers as the attention implementation of the diffusion path
- `leave_out_cudnn`: which kernels attention uses on CUDA

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
from l2d.network.transfers import upload

IMPLEMENTATION = "l2d_path"
_IN_THE_MASK = -1  # a sliding window that attention is not told of


@dataclasses.dataclass
class _RowGroup:
    """Rows whose evaluations are attended in one call: equally many each, padded if they are not. Host tensors."""

    rows: list[int] | None  # R rows of the main path; None: all of them, in order
    start: int  # first evaluation of the group in the flat batch
    count: int  # P, evaluations per row
    index: torch.Tensor  # (R, P) positions of the evaluations
    scatter: torch.Tensor | None  # (R, P) flat number in each padded row, None without padding
    own: torch.Tensor | None  # (N,) where the flat batch is in the padded rows, None without padding

    def __post_init__(self) -> None:
        self.chosen = torch.tensor(self.rows or [])


class SiteLayout:
    """The sites of a flat batch of evaluations in a main-path state.

    Args:
        state: the main path.
        rows: (N,) row of each evaluation, not decreasing.
        index: (N,) position of each evaluation among the state's new positions.
        masked: attend with a mask where none is needed, too, so that it is always the same kernel.

    The layout is worked out on the host: give CPU tensors, others are copied there.
    """

    def __init__(self, state: MainPathState, rows: torch.Tensor, index: torch.Tensor, masked: bool = False):
        self.state, self.masked = state, masked
        self._sites = torch.stack([rows.cpu(), index.cpu()])  # (2, N)
        self._sent: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._masks: dict[tuple[int, int | None, torch.device], torch.Tensor | None] = {}
        self._biases: dict[tuple, torch.Tensor | None] = {}
        self._rotary_key: tuple[int, ...] | None = None
        self._position_ids: torch.Tensor | None = None
        self.last_only = state.hidden.shape[1] == 1
        self.answered = 0  # layers whose attention was computed so far
        batch = state.hidden.shape[0]
        counts = torch.bincount(self._sites[0], minlength=batch).tolist()
        used = [row for row in range(batch) if counts[row]]
        width = max(counts)
        self.groups: list[_RowGroup] = []
        if not used:
            return
        count, index = self._sites.shape[1], self._sites[1]
        if len(used) == batch and min(counts) == width:
            self.groups.append(_RowGroup(None, 0, width, index.view(batch, width), None, None))
        elif len(used) * width <= 1.25 * count or len(used) > 4:
            self.groups.append(self._padded_group(used, counts, width))
        else:
            start = 0
            for row in used:
                part = index[start : start + counts[row]].unsqueeze(0)
                self.groups.append(_RowGroup([row], start, counts[row], part, None, None))
                start += counts[row]

    def _padded_group(self, used: list[int], counts: list[int], width: int) -> _RowGroup:
        sizes = torch.tensor([counts[row] for row in used])
        starts = sizes.cumsum(0) - sizes
        columns = torch.arange(width)
        scatter = starts[:, None] + torch.minimum(columns, sizes[:, None] - 1)  # padded by a row's last evaluation
        own = torch.nonzero((columns < sizes[:, None]).flatten(), as_tuple=True)[0]
        all_rows = len(used) == self.state.hidden.shape[0]
        return _RowGroup(None if all_rows else used, 0, width, self._sites[1][scatter], scatter, own)

    def sent(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor that the layout keeps, on `device`; copied there once."""
        key = (id(values), device)
        if key not in self._sent:
            self._sent[key] = upload(values, device)
        return self._sent[key]

    def at(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B or 1, L, ...) of the main path at the sites, (N, ...)."""
        if values.shape[:2] == (1, 1):
            return values[0].expand(self._sites.shape[1], *values.shape[2:])
        rows, index = self.sent(self._sites, values.device)
        if values.shape[1] == 1:
            return values[rows, 0]
        return values[rows, index] if values.shape[0] > 1 else values[0, index]

    def hidden(self) -> torch.Tensor:
        """Main-path hidden states at the sites, (N, H)."""
        return self.at(self.state.hidden)

    def inputs(self) -> torch.Tensor:
        """What the base's first layer receives at the sites, (N, H)."""
        if self.state.inputs is None:
            raise ValueError("a warm-started path needs MainPathState.inputs: take the state from TwoPaths.main_path.")
        return self.at(self.state.inputs)

    def rotary(self, layer: LayerState) -> tuple[torch.Tensor, ...] | torch.Tensor | None:
        """A layer's rotary embeddings at the sites, each (1, N, D), or one where they are complex."""
        if layer.rotary is None:
            return None
        key = tuple(id(part) for part in layer.rotary)
        if self._rotary_key != key:  # layers of one kind share them
            self._rotary_key = key
            self._rotary = tuple(self.at(part).unsqueeze(0) for part in layer.rotary)
        return self._rotary if len(self._rotary) > 1 else self._rotary[0]

    def position_ids(self, device: torch.device) -> torch.Tensor | None:
        """The base's own position numbers of the sites, (1, N) int64."""
        if self.state.position_ids is None:
            return None
        if self._position_ids is None or self._position_ids.device != device:
            self._position_ids = self.at(self.state.position_ids).unsqueeze(0).to(device)
        return self._position_ids

    def mask(self, group_number: int, window: int | None, device: torch.device | None = None) -> torch.Tensor | None:
        """Bool mask (R, 1, P or 1, S) of the keys that a group's evaluations may see; `None`: all.

        On `device`, where it is not that of the state's hidden states.
        """
        device = self.state.hidden.device if device is None else device
        key = (group_number, window, device)
        if key not in self._masks:
            self._masks[key] = self._build_mask(self.groups[group_number], window, device)
        return self._masks[key]

    def bias(self, group_number: int, window: int | None, repeat: int, query: torch.Tensor) -> torch.Tensor | None:
        """`mask` as attention adds it, (R, 1, repeat P or 1, S) in the dtype of `query`; made once for all layers."""
        key = (group_number, window, repeat, query.device, query.dtype)
        if key not in self._biases:
            mask = self.mask(group_number, window, query.device)
            if mask is not None:
                if mask.shape[2] > 1 and repeat > 1:
                    mask = mask.repeat(1, 1, repeat, 1)
                mask = additive(mask, query.dtype)
            self._biases[key] = mask
        return self._biases[key]

    def _build_mask(self, group: _RowGroup, window: int | None, device: torch.device) -> torch.Tensor | None:
        state = self.state
        key_mask = None if state.key_mask is None else state.key_mask.to(device)
        segments = None if state.segments is None else state.segments.to(device)
        if group.rows is not None:
            rows = self.sent(group.chosen, device)
            key_mask = None if key_mask is None else key_mask[rows]
            segments = None if segments is None else segments[rows]
        if self.last_only:
            if window is not None and window < state.key_count:
                recent = torch.arange(state.key_count, device=device) >= state.key_count - window
                key_mask = recent[None] if key_mask is None else key_mask & recent
            if key_mask is None and self.masked:
                key_mask = torch.ones(1, state.key_count, dtype=torch.bool, device=device)
            return None if key_mask is None else key_mask[:, None, None]
        index = self.sent(group.index, device)
        position = (index + state.offset).unsqueeze(-1)  # (R, P, 1)
        keys = torch.arange(state.key_count, device=device)
        mask = keys <= position
        if window is not None:
            mask &= keys > position - window
        if key_mask is not None:
            mask &= key_mask[:, None]
        if segments is not None:
            mask &= segments[:, None] == segments.gather(1, index).unsqueeze(-1)
        return mask[:, None]


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask (..., S) as it is added to scores: 0 where it is true, minus infinity elsewhere.

    Rows are a multiple of 16 numbers apart, as CUDA's kernels want them: others they would copy in every layer.
    """
    width = -(-mask.shape[-1] // 16) * 16
    rows = torch.full((*mask.shape[:-1], width), -torch.inf, dtype=dtype, device=mask.device)
    return rows[..., : mask.shape[-1]].masked_fill_(mask, 0.0)


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
    dtype, device = query.dtype, query.device
    query = query.to(layer.keys.dtype)
    outputs = []
    for number, group in enumerate(layout.groups):
        keys, values = layer.keys, layer.values
        if group.rows is not None:
            if len(group.rows) == 1:
                row = group.rows[0]
                keys, values = keys[row : row + 1], values[row : row + 1]
            else:
                chosen = layout.sent(group.chosen, device)
                keys, values = keys[chosen], values[chosen]
        rows, heads = group.index.shape[0], query.shape[1]
        if rows == 1 and len(layout.groups) == 1:
            part = query
        elif group.scatter is not None:
            part = query[0][:, layout.sent(group.scatter, device)].transpose(0, 1)  # (R, A, P, D)
        else:
            part = query[0, :, group.start : group.start + rows * group.count]
            part = part.unflatten(1, (rows, group.count)).transpose(0, 1)
        repeat = heads // keys.shape[1]
        # Query heads that share a key/value head are queries of that head: no copies of keys per head.
        folded = part.reshape(rows, keys.shape[1], repeat * group.count, part.shape[-1])
        bias = layout.bias(number, window, repeat, folded)
        sinks = None if s_aux is None else s_aux.repeat_interleave(group.count).view(1, keys.shape[1], -1, 1)
        output = _attend(folded, keys, values, bias, scaling, softcap, sinks)
        output = output.view(rows, heads, group.count, -1).permute(0, 2, 1, 3)  # (R, P, A, D)
        output = output.flatten(0, 1)
        outputs.append(output if group.own is None else output.index_select(0, layout.sent(group.own, device)))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.unsqueeze(0).to(dtype), None


def _configured_window(module: Any) -> int | None:
    """The sliding window of a layer whose attention does not hand it over, since the base's mask has it."""
    kinds, number = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and number is not None and kinds[number] != "sliding_attention":
        return None
    return getattr(module.config, "sliding_window", None)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling)
    scores = query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return weights[..., : values.shape[-2]] @ values


def leave_out_cudnn() -> None:
    """Let scaled dot-product attention use flash kernels without a mask and memory-efficient ones with a mask.

    PyTorch prefers cuDNN on some devices, which makes a plan for every new length of the keys, hence for every token.
    The setting is the process's: the base, called by itself, must compute what it computes as a part of an L2D model.
    `torch.backends.cuda.enable_cudnn_sdp(True)` undoes it.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


AttentionInterface.register(IMPLEMENTATION, path_attention)
