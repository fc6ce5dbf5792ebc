"""Fingerprint of a base model's weights: cheap, and the same whether they are loaded in float32 or bfloat16.

- `fingerprint`: hash of all names and shapes and of an even sample of every tensor
"""

import hashlib

import torch
from torch import nn

_SAMPLE = 1 << 16


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 (32 hex digits) over names, shapes and up to 65,536 values per tensor, rounded to bfloat16.

    Tied tensors count once. Any finetuning of the base changes it; so does another revision. Meta tensors raise
    `ValueError`, since they hold no weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        if tensor.is_meta:
            raise ValueError(f"cannot fingerprint {name!r}: the base's weights are not loaded (meta device).")
        step = max(1, tensor.numel() // _SAMPLE)
        sample = tensor.detach().reshape(-1)[::step].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]
