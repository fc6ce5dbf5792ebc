"""Fixtures of the released implementation: one JSON and one safetensors file per case.

- `load_cases`: every case of a folder, or `MalformedFixture` with one sentence
- `Case`: metadata and tensors, and a record of which tensors a check has looked at

Nothing here knows a particular case: names, sizes and settings come from the JSON and from the tensor keys.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

REQUIRED_FIELDS: dict[str, type] = {"family": str, "base_config": dict, "flow_kwargs": dict}
OPTIONAL_FIELDS: dict[str, type] = {
    "solves": dict,
    "decode": dict,
    "train": dict,
    "checks": dict,
    "trainable": list,
    "zero_gradient_parameters": list,
}

INPUT_PATTERNS: tuple[str, ...] = (
    r"in\.(input_ids|valid_mask|attention_mask|position_ids|class_labels)",
    r"flow\.token_ids",
    r"x1\.logits",
    r"fwd\.(target_tokens|noise|t_.+)",
    r"temb\.t",
    r"vel\.(t|x)",
    r"ode\..+\.x0",
    r"decode\.noise",
    r"train\.(input_ids|labels|u|noise_unit|class_labels|drop_u)",
)
"""Tensors that are given to the model; everything else is an answer that some check must compare."""


class MalformedFixture(ValueError):
    """The folder or a case in it cannot be read; the message is one sentence."""


@dataclasses.dataclass
class Case:
    """One case.

    Attributes:
        name: file name without its ending.
        meta: the JSON.
        tensors: all tensors by key.
        looked_at: keys that some check has compared.
    """

    name: str
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    looked_at: set[str] = dataclasses.field(default_factory=set)

    def has(self, key: str) -> bool:
        """Whether the case holds tensor `key`."""
        return key in self.tensors

    def given(self, key: str) -> torch.Tensor:
        """An input tensor, for use by a check."""
        return self._tensor(key)

    def expected(self, key: str) -> torch.Tensor:
        """An answer of the released code; asking for it counts as looking at it."""
        tensor = self._tensor(key)
        self.looked_at.add(key)
        return tensor

    def keys(self, pattern: str) -> list[tuple[str, re.Match[str]]]:
        """All keys that match `pattern` in full, with their matches, sorted."""
        matches = ((key, re.fullmatch(pattern, key)) for key in sorted(self.tensors))
        return [(key, match) for key, match in matches if match]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The reference state dict, without the `state.` prefix."""
        return {key[6:]: value for key, value in self.tensors.items() if key.startswith("state.")}

    def not_looked_at(self) -> list[str]:
        """Answers that no check has compared."""
        inputs = re.compile("|".join(f"(?:{pattern})" for pattern in INPUT_PATTERNS))
        return sorted(key for key in self.tensors if key not in self.looked_at and not inputs.fullmatch(key))

    @property
    def flow(self) -> dict[str, Any]:
        """Keyword arguments of the released model."""
        return self.meta["flow_kwargs"]

    def _tensor(self, key: str) -> torch.Tensor:
        if key not in self.tensors:
            raise KeyError(f"the fixture has no tensor {key!r}")
        return self.tensors[key]


def load_cases(folder: Path, name: str | None = None) -> list[Case]:
    """All cases of `folder` (or the one called `name`), sorted by name.

    Raises `MalformedFixture` if there is no such folder or case, or if one cannot be read.
    """
    if not folder.is_dir():
        raise MalformedFixture(f"{folder} is not a folder: give one with fixtures (NAME.json and NAME.safetensors).")
    names = {path.stem for path in folder.glob("*.safetensors")}
    names |= {path.stem for path in folder.glob("*.json") if _looks_like_case(path)}
    if not names:
        raise MalformedFixture(f"{folder} holds no fixtures: a case is a pair NAME.json and NAME.safetensors.")
    if name is not None:
        if name not in names:
            raise MalformedFixture(f"case {name!r} is not in {folder}; it holds {', '.join(sorted(names))}.")
        names = {name}
    return [_load_case(folder, case) for case in sorted(names)]


def _looks_like_case(path: Path) -> bool:
    """False for other JSON files, for example reports written into the same folder."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        return True  # unreadable: reported as a malformed case
    return isinstance(meta, dict) and any(field in meta for field in REQUIRED_FIELDS)


def _load_case(folder: Path, name: str) -> Case:
    meta_path, tensor_path = folder / f"{name}.json", folder / f"{name}.safetensors"
    for path in (meta_path, tensor_path):
        if not path.is_file():
            raise MalformedFixture(f"case {name!r} has no {path.name}: each case is a .json and a .safetensors file.")
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MalformedFixture(f"{meta_path.name} is not JSON: {error}.") from error
    try:
        tensors = load_file(tensor_path)
    except (SafetensorError, OSError, ValueError) as error:
        raise MalformedFixture(f"{tensor_path.name} is not a safetensors file: {error}.") from error
    _check_fields(meta_path.name, meta)
    for key in ("in.input_ids",):
        if key not in tensors:
            raise MalformedFixture(f"{tensor_path.name} has no tensor {key!r}, without which nothing can be checked.")
    if not any(key.startswith("state.") for key in tensors):
        raise MalformedFixture(f"{tensor_path.name} has no 'state.*' tensors, without which nothing can be checked.")
    return Case(name, meta, tensors)


def _check_fields(file: str, meta: Any) -> None:
    if not isinstance(meta, dict):
        raise MalformedFixture(f"{file} must hold a JSON object.")
    for field, kind in {**REQUIRED_FIELDS, **OPTIONAL_FIELDS}.items():
        if field not in meta and field in REQUIRED_FIELDS:
            raise MalformedFixture(f"{file} has no field {field!r}.")
        if meta.get(field) is not None and not isinstance(meta[field], kind):
            raise MalformedFixture(f"{file}: field {field!r} must be a JSON {kind.__name__}.")
