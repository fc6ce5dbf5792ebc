"""Whether a checkpoint's files, and its base, are the ones that belong together.

- `tensors_digest`: of the trained tensors, whole or sharded; recorded in `config.json`, compared on loading
- `fingerprint`: of a base's weights: cheap, and the same whether they are loaded in float32 or bfloat16

Both guard against accidents; whoever can write the files can also write a new digest.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from l2d.network.quantized import weight_parts

_SAMPLE = 1 << 16


def tensors_digest(tensors: Mapping[str, torch.Tensor], warm_start: bool = False) -> str | None:
    """SHA-256 (32 hex digits) over names, dtypes, shapes and bytes, in the order of the names, and over `warm_start`.

    Of the settings that no tensor's shape shows, `warm_start` is the one that makes weights mean something else.
    `None` where the values are not in this process (meta tensors, shards of other processes).
    """
    digest = hashlib.sha256(b"warm_start" if warm_start else b"")
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _stored(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of all parameters, each once, quantized ones in parts."""
    parts: dict[int, list[torch.Tensor]] = {}
    for module in model.modules():
        if (held := weight_parts(module)) is not None:
            parts[id(module.weight)] = held
    for name, parameter in model.named_parameters():
        held = parts.get(id(parameter))
        yield from [(name, parameter)] if held is None else ((f"{name}.{n}", part) for n, part in enumerate(held))


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 (32 hex digits) over names, shapes and up to 65,536 values per tensor, rounded to bfloat16.

    Tied tensors count once; of a quantized layer its codes and scales count. Any finetuning of the base changes it; so
    does another revision. Raises `ValueError` for tensors on the meta device, which hold no weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_stored(model), key=lambda pair: pair[0]):
        if tensor.is_meta:
            raise ValueError(f"fingerprint of {name!r} needs weights, and it is on the meta device: load it first.")
        step = max(1, tensor.numel() // _SAMPLE)
        sample = tensor.detach().reshape(-1)[::step].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]
