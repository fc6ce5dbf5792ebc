"""Keys and values of the path's own: trained low-rank changes of what the path's attention reads.

- `OwnValues`, `OwnKeys`: the changes of one layer
- `read`: the state of a layer as the path reads it
- `keep`: makes them once per token and keeps them in the cache

By itself the path reads the frozen base's keys and values, so all that it learns has to happen at the last position.
With `own_values_rank` its attention reads `v + U D a`: the base's value `v` at a position, and a change that is linear
in what the base's attention receives there, `a`. With `own_keys_rank` it reads the key that the base's attention makes
of `k + U D a` in place of `k`, the result of its projection for keys. Both start at zero. The base's own computation
stays as it is, and they are made once per token, so speculation and T = 1 are what they were.

Legend: B rows, S keys, L new positions, H hidden size, G key/value heads, D head size.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, Cache

from l2d.network.main_path import LayerState
from l2d.network.path_layers import NoProjection, structural_copy
from l2d.network.quantized import known_linear

_TAKING_KEYS = "l2d_own_keys"


class _Change(nn.Module):
    """The change of a projection's results: `down` (r, H), initialised like LoRA's, and `up` (G D, r), zero.

    Raises `ValueError` for a base whose attention has no projection of its own for keys or for values.
    """

    what: str

    def __init__(self, attention: Any, rank: int):
        super().__init__()
        name = f"{self.what[0]}_proj"
        projection: Any = getattr(attention, name, None)
        if projection is None or not known_linear(projection):
            raise ValueError(
                f"own_{self.what}_rank={rank} cannot be followed: {type(attention).__name__} has no projection {name} "
                f"for {self.what} alone; leave it out, or use another base."
            )
        self.down = nn.Linear(projection.in_features, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, projection.out_features, bias=False, dtype=torch.float32)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def change(self, received: torch.Tensor) -> torch.Tensor:
        """(B, L, G D) where the base's attention received (B, L, H)."""
        return self.up(self.down(received.to(self.down.weight.dtype)))


class OwnValues(_Change):
    """The path's values in one layer."""

    what = "values"

    def forward(self, layer: LayerState, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Values (B, G, L, D) of the new positions."""
        received: Any = layer.received
        values: Any = layer.values
        values = values[..., -received.shape[1] :, :]
        change = self.change(received)
        return values + change.unflatten(-1, (values.shape[1], -1)).transpose(1, 2).to(values.dtype)


class OwnKeys(_Change):
    """The path's keys in one layer.

    What the base's attention does to keys (norms, rotary embeddings) is done by a copy of it that is given the changed
    results of its projection, and whose attention function only takes the keys.
    """

    what = "keys"

    def __init__(self, attention: Any, rank: int):
        super().__init__(attention, rank)
        config: Any = copy.copy(attention.config)
        config._attn_implementation_internal = _TAKING_KEYS
        self.rest: Any = structural_copy(attention, config)
        for name, part in list(self.rest.named_children()):
            if isinstance(part, nn.Linear):
                setattr(self.rest, name, nn.Identity() if name == "k_proj" else NoProjection(part.out_features))
        self._projection = (attention.k_proj,)  # the base's: not registered as a part of the path

    def forward(self, layer: LayerState, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Keys (B, G, L, D) of the new positions."""
        received: Any = layer.received
        with torch.no_grad():
            projected = self._projection[0](received)
        taken: list[torch.Tensor] = []
        self.rest(
            hidden_states=projected + self.change(received).to(projected.dtype),
            position_embeddings=None if layer.rotary is None else _one_or_all(layer.rotary),
            position_ids=None if position_ids is None else position_ids.to(received.device),
            attention_mask=None,
            past_key_values=None,
            taken=taken,
        )
        return taken[0]


def _one_or_all(rotary: tuple[torch.Tensor, ...]) -> Any:
    return rotary if len(rotary) > 1 else rotary[0]


def _take_keys(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: Any, taken: list[torch.Tensor], **options: Any
) -> tuple[torch.Tensor, None]:
    """In place of attention: takes the keys; its result is of no use."""
    taken.append(key)
    return query.transpose(1, 2), None


AttentionInterface.register(_TAKING_KEYS, _take_keys)


def read(
    layer: LayerState, position_ids: torch.Tensor | None, keys: OwnKeys | None, values: OwnValues | None
) -> LayerState:
    """The state of a layer as the path reads it: with the keys and values that were kept, or made now.

    Those made with gradients are made at every call, also after a call without; others stay in `layer`.
    """
    own = layer.own_keys, layer.own_values
    learning = torch.is_grad_enabled() and layer.received is not None
    if learning or (layer.own_keys is None and layer.own_values is None):
        own = _made(layer, position_ids, keys, values)
        if not torch.is_grad_enabled():
            layer.own_keys, layer.own_values = own
    made = [theirs if one is None else one for one, theirs in zip(own, (layer.keys, layer.values), strict=True)]
    return dataclasses.replace(layer, keys=made[0], values=made[1])


def keep(
    layer: LayerState,
    position_ids: torch.Tensor | None,
    keys: OwnKeys | None,
    values: OwnValues | None,
    cache: Cache,
    number: int,
) -> None:
    """Make those of the new positions, add them to layer `number` of `cache`, and give the state all that are there."""
    made = _made(layer, position_ids, keys, values)
    present: Any = made[1] if made[0] is None else made[0]
    kept = cache.update(*(present[..., :0] if one is None else one for one in made), number)
    layer.own_keys = None if made[0] is None else kept[0]
    layer.own_values = None if made[1] is None else kept[1]
    layer.received = None


def _made(
    layer: LayerState, position_ids: torch.Tensor | None, keys: OwnKeys | None, values: OwnValues | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if layer.received is None or layer.values is None:
        raise ValueError(
            "a path with keys or values of its own needs a main path made for it: use TwoPaths.main_path, or "
            "run_main_path with keep_received."
        )
    return (
        None if keys is None else keys(layer, position_ids),
        None if values is None else values(layer, position_ids),
    )
