"""Loading: a checkpoint's trained tensors, and the base that they belong to.

- `load_parts`: configuration, base and trained tensors of a checkpoint, which `L2DForCausalLM` puts together
- `config_from`, `load_tokenizer`: the configuration object and the tokenizer of an open checkpoint
- `read_tensors`: trained tensors of a checkpoint folder, whole or sharded (safetensors only)

A checkpoint is refused without its base, with another base, with missing, extra, misshapen or non-finite tensors, and
with tensors of another digest than `config.json` records (one without a digest is taken without this last check).
Settings may be edited: they are checked by their ranges.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from l2d.checkpoint.bases import (
    ACCESS_ARGUMENTS,
    HUB_ARGUMENTS,
    base_options,
    describe_base,
    in_dtype,
    load_base,
    tokenizer_place,
)
from l2d.checkpoint.hub import checkpoint_folder
from l2d.checkpoint.opening import Checkpoint, base_location, open_checkpoint, read_mapping
from l2d.config import L2DConfig, base_config_from_dict
from l2d.integrity import fingerprint, tensors_digest


@dataclasses.dataclass
class CheckpointParts:
    """A loaded checkpoint: its name, configuration, base, trained tensors, and generation settings if it has any."""

    name: str
    config: L2DConfig
    base: PreTrainedModel
    tensors: dict[str, torch.Tensor]
    generation_config: GenerationConfig | None

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Copy the tensors into a model's trained `parameters`.

        Raises `ValueError` for missing, unexpected, misshapen or non-finite tensors, and for another digest.
        """
        missing = sorted(parameters.keys() - self.tensors.keys())
        extra = sorted(self.tensors.keys() - parameters.keys())
        for what, names in (("lacks", missing), ("holds unexpected", extra)):
            if names:
                raise ValueError(
                    f"pretrained={self.name!r} {what} {len(names)} tensors ({names[0]}, ...): it is not intact."
                )
        for key, parameter in parameters.items():
            value, where = self.tensors[key], f"pretrained={self.name!r}: tensor {key}"
            if value.shape != parameter.shape:
                raise ValueError(f"{where} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}.")
            if not value.is_floating_point():
                raise ValueError(f"{where} holds {value.dtype}, expected floating point.")
            if not torch.isfinite(value).all():
                raise ValueError(f"{where} holds values that are not finite.")
            parameter.copy_(value)
        recorded, warm = self.config.tensors_digest, self.config.warm_start
        if recorded is not None and recorded == tensors_digest(self.tensors, not warm):
            raise ValueError(
                f"pretrained={self.name!r}: warm_start={warm} does not fit the tensors, which were trained with "
                f"warm_start={not warm}: set it back."
            )
        if recorded not in (None, tensors_digest(self.tensors, warm)):
            raise ValueError(
                f"pretrained={self.name!r}: the tensors are not those that config.json was saved with: the files are "
                "damaged or of several checkpoints, copy the whole folder again."
            )


def load_parts(
    name: Checkpoint | str | os.PathLike, *, base: Any = None, config: L2DConfig | None = None, **kwargs: Any
) -> CheckpointParts:
    """Load checkpoint `name` and its recorded base, or `base`; see `L2DForCausalLM.from_pretrained`."""
    for unused in ("state_dict", "output_loading_info"):
        if kwargs.pop(unused, None) not in (None, False):
            raise ValueError(f"{unused} cannot be used: the trained tensors are those of the folder; leave it out.")
    if not isinstance(config, (L2DConfig, type(None))):
        raise ValueError(f"config={config!r} must be an L2DConfig; leave it out to take that of the checkpoint.")
    for internal in ("_from_auto", "adapter_kwargs", "_commit_hash"):
        kwargs.pop(internal, None)
    hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
    if not isinstance(name, Checkpoint) and os.path.isdir(name):
        hub.pop("revision", None)  # as in transformers
    access = {key: value for key, value in hub.items() if key in ACCESS_ARGUMENTS}
    if config is None or isinstance(name, Checkpoint):
        opened = open_checkpoint(name, **hub)
        config, base = config or config_from(opened), opened.base if base is None else base
        folder, name = opened.folder, opened.name
    else:
        folder = checkpoint_folder(name, **hub)
        trained_with = bool((read_mapping(folder, CONFIG_NAME) or {}).get("warm_start"))
        if trained_with != config.warm_start:
            raise ValueError(
                f"config has warm_start={config.warm_start}, and pretrained={os.fspath(name)!r} was trained with "
                f"warm_start={trained_with}: its weights fit no other start, set it in config."
            )
    tensors = read_tensors(folder)
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _dtype(dtype)
    convert = isinstance(dtype, torch.dtype)
    if isinstance(base, PreTrainedModel):
        _check_base(name, config, base)
        base = in_dtype(base, dtype) if convert and base.dtype != dtype else base  # the caller's model stays as it is
    else:
        where = base_location(os.fspath(name), config.base_name_or_path, base)
        options = {**base_options(config, where, replaced=base is not None, **access), **access, **kwargs}
        if "dtype" in options:  # quantized, from weights in the dtype of its training
            _check_dtype(dtype, options["dtype"])
            convert = False
        base = load_base(where, **options, **({"dtype": dtype} if convert else {}))
        as_stored = base
        if convert and not _is_recorded_base(config, base):  # float16 cannot hold all that the fingerprint looks at
            as_stored = load_base(where, **options)
        _check_base(name, config, as_stored)
    refuse_offloaded(base)
    if not config.base_config:
        describe_base(config, base)
    generation_config = None
    if read_mapping(folder, GENERATION_CONFIG_NAME) is not None:
        generation_config = GenerationConfig.from_pretrained(folder)
    return CheckpointParts(os.fspath(name), config, base, tensors, generation_config)


def _check_dtype(given: Any, recorded: torch.dtype) -> None:
    """Raise `ValueError` where another dtype than the `recorded` one is asked for a quantized base."""
    if given not in (None, "auto", recorded):
        raise ValueError(
            f"dtype={given} cannot be applied to a quantized base, which was {recorded} in training: leave dtype out."
        )


def refuse_offloaded(base: PreTrainedModel) -> None:
    """Raise `ValueError` for a base of which a part, or all, is loaded only while its own layers run."""
    on_meta = [p.is_meta for p in base.parameters()]
    if any(on_meta) and not (all(on_meta) and getattr(base, "hf_device_map", None) is None):  # else a dry run's
        raise ValueError(
            "a part of the base would be offloaded, and the diffusion path shares its weights: keep all of it on "
            "devices (device_map, max_memory, max_memory_per_gpu), on more of them or in a smaller dtype."
        )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={name!r} is not known; choose 'auto', 'float32', 'bfloat16' or 'float16'.")
    return dtype


def config_from(checkpoint: Checkpoint) -> L2DConfig:
    """The configuration object of an open checkpoint. Raises `ValueError`."""
    try:
        return L2DConfig.from_dict(dict(checkpoint.content))
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{CONFIG_NAME} of {checkpoint.name!r} cannot be used: {reason}") from error


def load_tokenizer(source: Checkpoint | str, **options: Any) -> Any:
    """The tokenizer of an open checkpoint, or of another folder or hub name, with `options` of `AutoTokenizer`.

    Raises `ValueError` where none can be loaded.
    """
    if isinstance(source, Checkpoint):
        if source.settings.base_config:  # the base's type and name help to choose the class
            options["config"] = base_config_from_dict(source.settings.base_config)
            options["config"]._name_or_path = source.base_location
        if source.tokenizer_source == source.base_location:
            options["gguf_file"] = source.gguf_file
        source = source.tokenizer_source
    try:
        source, options = tokenizer_place(source, **options)
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer={source!r} cannot be loaded: {reason}") from error


def read_tensors(name: str | os.PathLike) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint in folder `name` on the CPU; `ValueError` names a missing or unreadable file."""
    files = {SAFE_WEIGHTS_NAME}
    index = read_mapping(name, SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(f, str) and f == Path(f).name for f in shards.values()):
            raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {os.fspath(name)!r} names no files: restore it.")
        files = set(shards.values())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        path = Path(name) / file
        if not path.is_file():
            raise ValueError(f"pretrained={os.fspath(name)!r} lacks {file}: the checkpoint is incomplete.")
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): the file is damaged, restore it or save again."
            ) from error
    return tensors


def _is_recorded_base(config: L2DConfig, base: PreTrainedModel) -> bool:
    """Whether `base` has the fingerprint of `config`; true where there is none, or no weights."""
    without = config.base_fingerprint is None or any(p.is_meta for p in base.parameters())
    return without or fingerprint(base) == config.base_fingerprint


def _check_base(name: str | os.PathLike, config: L2DConfig, base: PreTrainedModel) -> None:
    if not _is_recorded_base(config, base):
        where = base.config._name_or_path or "the given model"
        raise ValueError(
            f"base={where!r} is not the base that {os.fspath(name)!r} was trained on (fingerprint {fingerprint(base)}, "
            f"expected {config.base_fingerprint}): pass base= with the original weights."
        )
