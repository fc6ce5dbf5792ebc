"""Loading: a checkpoint's trained tensors, and the base that they belong to.

- `load`: what `L2DForCausalLM.from_pretrained` does
- `load_base`, `base_name`, `describe_base`: the frozen base and what a checkpoint records of it
- `read_tensors`: trained tensors of a checkpoint folder, whole or sharded (safetensors only)

A checkpoint without its base, with another base, or with missing, extra, misshapen or non-finite tensors is refused.
"""

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from l2d.checkpoint_folder import base_location
from l2d.config import L2DConfig
from l2d.fingerprint import fingerprint

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM

_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def base_name(base: PreTrainedModel) -> str | None:
    """Where `base` was loaded from: the absolute path of a folder, or a hub name; `None` if it never was."""
    name = base.config._name_or_path or None
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def describe_base(config: L2DConfig, base: PreTrainedModel) -> None:
    """Record the base's configuration in `config`, and the token ids that transformers reads from there."""
    description = base.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        description.pop(volatile, None)
    config.base_config = description
    text = base.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(text, name, None))
    config.vocab_size = text.vocab_size
    config.hidden_size = text.hidden_size
    config.tie_word_embeddings = False  # the base ties its own


def load_base(name: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load a base by folder or hub name; `dtype` defaults to the one it is stored in."""
    kwargs.setdefault("dtype", "auto")
    given = os.fspath(name)
    try:
        known = {key: value for key, value in kwargs.items() if key in (*_HUB_ARGUMENTS, "trust_remote_code")}
        model_type = AutoConfig.from_pretrained(name, **known).model_type
        if model_type != "l2d":
            return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"base={given!r} could not be loaded ({reason}); give a folder or hub name of the base model."
        ) from error
    raise ValueError(f"base={given!r} is itself an L2D checkpoint; name the model that it was trained on.")


def load(
    cls: "type[L2DForCausalLM]",
    name: str | os.PathLike,
    *,
    base: Any = None,
    config: L2DConfig | None = None,
    **kwargs: Any,
) -> "L2DForCausalLM":
    """Load checkpoint `name`, around its recorded base or around `base`; see `L2DForCausalLM.from_pretrained`."""
    hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}
    for unused in ("state_dict", "output_loading_info", "_from_auto", "adapter_kwargs", "_commit_hash"):
        kwargs.pop(unused, None)
    if config is None:
        config = read_config(name, **hub)
    tensors = read_tensors(name, **hub)
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _dtype(dtype)
    given = base
    if not isinstance(base, PreTrainedModel):
        base = load_base(base_location(name, config.base_name_or_path, base), revision=config.base_revision, **kwargs)
    _check_base(name, config, base)
    if isinstance(dtype, torch.dtype) and any(p.dtype != dtype for p in base.parameters()):
        base = (copy.deepcopy(base) if base is given else base).to(dtype)  # the caller's model stays as it is
    model = cls(config, base=base)
    _fill(model, tensors, os.fspath(name))
    if config.variant == "full":  # copies of the base's projections run in the base's dtype
        for layer in model.path.layers:
            layer.twin.to(base.dtype)
    try:
        model.generation_config = GenerationConfig.from_pretrained(name, **hub)
    except OSError:
        pass  # the base's stays
    model.name_or_path = os.fspath(name)
    return model.eval()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={name!r} is not known; choose 'auto', 'float32', 'bfloat16' or 'float16'.")
    return dtype


def read_config(name: str | os.PathLike, **hub: Any) -> L2DConfig:
    """The configuration of an L2D checkpoint; `ValueError` where there is none."""
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "model type" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"pretrained={os.fspath(name)!r} is not an L2D checkpoint: {reason}") from error
    if not isinstance(config, L2DConfig):
        raise ValueError(
            f"pretrained={os.fspath(name)!r} holds a {config.model_type!r} model, not an L2D checkpoint: "
            "train one with training.train, or use the model as it is."
        )
    return config


def read_tensors(name: str | os.PathLike, **hub: Any) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint on the CPU; `ValueError` names a missing or unreadable file."""

    def find(file: str) -> str | None:
        return cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False, **hub
        )

    index = find(SAFE_WEIGHTS_INDEX_NAME)
    files = [SAFE_WEIGHTS_NAME]
    if index is not None:
        files = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        path = find(file)
        if path is None:
            raise ValueError(f"pretrained={os.fspath(name)!r} lacks {file}: the checkpoint is incomplete.")
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): the file is damaged, restore it or save again."
            ) from error
    return tensors


def _check_base(name: str | os.PathLike, config: L2DConfig, base: PreTrainedModel) -> None:
    if config.base_fingerprint is None or any(p.is_meta for p in base.parameters()):
        return
    found = fingerprint(base)
    if found != config.base_fingerprint:
        where = base.config._name_or_path or "the given model"
        raise ValueError(
            f"base={where!r} is not the base that {os.fspath(name)!r} was trained on (fingerprint {found}, expected "
            f"{config.base_fingerprint}): pass base= with the original weights."
        )


@torch.no_grad()
def _fill(model: "L2DForCausalLM", tensors: dict[str, torch.Tensor], name: str) -> None:
    wanted = dict(model.trained_parameters())
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for what, names in (("lacks", missing), ("holds unexpected", extra)):
        if names:
            raise ValueError(f"pretrained={name!r} {what} {len(names)} tensors ({names[0]}, ...): it is not intact.")
    for key, parameter in wanted.items():
        value = tensors[key]
        if value.shape != parameter.shape:
            raise ValueError(
                f"pretrained={name!r}: tensor {key} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}."
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"pretrained={name!r}: tensor {key} holds values that are not finite.")
        parameter.copy_(value)
