"""Reads a recipe: one YAML file, with options of the command line on top.

- `read_recipe`: command line -> checked `Recipe`
- `Recipe`: the groups of settings and the names of those that were set

A recipe may begin with `extends: FILE` (or a list of files), relative to itself, and then says only what differs.

`null`, in YAML or as `--option null`, resets an option, unless null is a value of its own.

Unknown names, wrong types, `--config=FILE` and files that are not there are one-sentence `ValueError`s, raised before
anything heavy is imported where that is possible.
"""

import difflib
import os
import re
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from training.config import CommandArguments, L2DTrainingConfig, ModelArguments
    from training.data.options import DataArguments

_FILES = {"base_config", "chat_template_path"}  # options whose files may be named relative to the recipe
_RENAMED = {"max_queries": "max_evaluations_per_pass", "use_bnb_nested_quant": "bnb_4bit_use_double_quant"}
REQUIRED = {"base": "hub name or folder", "dataset": "hub name, file or folder", "output_dir": "folder to write to"}
USAGE = "python -m training.train --config FILE.yaml [--option value ...]"


@dataclass
class Recipe:
    """A checked recipe: `settings` holds what was set, the other attributes hold it with all defaults filled in."""

    model: "ModelArguments"
    data: "DataArguments"
    training: "L2DTrainingConfig"
    command: "CommandArguments"
    settings: dict[str, Any]


def read_recipe(arguments: list[str]) -> Recipe:
    """Read and check `--config FILE.yaml` and further `--option value` pairs.

    Raises `ValueError`, one sentence each, for whatever cannot be followed.
    """
    settings, rest = _split_config(arguments)
    settings |= dict.fromkeys(_take_nulls(rest))
    if not {"-h", "--help"} & set(rest):
        held = (name for name, value in settings.items() if value not in (None, ""))
        set_options = {*held, *(_name_of(word) for word in rest if word.startswith("--"))}
        _check_required(set_options)

    from trl import TrlParser

    from training.checks import check_recipe
    from training.config import OPTIONS, option_types, unset_by_null

    class Parser(TrlParser):
        def error(self, message: str) -> typing.NoReturn:
            raise ValueError(f"{message} (usage: {USAGE})")

    hints = option_types()
    for name in settings:
        _check_known(name, hints)
    unset = unset_by_null()
    settings = {name: value for name, value in settings.items() if value is not None or name not in unset}
    for name, value in settings.items():
        settings[name] = _fitted(name, value, hints[name])
    parser = Parser(OPTIONS, allow_abbrev=False, prog="training.train")
    parser.set_defaults_with_config(**settings)
    if not rest or not {"-h", "--help"} & set(rest):
        for flag in (word for word in rest if word.startswith("--")):
            _check_known(re.sub("^no_", "", _name_of(flag)), hints)
    model, data, training, command, stray = parser.parse_args_and_config(rest, return_remaining_strings=True)
    if stray:
        raise ValueError(f"{stray[0]!r} belongs to no option: leave it out (usage: {USAGE})")
    set_options = set(settings)
    for word in rest:
        if word.startswith("--"):
            name = _name_of(word)
            name = name if name in hints else name.removeprefix("no_")
            set_options.add(name)
            value = next(getattr(part, name) for part in (model, data, training, command) if hasattr(part, name))
            settings[name] = value.value if isinstance(value, Enum) else value
    settings.pop("hub_token", None)  # what was set is saved beside the model
    check_recipe(model, data, training, command, set_options)
    return Recipe(model, data, training, command, settings)


def _split_config(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The contents of the recipe file, and the words that remain on the command line."""
    rest = list(arguments)
    for word in rest:
        if word.startswith("--config="):
            raise ValueError(f"{word} must be written with a space: --config {word.removeprefix('--config=')}")
    if "--config" not in rest:
        return {}, rest
    position = rest.index("--config")
    if rest.count("--config") > 1 or position + 1 == len(rest):
        raise ValueError(f"--config takes one recipe file, once (usage: {USAGE})")
    path = rest[position + 1]
    del rest[position : position + 2]
    return _load(path, "--config", ()), rest


def _take_nulls(words: list[str]) -> list[str]:
    """Remove every `--option null` (or `--option=null`) from `words`, and return the names of these options."""
    taken = []
    for position in reversed(range(len(words))):
        alone = position + 2 >= len(words) or words[position + 2].startswith("--")
        if words[position].startswith("--") and words[position].endswith("=null"):
            taken.append(_name_of(words.pop(position)))
        elif words[position].startswith("--") and words[position + 1 : position + 2] == ["null"] and alone:
            taken.append(_name_of(words[position]))
            del words[position : position + 2]
    for word in words:
        if word.startswith("--") and _name_of(word) in taken:
            raise ValueError(f"--{_name_of(word)} is set and reset: keep one.")
    return taken


def _name_of(flag: str) -> str:
    return flag[2:].split("=")[0].replace("-", "_")


def _load(path: str, asked_by: str, above: tuple[str, ...]) -> dict[str, Any]:
    """Settings of a recipe file on top of those that it extends; files that it names may lie beside it."""
    if not os.path.isfile(path):
        raise ValueError(f"{asked_by} {path} does not exist: give the path of a YAML recipe.")
    if os.path.realpath(path) in above:
        raise ValueError(f"{asked_by} {path} goes round in a circle: a recipe cannot extend itself.")
    with open(path, encoding="utf-8") as file:
        try:
            settings = yaml.load(file, Loader=_Loader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{asked_by} {path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{asked_by} {path} must hold a YAML mapping of option: value.")
    folder = os.path.dirname(os.path.abspath(path))
    for name in _FILES & settings.keys():
        beside = os.path.join(folder, str(settings[name]))
        settings[name] = beside if os.path.isfile(beside) else settings[name]
    parents = settings.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"extends={parents!r} in {path} must be the name of a recipe file, or a list of them.")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged |= _load(os.path.join(folder, parent), f"extends in {path}:", (*above, os.path.realpath(path)))
    return merged | settings


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number, `no` and `on` are words, and a key may occur only once."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":float"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:[Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def _check_required(set_options: set[str]) -> None:
    for name, what in REQUIRED.items():
        if name not in set_options:
            raise ValueError(f"{name} is not set: give a {what}, in the recipe or as --{name}.")


def _check_known(name: Any, hints: dict[str, Any]) -> None:
    if name not in hints:
        renamed = _RENAMED.get(str(name))
        near = [renamed] if renamed else difflib.get_close_matches(str(name), hints, 1)
        hint = f"did you mean {near[0]!r}?" if near else "see python -m training.train --help."
        raise ValueError(f"option {name!r} is not known: {hint}")


def _fitted(name: str, value: Any, hint: Any) -> Any:
    """`value`, as the option's type wants it; `ValueError` if it does not fit."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = {getattr(typing.get_origin(kind) or kind, "__name__", str(kind)) for kind in kinds}
    if value is None and "NoneType" in names:
        return None
    if "list" in names and not isinstance(value, list) and not ("str" in names and isinstance(value, str)):
        value = [value]
    if isinstance(value, list):
        (inner,) = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is list] or [()]
        inner = tuple(typing.get_origin(kind) or kind for kind in inner)
        if inner and not all(type(entry) in inner for entry in value):
            allowed = " or ".join(kind.__name__ for kind in inner)
            raise ValueError(f"{name}={value!r} in the recipe must be a list of type {allowed}.")
    if type(value).__name__ in names or ("float" in names and type(value) is int):
        return value
    if isinstance(value, str) and any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):
        return value
    words = sorted(names - {"NoneType"})
    if name == "resume_from_checkpoint" and isinstance(value, bool):
        return value
    raise ValueError(f"{name}={value!r} in the recipe must be of type {' or '.join(words)}.")
