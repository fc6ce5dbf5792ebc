"""What `lm_eval --model l2d --model_args ...` may hold, validated before anything heavy is loaded.

- `UsageError`: a user's mistake; uncaught, it ends the process with one line instead of a traceback
- `one_line`: makes it of what a library raises
- `parse_arguments`: model args -> `Settings` (checkpoint, sampler, what the harness itself takes)
- `sampler_changes`: the sampler settings among a request's generation kwargs
- `fitted`: a sampler as a checkpoint can follow it
- `token_search`: `best_of_N` or `beam_N`, checked

No torch is imported. `ARGUMENTS` declares all model args.
"""

import contextlib
import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from l2d.checkpoint.opening import Checkpoint, check_base, open_checkpoint
from l2d.checkpoint.quantization import QUANTIZATION, recorded_quantization
from l2d.checkpoint.settings import CheckpointSettings
from l2d.sampler_config import REMOVED, SamplerConfig
from l2d.settings import Kind, Setting, declared, matching, refused, truth, whole

logger = logging.getLogger(__name__)

BUDGET = "diffusion_budget"
"""Name under which users set `SamplerConfig.budget`."""
AUTO = "auto"
"""Value of `guidance_class` that chooses the class by task (`lm_eval_ext.requests.guidance`)."""
SEARCH = "token_search"
"""Name under which users choose a search over tokens (`lm_eval_ext.requests.token_search`)."""


class UsageError(SystemExit, ValueError):
    """A `ValueError` about a user's input.

    The harness catches nothing, so that a plain `ValueError` would bury its sentence under a traceback through the
    harness's frames. As a `SystemExit` an uncaught one prints its sentence alone and exits with status 1; code that
    calls us catches it as the `ValueError` that it is.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code = f"l2d: {message}"


@contextlib.contextmanager
def one_line(prefix: str = "", kinds: tuple[type[Exception], ...] = (OSError, ValueError)) -> Iterator[None]:
    """Turn an error of a library, of one of these `kinds`, into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        logger.debug("refused", exc_info=error)
        text = " ".join(str(error).split())
        raise UsageError(f"{prefix}: {text}" if prefix else text) from error


@dataclasses.dataclass(frozen=True)
class Settings:
    """Validated model args.

    Attributes:
        checkpoint: the open checkpoint, or `None` where code hands over a model.
        model: that model, or `None`.
        sampler: settings of every solve; a request's generation kwargs may change them. Its `guidance_class` may be
            `AUTO`.
        token_search: `"best_of_N"`, `"beam_N"` or `None`.
        harness: arguments of the harness's own model class, only those that the user sets.
    """

    checkpoint: Checkpoint | None
    model: Any
    sampler: SamplerConfig
    token_search: str | None
    harness: dict[str, Any]


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, bool) and re.fullmatch(pattern, str(value), re.IGNORECASE) is not None


_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_AUTO_BATCH = re.compile(r"auto(:\d+(\.\d+)?)?")
_anything = Kind("anything", lambda name, value: value)
_folder = matching("a folder or hub name", lambda value: isinstance(value, (str, Path)) and bool(str(value)))
_name = matching("a name or path", lambda value: isinstance(value, str) and bool(value))
_mapping = matching("a JSON object", lambda value: isinstance(value, dict))
_memory = matching("a number of bytes or a size such as 10GiB", _matches(r"\d+(\.\d+)?\s*[KMGT]?i?B?"))
_device = matching(
    "cpu, cuda, mps, xpu, npu or hpu, optionally with an index as in cuda:0",
    _matches(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?"),
)
_dtype = matching(
    f"{', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}",
    lambda value: value in _DTYPES if isinstance(value, str) else type(value).__module__ == "torch",
)
_version = matching(
    "a branch, a tag or a commit",
    lambda value: isinstance(value, (str, int, float)) and not isinstance(value, bool) and value != "",
)


def _check_batch_size(name: str, value: Any) -> int | str:
    allowed = "a whole number of at least 1, 'auto' or 'auto:N'"
    if isinstance(value, str) and _AUTO_BATCH.fullmatch(value):
        return value
    try:
        return whole(1).check(name, value)
    except ValueError:
        raise refused(name, value, allowed) from None


_batch_size = Kind("a whole number of at least 1, auto or auto:N", _check_batch_size)


def _harness(kind: Kind, default: str, meaning: str) -> Setting:
    return Setting(None, kind, meaning, default_words=default)


HARNESS_ARGUMENTS: dict[str, Setting] = {
    "tokenizer": _harness(_anything, "checkpoint's, else base's", "tokenizer, by name or folder"),
    "dtype": _harness(_dtype, "auto", "type of the base's weights"),
    "device": _harness(_device, "cuda, else cpu", "where to run"),
    "batch_size": _harness(_batch_size, "1", "requests at once; no result depends on it"),
    "max_batch_size": _harness(whole(1), "64", "largest batch size that auto tries"),
    "max_length": _harness(whole(2), "base's", "longest input in tokens, the answer included"),
    "truncation": _harness(truth, "false", "let the tokenizer cut long prompts"),
    "add_bos_token": _harness(truth, "tokenizer's", "put the first token before every prompt"),
    "prefix_token_id": _harness(whole(0), "tokenizer's", "token before texts that are scored whole"),
    "use_fast_tokenizer": _harness(truth, "true", "use the fast tokenizer"),
    "trust_remote_code": _harness(truth, "false", "run code that comes with the base"),
    "attn_implementation": _harness(_name, "base's", "attention kernel, for example sdpa or eager"),
    "parallelize": _harness(truth, "false", "spread the layers over all GPUs, which must hold the whole base"),
    "max_memory_per_gpu": _harness(_memory, "all", "limit per GPU with parallelize; nothing is offloaded"),
    "compile_path": _harness(truth, "false", "compile the path; equal to rounding, see docs/performance.md"),
    "think_end_token": _harness(_anything, "none", "text or number of the token that ends the thinking"),
    "enable_thinking": _harness(truth, "template's", "passed to the chat template"),
    "chat_template_args": _harness(_mapping, "none", "more arguments of the chat template"),
}
"""What the harness's own Hugging Face model class takes and this one passes on, and where and how it is computed."""

PLACEMENT = ("device", "batch_size", "max_batch_size", "parallelize", "max_memory_per_gpu", "compile_path")
"""Those that change no answer."""

_OFFLOADING = ("max_cpu_memory", "offload_folder")

SAMPLER_ARGUMENTS: dict[str, str] = {one.argument: name for name, one in declared(SamplerConfig).items()}
"""Name for users -> field of `SamplerConfig`. Each may also come with a task's or a run's generation kwargs."""

_AS_RECORDED: dict[str, Setting] = {
    "gguf_file": _harness(_name, "as recorded", "GGUF file that holds the base; none but the recorded one"),
    **{
        name: dataclasses.replace(
            one, default=None, default_words="as recorded", help=f"{one.help}; as it was trained on"
        )
        for name, one in QUANTIZATION.items()
    },
}

_ALL: dict[str, Setting] = {
    "pretrained": _harness(_anything, "none", "folder or hub name of the L2D checkpoint (required)"),
    "revision": _harness(_version, "none", "version of a checkpoint on the hub; a folder has none"),
    "base": _harness(_folder, "none", "base to load in place of the recorded one; its fingerprint must match"),
    **_AS_RECORDED,
    **{one.argument: one for one in declared(SamplerConfig).values()},
    SEARCH: _harness(Kind("best_of_N, beam_N or none", lambda name, value: token_search(value)), "none",
                     "search over generated texts, ranked by the model's own likelihood"),
    **HARNESS_ARGUMENTS,
}  # fmt: skip
ARGUMENTS = {name: dataclasses.replace(one, argument=name) for name, one in _ALL.items()}
"""All model args."""


def parse_arguments(arguments: dict[str, Any]) -> Settings:
    """Validate model args as the harness hands them over (numbers may arrive as floats, words as strings).

    `pretrained` may be an open checkpoint, too. Of one on the hub only its `config.json` is fetched. Raises
    `UsageError` for unknown names, ill-typed values, a checkpoint that does not exist or is not an L2D checkpoint, and
    sampler settings that are impossible in themselves or for this checkpoint.
    """
    for name in arguments:
        if name in REMOVED:
            raise UsageError(REMOVED[name])
        if name in _OFFLOADING:
            raise UsageError(f"{name} has no effect, since no part of a base can be offloaded: leave it out.")
        if name not in ARGUMENTS:
            raise UsageError(f"model argument {name!r} is not known: {_nearest(name, ARGUMENTS)}")
    values = {name: value for name, value in arguments.items() if value is not None}
    changes = sampler_changes(arguments, keep_none=("guidance_class",))
    with one_line():
        harness = {name: ARGUMENTS[name].check(values[name]) for name in HARNESS_ARGUMENTS if name in values}
        search = token_search(values.get(SEARCH))
        SamplerConfig().replace(**changes)  # what is impossible anywhere is said before the folder is looked at
        checkpoint = _checkpoint(values)
        model: Any = values["pretrained"] if checkpoint is None else None
        config = model.config if checkpoint is None else checkpoint.settings
        sampler = fitted(config.default_sampler(**changes), config)
        _check_recorded(values, checkpoint)
    return Settings(checkpoint, model, sampler, search, harness)


def _checkpoint(values: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that model args name, opened; `None` for a model. Raises `ValueError`."""
    pretrained = values.get("pretrained")
    if pretrained is None:
        raise UsageError(
            "model argument 'pretrained' is missing: give --model_args pretrained=FOLDER of a checkpoint, or its name "
            "on the hub."
        )
    others = {name: str(ARGUMENTS[name].check(values[name])) for name in ("revision", "base") if name in values}
    if isinstance(pretrained, (str, Path)):
        opened = open_checkpoint(pretrained, **others)
        if opened.base is not None:
            check_base(opened.base, opened.gguf_file)
        return opened
    if not isinstance(pretrained, Checkpoint) and not hasattr(pretrained, "config"):
        raise UsageError(f"pretrained={pretrained!r} must be the folder or hub name of an L2D checkpoint.")
    what = "a checkpoint that is open" if isinstance(pretrained, Checkpoint) else "a model that is loaded"
    for name, value in others.items():
        if value != getattr(pretrained, name, None):
            raise UsageError(f"{name}={value!r} does not apply to {what} already: leave it out.")
    return pretrained if isinstance(pretrained, Checkpoint) else None


def _check_recorded(values: dict[str, Any], checkpoint: Checkpoint | None) -> None:
    """Raise `ValueError` for arguments that would load the base otherwise than it was in training."""
    given = {name: ARGUMENTS[name].check(values[name]) for name in _AS_RECORDED if name in values}
    if not given:
        return
    if checkpoint is None:
        raise ValueError(f"{next(iter(given))} does not apply to a model that is loaded already: leave it out.")
    found = recorded_quantization(checkpoint.settings.base_config) or {}
    trained = {name: found.get(name, False) for name in QUANTIZATION} | {"quantization_config": found}
    trained["gguf_file"] = checkpoint.gguf_file
    for name, value in given.items():
        if value != trained[name]:
            raise ValueError(
                f"{name}={value!r} is not how the base of {checkpoint.name!r} was loaded in training "
                f"({trained[name]!r}), which its path belongs to: leave it out."
            )


def fitted(sampler: SamplerConfig, config: CheckpointSettings) -> SamplerConfig:
    """`sampler` as a model with this `config` can follow it, where `AUTO` is any of its classes.

    Raises `ValueError`.
    """
    known = sampler.guidance_class == AUTO and config.guidance_classes
    config.check_sampler(sampler.replace(guidance_class=0) if known else sampler)
    return sampler.for_path(config.carried_state, config.noise_free)


def token_search(value: Any) -> str | None:
    """`value` as `"best_of_N"`, `"beam_N"`, or `None` for none; `UsageError` for anything else."""
    if value is None or str(value).lower() == "none":
        return None
    if not re.fullmatch(r"(best_of|beam)_[1-9]\d*", str(value)):
        raise UsageError(f"{SEARCH}={value!r} must be best_of_N or beam_N with N of at least 1, or none.")
    return str(value)


def sampler_changes(values: dict[str, Any], keep_none: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entries of `values` that set the sampler, under the names of `SamplerConfig`."""
    return {
        field: values[name]
        for name, field in SAMPLER_ARGUMENTS.items()
        if name in values and (values[name] is not None or name in keep_none)
    }


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    all_of_them = "python -m lm_eval_ext args lists all"
    return f"did you mean {near[0]!r}? ({all_of_them})" if near else f"{all_of_them}."
