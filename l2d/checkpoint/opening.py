"""A checkpoint, opened once: its `config.json` is read and checked, and everything takes the result, without torch.

- `open_checkpoint`: a folder or hub name -> `Checkpoint`
- `Checkpoint`: settings, commit, folder, base and tokenizer of a checkpoint
- `read_config_file`: `config.json` as it is, if it is one of ours; `read_mapping`: any JSON file of a folder
- `base_location`, `gguf_file_at`, `check_base`: where a base is, and whether it can be one
"""

import dataclasses
import importlib.util
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from l2d.checkpoint.hub import checkpoint_folder, commit_of, config_folder, looks_local
from l2d.checkpoint.settings import CheckpointSettings
from l2d.sampler_config import SamplerConfig
from l2d.settings import declared

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_DESCRIPTIONS = ("config.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose settings were read and checked. Of one on a hub only `config.json` is fetched at first.

    Attributes:
        name, revision: as the user gave them; `revision` is `None` for a folder.
        content: `config.json` as it is; settings: its own part of it.
        base: folder or hub name of a base that replaces the recorded one, or `None`.
        config_folder: where `config.json` was read; hub: further arguments of `huggingface_hub`.
    """

    name: str
    revision: str | None
    content: dict[str, Any]
    settings: CheckpointSettings
    base: str | None
    config_folder: str
    hub: dict[str, Any]

    @property
    def commit(self) -> str | None:
        """The commit on the hub, `None` for other folders."""
        return commit_of(self.config_folder)

    @cached_property
    def folder(self) -> str:
        """Folder with all that loading reads, fetched at the first use. Raises `ValueError`."""
        return checkpoint_folder(self.name, self.revision, at=self.config_folder, **self.hub)

    @property
    def base_location(self) -> str:
        """Where the base is. Raises `ValueError`."""
        return base_location(self.name, self.settings.base_name_or_path, self.base)

    @property
    def gguf_file(self) -> str | None:
        """The GGUF file that holds the base, where it is one. Raises `ValueError`."""
        return gguf_file_at(self.base_location, self.settings.base_gguf_file, replaced=self.base is not None)

    @cached_property
    def tokenizer_source(self) -> str:
        """Where its tokenizer is: in its own folder, or with its base."""
        own = any((Path(self.folder) / name).is_file() for name in TOKENIZER_FILES)
        return self.folder if own else self.base_location

    def check_files(self) -> None:
        """Raise `ValueError` if the weights or the base (where it must be a folder) are not there."""
        if not any((Path(self.folder) / name).is_file() for name in _WEIGHTS):
            raise ValueError(
                f"pretrained={self.name!r} lacks {_WEIGHTS[0]}: the checkpoint is incomplete, copy or train it again."
            )
        check_base(self.base_location, self.gguf_file)

    def sampler(self, **changes: Any) -> SamplerConfig:
        """The checkpoint's sampler with `changes`; `ValueError` for settings that are impossible or not for it."""
        SamplerConfig().replace(**changes)  # what is impossible anywhere is said first
        return self.settings.check_sampler(self.settings.default_sampler(**changes))


def open_checkpoint(
    checkpoint: Checkpoint | str | os.PathLike,
    revision: str | None = None,
    base: str | os.PathLike | None = None,
    **hub: Any,
) -> Checkpoint:
    """Open `checkpoint`, a folder or (at `revision`) a name on the hub; one that is open is returned as it is.

    Args:
        base: folder or hub name of its base, in place of the recorded one.
        hub: `subfolder` and arguments of `huggingface_hub`, see `l2d.checkpoint.hub`.

    Raises `ValueError` if it is not there, is another model's, or has settings that are impossible.
    """
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    name, base = os.fspath(checkpoint), None if base is None else os.fspath(base)
    folder = config_folder(name, revision, **hub)
    content = _read(name, folder)
    known = {key: content[key] for key in declared(CheckpointSettings) if key in content}
    settings = CheckpointSettings(**known)
    try:
        settings.check()
    except ValueError as error:
        raise ValueError(f"config.json of {name!r} cannot be used: {error}") from error
    return Checkpoint(name, revision, content, settings, base, folder, hub)


def read_config_file(name: str | os.PathLike, revision: str | None = None, **hub: Any) -> dict[str, Any]:
    """`config.json` of the L2D checkpoint `name`, unchecked. Raises `ValueError` if there is none of ours."""
    return _read(os.fspath(name), config_folder(name, revision, **hub))


def _read(name: str, folder: str) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"pretrained={name!r} holds no config.json: give the folder of an L2D checkpoint.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind = content["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"config.json of {name!r} cannot be read ({type(error).__name__}: {error}): the file is damaged, restore "
            "it or save again."
        ) from error
    if kind != "l2d":
        raise ValueError(
            f"pretrained={name!r} is a {kind!r} model, not an L2D checkpoint: "
            "evaluate it with --model hf, or give the folder or hub name of a model trained on top of it."
        )
    return content


def base_location(name: str, recorded: str | None, base: str | os.PathLike | None = None) -> str:
    """Where the base of checkpoint `name` is: `base`, else as `recorded`, else the folder of that name beside it."""
    location = os.fspath(base or recorded or "")
    if not location:
        raise ValueError(f"pretrained={name!r} does not record where its base is: pass base=FOLDER_OR_NAME.")
    if base is None and Path(location).is_absolute() and not Path(location).is_dir():
        beside = Path(name).resolve().parent / Path(location).name
        if not _holds_model(beside):
            raise ValueError(f"base={location!r}, recorded in {name!r}, does not exist: pass base=FOLDER.")
        return str(beside)  # the whole experiment folder was moved
    return location


def gguf_file_at(place: str | os.PathLike, recorded: str | None, replaced: bool = False) -> str | None:
    """The GGUF file to load a base from: the `recorded` one, unless a folder without it replaces the recorded place."""
    elsewhere = replaced and recorded is not None and Path(place).is_dir() and not Path(place, recorded).is_file()
    return None if elsewhere else recorded


def _holds_model(folder: Path) -> bool:
    """Whether there is a model, an adapter, or a GGUF file in `folder`."""
    return any((folder / name).is_file() for name in _DESCRIPTIONS) or any(folder.glob("*.gguf"))


def check_base(base: str | os.PathLike, gguf_file: str | None = None) -> None:
    """Raise `ValueError` for what is written as a path and is not a directory, or has no model to load in it."""
    name, folder = os.fspath(base), Path(base)
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"base_gguf_file={gguf_file!r} needs the package gguf, which is not installed: pip install 'l2d[gguf]'."
        )
    if folder.is_file() and folder.suffix == ".gguf":
        raise ValueError(
            f"base={name!r} is a file: give its folder as base, and base_gguf_file (in Python gguf_file) "
            f"{folder.name!r}."
        )
    if looks_local(base) and not folder.is_dir():
        raise ValueError(f"base={name!r} is not a directory: give the folder or the hub name of the base model.")
    if not folder.is_dir():
        return
    held = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "no GGUF file"
    if gguf_file is not None and not (folder / gguf_file).is_file():
        raise ValueError(
            f"base_gguf_file={gguf_file!r} is not in base={name!r}, which holds {held}: correct one of them."
        )
    if gguf_file is None and ".gguf" in held and not any((folder / one).is_file() for one in _DESCRIPTIONS):
        raise ValueError(
            f"base={name!r} holds no config.json but {held}: set base_gguf_file (in Python gguf_file) to the "
            "file's name."
        )


def read_mapping(folder: str | os.PathLike, file: str) -> dict[str, Any] | None:
    """Content of a folder's JSON file, `None` if it has none. Raises `ValueError`."""
    path = Path(folder) / file
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): the file is damaged, restore it or save again.") from error
    return content
