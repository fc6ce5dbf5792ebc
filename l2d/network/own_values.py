"""Values of the path's own: a trained low-rank change of what the path's attention reads.

- `OwnValues`: the change of one layer

By itself the path reads the frozen base's keys and values, so all that it learns has to happen at the last position.
With `own_values_rank` its attention reads `v + U D a`: the base's value `v` at a position, and a change that is linear
in what the base's attention receives there, `a`. It starts at zero. The base's own computation stays as it is, and the
values are made once per token, so speculation and T = 1 are what they were.

Legend: B rows, S keys, L new positions, H hidden size, G key/value heads, D head size.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import Cache

from l2d.network.main_path import LayerState
from l2d.network.quantized import known_linear


class OwnValues(nn.Module):
    """The change of one layer's values: `down` (r, H), initialised like LoRA's, and `up` (G D, r), zero.

    Raises `ValueError` for a base whose attention has no projection for values alone.
    """

    def __init__(self, attention: Any, rank: int):
        super().__init__()
        projection: Any = getattr(attention, "v_proj", None)
        if projection is None or not known_linear(projection):
            raise ValueError(
                f"own_values_rank={rank} cannot be followed: {type(attention).__name__} has no projection v_proj for "
                "values alone; leave it out, or use another base."
            )
        self.down = nn.Linear(projection.in_features, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, projection.out_features, bias=False, dtype=torch.float32)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, received: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The base's values (B, G, L, D) where its attention received (B, L, H), with the change."""
        change = self.up(self.down(received.to(self.down.weight.dtype)))
        return values + change.unflatten(-1, (values.shape[1], -1)).transpose(1, 2).to(values.dtype)

    def of(self, layer: LayerState) -> LayerState:
        """The state of a layer as the path reads it: with the values that were kept, or made now, with gradients."""
        values = layer.own_values
        if values is None:
            if layer.received is None or layer.values is None:
                raise ValueError("a path with values of its own needs a main path made for it: use TwoPaths.main_path.")
            values = self(layer.received, layer.values)
        return dataclasses.replace(layer, values=values)

    def keep(self, layer: LayerState, cache: Cache, number: int) -> None:
        """Make the values of the new positions, add them to `cache` as the keys of its layer `number`, and give the
        state of a layer all that are there."""
        if layer.received is None or layer.values is None:
            raise ValueError("the main path kept nothing to make values from: run it with keep_received.")
        made = self(layer.received, layer.values[..., -layer.received.shape[1] :, :])
        layer.own_values, _ = cache.update(made, made[..., :0], number)
        layer.received = None
