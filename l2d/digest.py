"""The digest of a checkpoint's trained tensors: damaged and swapped files are noticed when they are loaded.

- `tensors_digest`: of the trained tensors, whole or sharded, kept in `config.json`

It guards against accidents; whoever can write the files can also write a new digest.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def tensors_digest(tensors: Mapping[str, "torch.Tensor"]) -> str | None:
    """SHA-256 (32 hex digits) over names, dtypes, shapes and bytes, in the order of the names.

    `None` where the values are not in this process (meta tensors, shards of other processes).
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
