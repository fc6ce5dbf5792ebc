"""What a checkpoint says before anything of it is loaded, without torch.

- `read_config_file`: its `config.json`, if it is one of ours
- `base_location`: where its base is
- `check_files`: whether the weights and the base are where they should be
- `check_sampler`: whether its model can follow some sampler settings
"""

import json
import os
from pathlib import Path
from typing import Any

from l2d.checkpoint.hub import config_folder, looks_local
from l2d.sampler_config import SamplerConfig

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def read_config_file(name: str | Path, revision: str | None = None, **access: Any) -> dict[str, Any]:
    """`config.json` of the L2D checkpoint `name`, a folder or (at `revision`) on the hub, which is asked for no more.

    `access`: see `l2d.checkpoint.hub`.
    Raises `ValueError` if there is none, or if it is another model's.
    """
    folder = config_folder(name, revision, **access)
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"pretrained={str(name)!r} holds no readable config.json: give the folder of an L2D checkpoint."
        ) from error
    if kind != "l2d":
        raise ValueError(
            f"pretrained={str(name)!r} is a {kind!r} model, not an L2D checkpoint: "
            "evaluate it with --model hf, or give the folder or hub name of a model trained on top of it."
        )
    return config


def base_location(
    name: str | os.PathLike, recorded: str | None, base: str | os.PathLike | None = None
) -> str | os.PathLike:
    """Where the base of checkpoint `name` is: `base`, the `recorded` place, or a folder beside the checkpoint."""
    location = base or recorded
    if not location:
        raise ValueError(f"pretrained={os.fspath(name)!r} does not record where its base is: pass base=FOLDER_OR_NAME.")
    if base is None and not Path(location).is_dir():
        beside = Path(name).resolve().parent / Path(location).name
        if Path(location).is_absolute() and (beside / "config.json").is_file():
            return beside  # the whole experiment folder was moved
        if Path(location).is_absolute():
            raise ValueError(
                f"base={os.fspath(location)!r}, recorded in {os.fspath(name)!r}, does not exist: pass base=FOLDER."
            )
    return location


def check_files(folder: str | Path, config: dict[str, Any], base: str | Path | None = None) -> None:
    """Raise `ValueError` if the checkpoint's weights or its base (where it must be a folder) are not there."""
    if not any((Path(folder) / name).is_file() for name in _WEIGHTS):
        raise ValueError(
            f"pretrained={str(folder)!r} lacks {_WEIGHTS[0]}: the checkpoint is incomplete, copy or train it again."
        )
    location = base_location(folder, config.get("base_name_or_path"), base)
    if looks_local(location) and not Path(location).is_dir():
        raise ValueError(f"base={str(location)!r} is not a folder: give the folder or the hub name of the base model.")


def check_sampler(config: dict[str, Any], changes: dict[str, Any]) -> SamplerConfig:
    """The sampler of a checkpoint with this `config.json` under `changes`; `ValueError` for impossible settings."""
    SamplerConfig().replace(**changes)
    sampler = SamplerConfig().replace(**{**(config.get("sampler") or {}), **changes})
    sampler.class_index(config.get("guidance_classes"))
    return sampler.for_path(bool(config.get("carried_state")), bool(config.get("noise_free")))
