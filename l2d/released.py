"""Checkpoints of the released implementation (SakanaAI/L2D).

- `load_released`: a model from its state dict, or from a folder with safetensors or `weights_only` pickle files
- `parameter_name`: reference parameter name -> ours, and whether it is transposed
- `released_config`: its keyword arguments -> `L2DConfig`

`python -m l2d.released SOURCE TARGET --settings FILE.json [--base FOLDER]` converts a checkpoint.
"""

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from l2d.checkpoint.bases import load_base
from l2d.cli.parser import Parser
from l2d.config import L2DConfig, base_config_from_dict
from l2d.modeling import L2DForCausalLM

_NAMES = (
    (r"model\.flow_token_embedder\.embedder\.layers_module\.0\.(weight|bias)", r"path.vocabulary.projection.\1"),
    (r"model\.flow_to_lm_encoder\.embedder\.layers_module\.(\d)\.(weight|bias)", r"path.input_projection.layers.\1.\2"),
    (r"model\.timestep_embedder\.mlp\.(\d)\.(weight|bias)", r"path.time_embedding.layers.\1.\2"),
    (r"model\.data_label_embedder\.weight", r"path.class_embedding.weight"),
    (r"model\.layers\.(\d+)\.modulation_head\.mlp\.(\d)\.(weight|bias)", r"path.layers.\1.modulation.\2.\3"),
    (r"model\.modulation_head\.mlp\.(\d)\.(weight|bias)", r"path.output_modulation.\1.\2"),
    (
        r"model\.layers\.(\d+)\.(self_attn|mlp)\.flow_(\w+_proj)\.([AB])",
        r"path.layers.\1.twin.\2.\3.lora_\4.diffusion.weight",
    ),
    (r"model\.layers\.(\d+)\.(self_attn|mlp)\.flow_(\w+_proj)\.(weight|bias)", r"path.layers.\1.twin.\2.\3.\4"),
)
_RESCALING = {"mult": lambda dim: dim**0.5, "none": lambda dim: 1.0, "div": lambda dim: dim**-0.5}
# What this package implements of the released implementation's switches; anything else is refused.
_FIXED_SETTINGS = {
    "base_params_to_freeze": "all",
    "noise_schedule": "identity",
    "velocity_schedule": "constant",
    "minimum_training_noise_units": "time",
    "flow_representation_space": "mapping",
    "flow_representation_num_layers": 1,
    "flow_representation_normalize": True,
    "flow_to_lm_translation_depth": 2,
    "flow_to_lm_rescale_in_float32": True,
    "preserve_behavior_at_flow_start": True,
    "modulate_hidden_states": False,
    "full_dit_modulation": True,
    "timestep_modulation_num_layers": 2,
    "freeze_modulation_at_flow_start": False,
    "separate_flow_params": True,
    "nstep_clamp_predictions": False,
}
# How the wrapper was loaded and trained, and the guidance of a call: no properties of the model.
_HARMLESS = (
    *("model_or_model_id", "model_loading_kwargs", "reinit_flow_params"),
    *("guidance_modulation_training_dropout", "nstep_guidance_parameter"),
)


def parameter_name(reference: str) -> tuple[str, bool] | None:
    """Our name of a reference parameter, and whether its matrix is transposed; `None` for the base's own tensors.

    Raises `ValueError` for a name that belongs to neither.
    """
    if ".wrapped_layer." in reference or "flow" not in reference and _is_base_name(reference):
        return None
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, reference):
            return re.sub(pattern, replacement, reference), reference.endswith((".A", ".B"))
    raise ValueError(f"{reference!r} is not a tensor of a released L2D checkpoint that this package can read.")


def _is_base_name(name: str) -> bool:
    return not any(part in name for part in ("modulation_head", "timestep_embedder", "data_label_embedder"))


def released_config(flow_kwargs: dict[str, Any], **overrides: Any) -> L2DConfig:
    """Our configuration for the keyword arguments that a released model was built with.

    Raises `ValueError` for a switch whose other setting is not implemented here, and for a name that is not known.
    """
    arguments = {name: value for name, value in flow_kwargs.items() if name not in _HARMLESS}
    for name, supported in _FIXED_SETTINGS.items():
        if (value := arguments.pop(name, supported)) != supported:
            raise ValueError(
                f"{name}={value!r} of the released implementation is not supported; only {supported!r} is."
            )
    rescaling = arguments.pop("flow_representation_rescaling", "mult")
    if rescaling not in _RESCALING:
        raise ValueError(f"flow_representation_rescaling={rescaling!r} is not known; choose one of mult, none, div.")
    dim = arguments.pop("flow_representation_dim", 256)
    rank = arguments.pop("flow_lora_rank", None) or 32
    alpha = arguments.pop("flow_lora_alpha", None)
    classes = arguments.pop("guidance_modulation_num_classes", None) or 0
    settings = {
        "variant": "lora" if arguments.pop("separate_flow_params_with_lora", False) else "full",
        "lora_rank": rank,
        "lora_alpha": float(2 * rank if alpha in (None, -1) else alpha),
        "diffusion_dim": dim,
        "noise_std": float(arguments.pop("noise_rescaling", 64.0)),
        "input_width": arguments.pop("flow_to_lm_hidden_size", 256),
        "conditioning_width": arguments.pop("timestep_modulation_hidden_size", 256),
        "frequency_width": arguments.pop("timestep_modulation_freq_embedding_size", 256),
        "embedding_norm": None if rescaling == "mult" else _RESCALING[rescaling](dim),
        "input_scale": float(arguments.pop("flow_to_lm_timestep_rescaling", 1.0)),
        "min_noise": float(arguments.pop("minimum_training_noise", None) or 0.0),
        "guidance_classes": [f"class_{number}" for number in range(classes)] or None,
        "sampler": _released_sampler(arguments),
    }
    _refuse_unknown("flow_kwargs", arguments)
    return L2DConfig(**{**settings, **overrides})


def _released_sampler(arguments: dict[str, Any]) -> dict[str, Any]:
    """The sampler settings among the keyword arguments, which are taken out of `arguments`."""
    ode = dict(arguments.pop("ode_kwargs", None) or {})
    options = dict(ode.pop("options", None) or {})
    method = ode.pop("method", "midpoint")
    sampler = {
        "solver": {"heun": "heun2"}.get(method, method),
        "rtol": ode.pop("rtol", 1e-5),
        "atol": ode.pop("atol", 1e-5),
        "first_step": options.pop("first_step", 0.05),
        "final_time": arguments.pop("nstep_final_timestep", 1.0),
        "choice": arguments.pop("nstep_x1_estimation", "sample"),
        "choice_temperature": arguments.pop("nstep_temperature_schedule", None) or 0.0,
        "normalize_average": arguments.pop("nstep_normalize_x1_predictions", False),
    }
    _refuse_unknown("ode_kwargs of flow_kwargs", ode)
    _refuse_unknown("options of ode_kwargs", options)
    return sampler


def _refuse_unknown(where: str, rest: dict[str, Any]) -> None:
    """Raise `ValueError` for options that were not read: they might change the results."""
    if rest:
        raise ValueError(
            f"{', '.join(map(repr, rest))} in {where} is not known, and might change results: correct the name, or "
            "leave out what does not belong to the model."
        )


@torch.no_grad()
def load_released(
    source: dict[str, torch.Tensor] | str | Path,
    flow_kwargs: dict[str, Any],
    base_config: dict[str, Any] | None = None,
    *,
    base: PreTrainedModel | None = None,
    **overrides: Any,
) -> L2DForCausalLM:
    """Build a float32 model from a released checkpoint.

    Args:
        source: state dict, or a folder that holds it.
        flow_kwargs: keyword arguments of the released flow wrapper (`L2DConfig` fields that shapes do not tell).
        base_config: the base's configuration with its `model_type` (or `family`); not needed with `base`.
        base: the base model, where the checkpoint does not hold it or another copy is to be used.

    Raises `ValueError` for missing, unknown or misshapen tensors.
    """
    state = source if isinstance(source, dict) else read_folder(Path(source))
    if base is None:
        base = _build_base(state, base_config or {})
    model = L2DForCausalLM.from_base(base, released_config(flow_kwargs, **overrides))
    missing = dict(model.trained_parameters())
    for reference, tensor in state.items():
        named = parameter_name(reference)
        if named is None:
            continue
        name, transposed = named
        if name not in missing:
            raise ValueError(f"tensor {reference!r} does not belong to a model with these settings: check flow_kwargs.")
        value = tensor.t() if transposed else tensor
        parameter = missing.pop(name)
        if value.shape != parameter.shape:
            raise ValueError(
                f"tensor {reference!r} has shape {tuple(tensor.shape)}, the settings say otherwise: check flow_kwargs."
            )
        parameter.copy_(value)
    if missing:
        raise ValueError(
            f"the released checkpoint lacks {len(missing)} tensors, that of {next(iter(missing))!r} first."
        )
    return model.eval()


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a released checkpoint folder; pickle files are read with `weights_only=True`.

    Raises `ValueError` for a folder without such files, damaged ones, and pickles of anything else than tensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not files and not pickles:
        raise ValueError(f"{str(folder)!r} holds neither *.safetensors nor pytorch_model*.bin files.")
    state: dict[str, torch.Tensor] = {}
    for file in files or pickles:
        try:
            state.update(load_file(file) if files else torch.load(file, map_location="cpu", weights_only=True))
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{str(file)!r} holds no tensors that can be read safely: {reason}") from error
    return state


def _build_base(state: dict[str, torch.Tensor], base_config: dict[str, Any]) -> PreTrainedModel:
    settings = dict(base_config)
    family = settings.pop("family", None)
    settings.setdefault("model_type", family)
    if settings["model_type"] is None:
        raise ValueError("base_config needs a model_type, 'llama' or 'qwen2'; or pass base=.")
    for outdated in ("torch_dtype", "transformers_version", "_name_or_path", "architectures"):
        settings.pop(outdated, None)
    base = AutoModelForCausalLM.from_config(base_config_from_dict(settings), dtype=torch.float32)
    tensors = {name: t for name, t in state.items() if "flow" not in name and _is_base_name(name)}
    result = base.load_state_dict(tensors, strict=False)
    missing = [
        name for name in result.missing_keys if not (name == "lm_head.weight" and base.config.tie_word_embeddings)
    ]
    if missing or result.unexpected_keys:
        raise ValueError(f"the base's tensors do not fit base_config: {(missing + result.unexpected_keys)[:3]}.")
    base.tie_weights()
    return base.eval()


def _read_settings(file: Path) -> dict[str, Any]:
    """What `--settings` names; `ValueError` where it cannot be used."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"settings={str(file)!r} cannot be read ({error}): give a JSON file.") from error
    parts = [settings.get("flow_kwargs"), settings.get("base_config") or {}] if isinstance(settings, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(
            f"settings={str(file)!r} must hold a mapping with flow_kwargs, a mapping, and without --base base_config, "
            "another one."
        )
    try:
        released_config(settings["flow_kwargs"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"flow_kwargs of settings={str(file)!r} cannot be used: {error}") from error
    return settings


def main() -> None:
    """Command line: convert a released checkpoint into one of ours."""
    parser = Parser(prog="python -m l2d.released", description=main.__doc__)
    parser.add_argument("source", type=Path, help="folder of the released checkpoint")
    parser.add_argument("target", type=Path, help="folder to write, which must not exist")
    parser.add_argument(
        "--settings", type=Path, required=True, help="JSON with flow_kwargs and, without --base, base_config"
    )
    parser.add_argument("--base", help="folder or hub name of the base, where it is not part of the checkpoint")
    arguments = parser.parse_args()
    if arguments.target.exists():
        parser.error(f"target={str(arguments.target)!r} exists already; name a new folder.")
    try:
        settings = _read_settings(arguments.settings)
        base = load_base(arguments.base) if arguments.base else None
        model = load_released(arguments.source, settings["flow_kwargs"], settings.get("base_config"), base=base)
        if base is None:
            model.base.save_pretrained(arguments.target / "base")
            model.config.base_name_or_path = str((arguments.target / "base").resolve())
        model.save_pretrained(arguments.target)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {arguments.target}")


if __name__ == "__main__":
    main()
