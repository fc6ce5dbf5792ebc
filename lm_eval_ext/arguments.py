"""What `lm_eval --model l2d --model_args ...` may hold, validated before anything heavy is loaded.

- `UsageError`: a user's mistake; uncaught, it ends the process with one line instead of a traceback
- `one_line`: makes it of what a library raises
- `parse_arguments`: model args -> `Settings` (checkpoint, base, sampler, what the harness itself takes)
- `read_checkpoint`: the `config.json` of an L2D checkpoint, as a dictionary
- `sampler_changes`: the sampler settings among a request's generation kwargs
- `token_search`: `best_of_N` or `beam_N`, checked

No torch is imported. `SAMPLER_ARGUMENTS` and `HARNESS_ARGUMENTS` are the tables of names.
"""

import contextlib
import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from l2d.checkpoint.hub import checkpoint_folder, looks_local
from l2d.checkpoint.preflight import read_config_file
from l2d.sampler_config import SamplerConfig

logger = logging.getLogger(__name__)

BUDGET = "diffusion_budget"
"""Name under which users set `SamplerConfig.budget`."""
AUTO = "auto"
"""Value of `guidance_class` that chooses the class by task (`lm_eval_ext.requests.guidance`)."""
SEARCH = "token_search"
"""Name under which users choose a search over tokens (`lm_eval_ext.requests.token_search`)."""


class UsageError(SystemExit, ValueError):
    """A `ValueError` about what the user asked for.

    The harness catches nothing, so that a plain `ValueError` would bury its sentence under a traceback through the
    harness's frames. As a `SystemExit` an uncaught one prints its sentence alone and exits with status 1; code that
    calls us catches it as the `ValueError` that it is.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code = f"l2d: {message}"


@contextlib.contextmanager
def one_line(prefix: str = "") -> Iterator[None]:
    """Turn an `OSError` or `ValueError` of a library into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        logger.debug("refused", exc_info=error)
        text = " ".join(str(error).split())
        raise UsageError(f"{prefix}: {text}" if prefix else text) from error


@dataclasses.dataclass(frozen=True)
class Settings:
    """Validated model args.

    Attributes:
        pretrained: folder or hub name of the checkpoint, or the model itself where code hands one over.
        revision: branch, tag or commit of a checkpoint on the hub, or `None`.
        base: name or folder of the base that replaces the one recorded in the checkpoint, or `None`.
        sampler: settings of every solve; a request's generation kwargs may change them. Its `guidance_class` may be
            `AUTO`.
        token_search: `"best_of_N"`, `"beam_N"` or `None`.
        harness: arguments of the harness's own model class, only those that were given.
    """

    pretrained: Any
    revision: str | None
    base: str | None
    sampler: SamplerConfig
    token_search: str | None
    harness: dict[str, Any]

    def folder(self) -> str:
        """Folder with all files of the checkpoint, which are fetched if it is on the hub. Raises `UsageError`."""
        with one_line():
            return checkpoint_folder(self.pretrained, self.revision)


def _whole(low: int) -> Callable[[Any], Any]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)) or float(value) != int(float(value)):
            raise ValueError
        if int(float(value)) < low:
            raise ValueError
        return int(float(value))

    check.__doc__ = f"a whole number of at least {low}"
    return check


def _truth(value: Any) -> bool:
    """true or false"""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    """a name or path"""
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _anything(value: Any) -> Any:
    """anything"""
    return value


def _dtype(value: Any) -> Any:
    """auto, float32, bfloat16, float16 or float64"""
    if isinstance(value, str) and value not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise ValueError
    if not isinstance(value, str) and type(value).__module__ != "torch":
        raise ValueError
    return value


def _device(value: Any) -> str:
    """cpu, cuda, mps, xpu, npu or hpu, optionally with an index as in cuda:0"""
    if not re.fullmatch(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?", str(value)):
        raise ValueError
    return str(value)


def _batch_size(value: Any) -> int | str:
    """a whole number of at least 1, 'auto' or 'auto:N'"""
    if isinstance(value, str) and re.fullmatch(r"auto(:\d+(\.\d+)?)?", value):
        return value
    return _whole(1)(value)


def _memory(value: Any) -> int | str:
    """a number of bytes or a size such as 10GiB"""
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]?i?B?", str(value), re.IGNORECASE):
        raise ValueError
    return value


def _mapping(value: Any) -> dict:
    """a JSON object"""
    if not isinstance(value, dict):
        raise ValueError
    return value


HARNESS_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "tokenizer": _anything,
    "dtype": _dtype,
    "device": _device,
    "batch_size": _batch_size,
    "max_batch_size": _whole(1),
    "max_length": _whole(2),
    "truncation": _truth,
    "add_bos_token": _truth,
    "prefix_token_id": _whole(0),
    "use_fast_tokenizer": _truth,
    "trust_remote_code": _truth,
    "attn_implementation": _text,
    "parallelize": _truth,
    "max_memory_per_gpu": _memory,
    "max_cpu_memory": _memory,
    "offload_folder": _text,
    "think_end_token": _anything,
    "enable_thinking": _truth,
    "chat_template_args": _mapping,
}
"""What the harness's own Hugging Face model class takes and this one passes on, with the check of each."""

SAMPLER_ARGUMENTS: dict[str, str] = {
    BUDGET if field.name == "budget" else field.name: field.name for field in dataclasses.fields(SamplerConfig)
}
"""Name for users -> field of `SamplerConfig`. Each may also come with a task's or a run's generation kwargs."""

ARGUMENTS = ("pretrained", "revision", "base", *SAMPLER_ARGUMENTS, SEARCH, *HARNESS_ARGUMENTS)
"""All model args."""


def parse_arguments(arguments: dict[str, Any]) -> Settings:
    """Validate model args as the harness hands them over (numbers may arrive as floats, words as strings).

    Of a checkpoint on the hub only its `config.json` is fetched. Raises `UsageError` for unknown names, ill-typed
    values, a checkpoint that is not there or none of ours, and sampler settings that are impossible in themselves or
    for this checkpoint.
    """
    for name in arguments:
        if name not in ARGUMENTS:
            raise UsageError(f"model argument {name!r} is not known: {_nearest(name, ARGUMENTS)}")
    given = {name: value for name, value in arguments.items() if value is not None}
    harness = {name: _checked(name, given[name]) for name in HARNESS_ARGUMENTS if name in given}
    changes = sampler_changes(arguments, keep_none=("guidance_class",))
    search = token_search(given.get(SEARCH))
    _sampler({}, changes, lambda sampler: sampler)  # what is impossible anywhere is said before the folder is looked at
    pretrained, base = given.get("pretrained"), given.get("base")
    revision = _revision(given.get("revision"))
    if pretrained is None:
        raise UsageError(
            "model argument 'pretrained' is missing: give --model_args pretrained=FOLDER of a checkpoint, or its name "
            "on the hub."
        )
    if isinstance(pretrained, (str, Path)):
        config = read_checkpoint(pretrained, revision)
    elif not hasattr(pretrained, "config"):
        raise UsageError(f"pretrained={_shown(pretrained)} must be the folder or hub name of an L2D checkpoint.")
    elif revision is not None:
        raise UsageError(f"revision={revision!r} means nothing for a model that is loaded already: leave it out.")
    else:
        config = pretrained.config.to_dict()
    if base is not None:
        _check_base(base)
    classes = config.get("guidance_classes")

    def fit(sampler: SamplerConfig) -> SamplerConfig:
        check_guidance(sampler, classes)
        return sampler.for_path(bool(config.get("carried_state")), bool(config.get("noise_free")))

    sampler = _sampler(config.get("sampler") or {}, changes, fit)
    pretrained = str(pretrained) if isinstance(pretrained, Path) else pretrained
    return Settings(pretrained, revision, None if base is None else str(base), sampler, search, harness)


def _revision(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))) or value == "":
        raise UsageError(f"revision={_shown(value)} must be a branch, a tag or a commit.")
    return None if value is None else str(value)  # the harness makes numbers of digits


def check_guidance(sampler: SamplerConfig, classes: list[str] | None) -> None:
    """Raise `ValueError` for guidance that a model with these `classes` cannot give; `AUTO` is any of them."""
    if sampler.guidance_class == AUTO and classes:
        sampler = sampler.replace(guidance_class=0)
    sampler.class_index(classes)


def token_search(value: Any) -> str | None:
    """`value` as `"best_of_N"`, `"beam_N"`, or `None` for none; `UsageError` for anything else."""
    if value is None or str(value).lower() == "none":
        return None
    if not re.fullmatch(r"(best_of|beam)_[1-9]\d*", str(value)):
        raise UsageError(f"{SEARCH}={_shown(value)} must be best_of_N or beam_N with N of at least 1, or none.")
    return str(value)


def sampler_changes(values: dict[str, Any], keep_none: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entries of `values` that set the sampler, under the names of `SamplerConfig`."""
    return {
        field: values[name]
        for name, field in SAMPLER_ARGUMENTS.items()
        if name in values and (values[name] is not None or name in keep_none)
    }


def read_checkpoint(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """`config.json` of the L2D checkpoint `name`, a folder or (at `revision`) on the hub.

    `UsageError` if there is none or it is another model's.
    """
    try:
        return read_config_file(name, revision)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_base(base: Any) -> None:
    if not isinstance(base, (str, Path)) or not str(base):
        raise UsageError(f"base={base!r} must be the name or folder of the base model.")
    if looks_local(base) and not Path(base).is_dir():
        raise UsageError(f"base={str(base)!r} is not a folder: give the folder or the hub name of the base model.")


def _checked(name: str, value: Any) -> Any:
    check = HARNESS_ARGUMENTS[name]
    try:
        return check(value)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name}={_shown(value)} must be {check.__doc__}.") from error


def _sampler(
    stored: dict[str, Any], changes: dict[str, Any], fit: Callable[[SamplerConfig], SamplerConfig]
) -> SamplerConfig:
    try:
        return fit(SamplerConfig().replace(**{**stored, **changes}))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    all_of_them = "python -m lm_eval_ext args lists all"
    return f"did you mean {near[0]!r}? ({all_of_them})" if near else f"{all_of_them}."


def _shown(value: Any) -> str:
    """`value` as the user wrote it: the harness turns -1 into -1.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
