"""Digests by which a checkpoint's files know each other: damage, swapped files and edits are seen when it is loaded.

- `tensors_digest`: of the trained tensors, whole or sharded, kept in `config.json`
- `settings_digest`: of `config.json` itself, and of `generation_config.json`; `check_settings` compares

They guard against accidents; whoever can write the files can also write new digests.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_FREE = ("base_name_or_path", "base_revision", "transformers_version", "settings_digest")
"""What may change without changing a result: the fingerprint tells whether the base is the right one."""


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


def settings_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 (32 hex digits) over the values of a JSON file, apart from those that may change."""
    kept = {name: value for name, value in content.items() if name not in _FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]


def check_settings(name: str | os.PathLike, file: str, content: Mapping[str, Any], digest: Any) -> None:
    """Raise `ValueError` if `content` of the JSON file of checkpoint `name` is not that of `digest`; `None` is any."""
    if digest is not None and settings_digest(content) != digest:
        noted = "settings_digest" if file == "config.json" else "settings_digest and generation_digest"
        raise ValueError(
            f"{file} of {os.fspath(name)!r} is not as it was saved: restore it, or if it was changed on purpose, "
            f"remove {noted} from config.json."
        )
