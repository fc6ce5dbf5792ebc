"""The frozen base, whatever it is kept as: found, loaded as a plain or quantized model, and recorded.

- `load_base`: a model's folder or hub name, one GGUF file of it, or a PEFT adapter, which is merged
- `load_plain_base`: the same as plain numbers
- `base_configuration`, `model_place`, `tokenizer_place`: its configuration alone, and where model and tokenizer are
- `base_name`, `describe_base`, `base_options`: what a checkpoint records of its base, and how it is loaded again
- `cannot_come_back`: why what is recorded would not give a base back
- `in_dtype`: a loaded base in another dtype, as transformers loads it
"""

import os
import warnings
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from l2d.checkpoint.opening import TOKENIZER_FILES, base_location, check_base, gguf_file_at, read_mapping
from l2d.checkpoint.quantization import (
    QUANTIZATION,
    check_method,
    check_quantization,
    quantizing,
    recorded_quantization,
)
from l2d.checkpoint.settings import CheckpointSettings
from l2d.config import L2DConfig
from l2d.network.quantized import as_plain, is_quantized, plain_tensor

ACCESS_ARGUMENTS = ("cache_dir", "token", "local_files_only", "force_download")
"""Arguments of `huggingface_hub` that a checkpoint, its base, and an adapter's base share."""
HUB_ARGUMENTS = ("revision", "subfolder", *ACCESS_ARGUMENTS)
_CONFIGURING = (*HUB_ARGUMENTS, "trust_remote_code")
_ERRORS = (ImportError, OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError)
_REFUSED_METHODS = ("gptq", "awq")  # whose layers cannot even be built without packages of theirs
_SAMPLED = 256  # values of a tensor that are compared with its file


def load_base(name: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """Load a base by folder or hub name; `dtype` defaults to the one it is stored in.

    Args:
        options: of transformers' `from_pretrained`, and those of `QUANTIZATION`. With `gguf_file`, a file in the
            folder or repository, the result is a plain model with that file's weights. An adapter is merged into its
            own base in float64.

    Raises `ValueError`.
    """
    options = {key: value for key, value in options.items() if value is not None} | {
        "dtype": options.get("dtype") or "auto"
    }
    check_base(name, options.get("gguf_file"))
    if not hasattr(options.get("quantization_config"), "quant_method"):  # else an object, which transformers checks
        check_quantization({**options, "base_gguf_file": options.get("gguf_file")})
    try:
        if adapter := _adapter(name, options):
            return _merged(os.fspath(name), adapter, options)
        if "gguf_file" in options:  # which takes seconds to read, and is nothing else
            return _load(name, options)
        known = {key: value for key, value in options.items() if key in _CONFIGURING}
        config = AutoConfig.from_pretrained(name, **known)
        if config.model_type != "l2d":
            return _load(name, _with_quantization(options, config))
    except _ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"base={os.fspath(name)!r} could not be loaded ({reason}); give a folder or hub name of the base model."
        ) from error
    raise ValueError(f"base={os.fspath(name)!r} is itself an L2D checkpoint; name the model that it was trained on.")


def _load(name: str | os.PathLike, options: dict[str, Any]) -> PreTrainedModel:
    if "gguf_file" in options:
        from transformers import GgufConfig

        options = {**options, "quantization_config": GgufConfig(dequantize=True)}  # plain numbers, and a plain model
    base, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"its files lack {len(lacking)} tensors, {lacking[0]!r} first")
    return base


def _with_quantization(options: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """`options` with one `quantization_config` in place of those of `QUANTIZATION`. Raises `ValueError`."""
    given = {name: options[name] for name in QUANTIZATION if name in options}
    others = {name: value for name, value in options.items() if name not in QUANTIZATION}
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored["quant_method"] if isinstance(stored, dict) else stored.quant_method.value
        if quantizing(given):
            raise ValueError(f"it is quantized by {method} already: leave {quantizing(given)} out")
        if method in _REFUSED_METHODS:
            check_method(method, "its config.json")
    if not quantizing(given):
        return others
    dtype = others["dtype"] if others["dtype"] != "auto" else getattr(config, "dtype", None) or torch.float32
    return {**others, "quantization_config": quantization_object(given, dtype)}


def quantization_object(given: dict[str, Any], dtype: torch.dtype) -> Any:
    """transformers' object for settings of `QUANTIZATION`, for a base of `dtype`. Raises `ValueError`."""
    from transformers import BitsAndBytesConfig, TorchAoConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = given.get("quantization_config")
    if config is None:
        wanted = {name: given.get(name, one.default) for name, one in QUANTIZATION.items()}
        del wanted["quantization_config"]
        wanted["bnb_4bit_compute_dtype"] = wanted["bnb_4bit_compute_dtype"] or dtype
        return BitsAndBytesConfig(**wanted)
    if not isinstance(config, dict):
        return config
    if isinstance(name := config.get("quant_type"), str) and config["quant_method"] == "torchao":
        import torchao.quantization

        kind = getattr(torchao.quantization, name, None)
        if kind is None:
            raise ValueError(f"quant_type={name!r} is no configuration of torchao.quantization")
        more = {key: value for key, value in config.items() if key not in ("quant_type", "quant_method")}
        return TorchAoConfig(kind(), **more)
    return AutoQuantizationConfig.from_dict(config)


# ---- adapters ----------------------------------------------------------------------------------------------------


def _adapter(name: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the PEFT adapter `name`, `None` for what is none. Raises `ValueError`."""
    access = {key: value for key, value in options.items() if key in HUB_ARGUMENTS}
    file = None if "gguf_file" in options else find_adapter_config_file(os.fspath(name), **access)
    if file is None:
        return None
    folder = os.path.dirname(file)
    if os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError("it holds a model and an adapter: give each a folder of its own")
    settings = read_mapping(folder, os.path.basename(file)) or {}
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise ValueError("it is an adapter that does not say what it was trained on: merge it by hand")
    base = base_location(os.fspath(name), settings["base_model_name_or_path"])
    return {**settings, "base_model_name_or_path": base}


def _options_of_its_base(adapter: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in options.items() if key not in ("revision", "subfolder", "dtype")}
    revision = adapter.get("revision")
    return (
        own if revision is None or os.path.isdir(adapter["base_model_name_or_path"]) else own | {"revision": revision}
    )


def load_plain_base(name: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """A base as `load_base` gives it, but of plain numbers: quantized weights as the values that they stand for.

    An adapter of a quantized base is merged into these values. Raises `ValueError`.
    """
    options = {key: value for key, value in options.items() if value is not None}
    check_base(name, options.get("gguf_file"))
    dtype = options.pop("dtype", None)
    adapter = _adapter(name, options)
    if adapter is None:
        base = as_plain(load_base(name, **options))
    else:
        base = load_plain_base(adapter["base_model_name_or_path"], **_options_of_its_base(adapter, options))
        base = merge_adapter(base, os.fspath(name), {k: v for k, v in options.items() if k in HUB_ARGUMENTS})
    return base if dtype in (None, base.dtype) else in_dtype(base, dtype)


def _merged(name: str, adapter: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    """The adapter's base with the adapter merged in, in float64 so that every machine gets the same weights."""
    remedy = f"write the merged model with python -m l2d dequantize {name} TARGET, and give TARGET as base"
    if quantizing(options):
        raise ValueError(f"an adapter is merged into a base that is not quantized: {remedy}")
    base = load_base(adapter["base_model_name_or_path"], **_options_of_its_base(adapter, options))
    if is_quantized(base):
        raise ValueError(f"its own base is quantized, and merging would round it again: {remedy}")
    merged = merge_adapter(base, name, {key: value for key, value in options.items() if key in HUB_ARGUMENTS})
    return merged if options["dtype"] == "auto" else in_dtype(merged, options["dtype"])


def merge_adapter(base: PreTrainedModel, adapter: str, hub: dict[str, Any]) -> PreTrainedModel:
    """`base`, which is used up, with the adapter of that folder or hub name merged in, in the dtype of `base`.

    Raises `ValueError` for an adapter that is no change of weights.
    """
    from peft import PeftModel  # late: peft may be what imports us, through transformers
    from peft.tuners.tuners_utils import BaseTunerLayer

    stored = base.dtype
    try:
        model = PeftModel.from_pretrained(base.float(), adapter, **hub)
    except RuntimeError as error:  # of shapes
        raise ValueError(f"the adapter does not fit its base: {' '.join(str(error).split())[:200]}") from error
    if not hasattr(model, "merge_and_unload"):
        kind = type(model.active_peft_config).__name__
        raise ValueError(
            f"an adapter of the kind {kind} is no change of weights that could be merged: use another base"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all is merged already, at the end
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.double()
                layer.merge(safe_merge=True)
                layer.float()
        merged = model.merge_and_unload()
    merged.config._name_or_path = adapter
    return merged if stored == torch.float32 else in_dtype(merged, stored)


# ---- parts of a base that is not loaded --------------------------------------------------------------------------


def model_place(name: str | os.PathLike, **options: Any) -> tuple[str, dict[str, Any]]:
    """Where the model of a base is, an adapter's own base, and the options to read it with. Raises `ValueError`."""
    options = {key: value for key, value in options.items() if value is not None}
    check_base(name, options.get("gguf_file"))
    if adapter := _adapter(name, options):
        return model_place(adapter["base_model_name_or_path"], **_options_of_its_base(adapter, options))
    return os.fspath(name), options


def base_configuration(name: str | os.PathLike, **options: Any) -> PreTrainedConfig:
    """The configuration of a base; `options` as for `load_base`. Raises `OSError` or `ValueError`."""
    place, options = model_place(name, **options)
    return AutoConfig.from_pretrained(place, **options)


def tokenizer_place(name: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Where a base's tokenizer is, and the options to load it with. Raises `ValueError`.

    An adapter has its own, or that of its base.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if any(os.path.isfile(os.path.join(name, file)) for file in TOKENIZER_FILES):
        return name, options
    if adapter := _adapter(name, options):
        place = adapter["base_model_name_or_path"]
        return tokenizer_place(place, **_options_of_its_base(adapter, options))
    return name, options


# ---- what a checkpoint records -----------------------------------------------------------------------------------


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


def base_options(settings: CheckpointSettings, place: str, replaced: bool = False, **access: Any) -> dict[str, Any]:
    """Options with which the base that `settings` record is loaded from `place`, which may replace the recorded one.

    A quantized base has its recorded `dtype` and, unless `place` holds codes already, is quantized as it was.
    """
    gguf_file = gguf_file_at(place, settings.base_gguf_file, replaced)
    options: dict[str, Any] = {"revision": settings.base_revision, "gguf_file": gguf_file}
    if quantization := recorded_quantization(settings.base_config):
        options["dtype"] = getattr(torch, str((settings.base_config or {}).get("dtype") or "float32"))
        if getattr(base_configuration(place, **options, **access), "quantization_config", None) is None:
            options["quantization_config"] = quantization
    return {name: value for name, value in options.items() if value is not None}


def cannot_come_back(config: L2DConfig, base: PreTrainedModel) -> str | None:
    """Why loading what `config` records would not give `base`, in words; `None` where no reason is seen.

    Of a folder's safetensors the first values of every tensor are compared; other files are only looked for.
    """
    name = config.base_name_or_path
    if not name:
        return "no name is recorded for its base: load the base by name, or set config.base_name_or_path"
    folder = Path(name)
    if not folder.is_dir():
        gone = folder.is_absolute()
        return f"its base was recorded as {name!r}, which is no folder: save the base there" if gone else None
    try:
        check_base(folder, config.base_gguf_file)
    except ValueError as error:
        return str(error).rstrip(".")
    if config.base_gguf_file is not None or (folder / "adapter_config.json").is_file():
        return None
    if changed := _differs_from_files(folder, base):
        return f"its base is not what {name!r} holds ({changed} differs): save the base, and start from that folder"
    return None


@torch.no_grad()
def _differs_from_files(folder: Path, base: PreTrainedModel) -> str | None:
    """Name of a parameter whose values are not those of the folder's files, `None` if none is found."""
    parameters = {n: p for n, p in base.named_parameters() if plain_tensor(p) and not p.is_meta}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys() & parameters.keys():
                    stored, own = tensors.get_slice(name), parameters[name]
                    if tuple(stored.get_shape()) != tuple(own.shape):
                        continue
                    first = stored[:1].flatten()[:_SAMPLED]
                    if plain_tensor(first) and not torch.equal(*_comparable(first, own[:1].flatten()[:_SAMPLED])):
                        return name
        except (OSError, SafetensorError):
            continue
    return None


def _comparable(*values: torch.Tensor) -> list[torch.Tensor]:
    """Values in the smallest of their dtypes, in which they are equal if they were once cast to it."""
    smallest = min((v.dtype for v in values), key=lambda dtype: dtype.itemsize)
    return [v.cpu().to(smallest) for v in values]


# ---- dtypes ------------------------------------------------------------------------------------------------------


def in_dtype(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of `base` in `dtype`, with the values that transformers' `from_pretrained(dtype=dtype)` gives.

    `base.to(dtype)` would also round buffers that are computed in float32, such as the rotary frequencies. Raises
    `ValueError` for a quantized base.
    """
    if is_quantized(base):
        raise ValueError(f"dtype={dtype} cannot be applied to a quantized base: leave dtype out.")
    places = getattr(base, "hf_device_map", None) or {"": next(base.parameters()).device}
    copy = type(base).from_pretrained(
        None, config=deepcopy(base.config), state_dict=base.state_dict(), dtype=dtype, device_map=places
    )
    copy.config._name_or_path, copy.generation_config = base.config._name_or_path, deepcopy(base.generation_config)
    return copy
