"""Projections of the path laid out for inference: one fast matrix product for each.

- `merge_deltas`, `unmerge_deltas`: replace the path's projections by merged or packed weights, and restore them
- `DeltaMerger`: merges where that changes only the speed, and notices when weights changed

LoRA deltas are added to the base's weights: one product instead of three. Trained copies (variant `full`) are only
packed, where that pays (`onednn`). Both cost memory, a second copy of the projections, and merging rounds the sum
to the base's dtype; so it is done for float32 and float64 bases when there is room. In bfloat16 and float16 the sum
would lose the deltas: their factors are rounded instead, which is what training under autocast computes with, and a
projection is three products without a change of dtype between them. Never in training.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from l2d.network.embeddings import full_precision, version
from l2d.network.memory import free_memory
from l2d.network.onednn import packed_linear, serves
from l2d.network.path_layers import ADAPTER
from l2d.network.quantized import plain_linear

_SHARE = 0.25  # of the free memory that merged weights may take
_HALF = (torch.bfloat16, torch.float16)


def _projections(module: nn.Module) -> list[Any]:
    """The LoRA layers below `module`, or without any the linear layers of its twins that oneDNN serves."""
    from peft.tuners.lora import LoraLayer  # late, see `path_layers`

    adapted = [
        m
        for m in module.modules()
        if isinstance(m, LoraLayer) and ADAPTER in m.lora_A and plain_linear(m.get_base_layer())
    ]
    if adapted:
        return adapted
    twins = [m for name, m in module.named_modules() if name.split(".")[-1] == "twin"]
    return [m for twin in twins for m in twin.modules() if type(m) is nn.Linear and serves(m.weight)]


def _base(layer: Any) -> nn.Linear:
    return layer.get_base_layer() if hasattr(layer, "lora_A") else layer


@torch.no_grad()
def merge_deltas(layers: list[Any]) -> None:
    """Let every projection compute with its merged and packed weight; parameters and names stay as they are."""
    for layer in layers:
        weight, bias = _base(layer).weight, _base(layer).bias
        if hasattr(layer, "lora_A") and weight.dtype in _HALF:
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]
            layer.forward = _low_rank(weight, bias, down.to(weight.dtype), up.to(weight.dtype))
            continue
        if hasattr(layer, "lora_A"):
            with full_precision(weight):
                weight = (weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)).detach()
        layer.forward = packed_linear(weight, bias)


def _low_rank(weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor) -> Any:
    """A projection with the delta `up` (O, r) times `down` (r, I), all in one dtype: inputs (..., I) to (..., O)."""
    for kept in (down, up):  # CUDA graphs would copy them for every call
        torch._dynamo.mark_static_address(kept)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.flatten(0, -2)
        own, low = functional.linear(flat, weight, bias), functional.linear(flat, down)
        return torch.addmm(own, low, up.t()).view(*inputs.shape[:-1], -1)

    return forward


def unmerge_deltas(layers: list[Any]) -> None:
    """Undo `merge_deltas`."""
    for layer in layers:
        layer.__dict__.pop("forward", None)


class DeltaMerger:
    """Keeps a path merged while it serves inference.

    Args:
        path: the diffusion path.
    """

    def __init__(self, path: nn.Module):
        self._path = (path,)  # not a module of ours
        self._layers: list[Any] = []
        self._key: tuple | None = None

    def prepare(self) -> None:
        """Merge the path for inference, if its dtype loses nothing and memory allows."""
        (path,) = self._path
        layers = [] if path.training else _projections(path)
        dtype = _base(layers[0]).weight.dtype if layers else torch.int8
        if dtype not in _HALF and dtype.itemsize < 4:  # nothing to merge, or quantized
            self.release()
            return
        key = _weights(layers)
        if key == self._key:
            return
        self.release()
        needed = 0 if dtype in _HALF else sum(_base(layer).weight.nbytes for layer in layers)
        if not needed or needed < _SHARE * free_memory(_base(layers[0]).weight.device):
            merge_deltas(layers)
            self._layers, self._key = layers, key

    def release_stale(self) -> None:
        """Go back to separate deltas if any weight changed since they were merged."""
        if self._key is not None and self._key != _weights(self._layers):
            self.release()

    def release(self) -> None:
        """Go back to separate deltas."""
        unmerge_deltas(self._layers)
        self._layers, self._key = [], None


def _weights(layers: list[Any]) -> tuple:
    """Everything that merged weights depend on, including the library that they are packed for."""
    weights = []
    for layer in layers:
        deltas = [part[ADAPTER].weight for part in (layer.lora_A, layer.lora_B)] if hasattr(layer, "lora_A") else []
        weights += [_base(layer).weight, *deltas]
    return (torch.backends.mkldnn.enabled, *((w.device, w.dtype, w.data_ptr(), version(w)) for w in weights))
