"""LoRA deltas merged for inference: one matrix product per projection instead of three.

- `merge_deltas`, `unmerge_deltas`: put merged weights in front of the path's LoRA layers, and take them away again
- `DeltaMerger`: merges where that changes nothing but speed, and notices when weights changed

Merging costs memory (a second copy of the projections) and rounds the sum to the base's dtype, so it is done for
float32 and float64 bases when there is room, and never in training. Merged weights are laid out for fast products.
"""

from typing import Any

import psutil
import torch
from torch import nn

from l2d.products import packed_linear
from l2d.twin import ADAPTER

_SHARE = 0.25  # of the free memory that merged weights may take


def _layers(module: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer  # late, see `twin`

    return [m for m in module.modules() if isinstance(m, LoraLayer) and ADAPTER in m.lora_A]


@torch.no_grad()
def merge_deltas(module: nn.Module) -> None:
    """Let every LoRA layer below `module` compute with its merged weight; parameters and names stay as they are."""
    for layer in _layers(module):
        base = layer.get_base_layer()
        weight = (base.weight + layer.get_delta_weight(ADAPTER).to(base.weight.dtype)).detach()
        layer.forward = packed_linear(weight, base.bias)


def unmerge_deltas(module: nn.Module) -> None:
    """Undo `merge_deltas`."""
    for layer in _layers(module):
        layer.__dict__.pop("forward", None)


class DeltaMerger:
    """Keeps a path merged while it serves inference.

    Args:
        path: the diffusion path.
    """

    def __init__(self, path: nn.Module):
        self._key: tuple | None = None
        self._layers = _layers(path)

    def prepare(self, path: nn.Module) -> None:
        """Merge `path` for inference, if it has LoRA layers, its dtype loses nothing and memory allows."""
        if not self._layers or path.training or self._layers[0].get_base_layer().weight.dtype.itemsize < 4:
            self.release(path)
            return
        key = self._weights()
        if key == self._key:
            return
        self.release(path)
        if self._needed() < _SHARE * _free_memory(self._layers[0].get_base_layer().weight.device):
            merge_deltas(path)
            self._key = key

    def release_stale(self, path: nn.Module) -> None:
        """Go back to separate deltas if any weight changed since they were merged."""
        if self._key is not None and self._key != self._weights():
            self.release(path)

    def _weights(self) -> tuple:
        weights = (
            w
            for layer in self._layers
            for w in (layer.get_base_layer().weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        )
        library = torch.backends.mkldnn.enabled  # decides how merged weights are laid out
        return (library, *((w.device, w.dtype, w.data_ptr(), w._version) for w in weights))

    def release(self, path: nn.Module) -> None:
        """Go back to separate deltas."""
        if self._key is not None:
            unmerge_deltas(path)
            self._key = None

    def _needed(self) -> int:
        return sum(layer.get_base_layer().weight.nbytes for layer in self._layers)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else 0
