"""The command line of `lm_eval --model l2d`, checked as soon as it is read.

- `install`: wraps the harness's configuration, so that mistakes end in one line before its tasks are indexed
- `check_checkpoint`, `check_device`: parts of it that others use, too; `take_opened`: the checkpoint that it opened
- `refuse_checkpoint`: an L2D checkpoint for a model class that would not know what to do with it
- `check_command`: model args, files of the checkpoint, device and generation settings of a configuration

The harness would look at model args only after reading all of its tasks and importing torch, ten seconds later.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2d.checkpoint.hub import config_folder
from l2d.checkpoint.opening import Checkpoint, read_config_file
from lm_eval_ext.arguments import (
    SEARCH,
    Settings,
    UsageError,
    fitted,
    one_line,
    parse_arguments,
    sampler_changes,
    token_search,
)
from lm_eval_ext.generation_names import check_beams, check_settings

MODEL = "l2d"
PLAIN_MODELS = ("hf", "hf-auto", "huggingface")
"""Names of the harness's own Hugging Face class."""
_opened: list[Checkpoint] = []  # by the check of the command line, for the model class that follows


def install(configuration: Any) -> None:
    """Wrap `from_cli` and `process_tasks` of the harness's `EvaluatorConfig`, once.

    Other models are left alone, unless they are to load an L2D checkpoint.
    """
    build, process = configuration.from_cli.__func__, configuration.process_tasks
    if getattr(build, "checks_l2d", False):
        return

    @functools.wraps(build)
    def from_cli(cls, namespace):
        ours = getattr(namespace, "model", None) == MODEL
        if "l2d_released" in str(getattr(namespace, "tasks", "")) and not getattr(namespace, "config", None):
            from lm_eval_ext.released.preflight import check_command_line

            check_command_line(vars(namespace))
        config = _one_line(build, cls, namespace) if ours else build(cls, namespace)
        if config.model != MODEL:
            model_args = config.model_args or {}
            # names on a hub are checked by `simple_evaluate`, see `plugin`
            if os.path.isdir(str(model_args.get("pretrained"))):
                refuse_checkpoint(config.model, model_args)
            return config
        file = getattr(namespace, "config", None)
        if namespace.device is None and "device" not in (cls.load_yaml_config(file) if file else ()):
            config.device = None  # the harness's own default is a GPU, whether there is one or not
        check_command(config)
        return config

    @functools.wraps(process)
    def process_tasks(self, *args, **kwargs):
        if self.model != MODEL:
            return process(self, *args, **kwargs)
        return _one_line(process, self, *args, **kwargs)

    vars(from_cli)["checks_l2d"] = True
    configuration.from_cli, configuration.process_tasks = classmethod(from_cli), process_tasks


def check_command(config: Any) -> None:
    """Raise `UsageError` for what a run with the configuration `config` (an `EvaluatorConfig`) would refuse later."""
    model_args = dict(config.model_args or {})
    if "help" in model_args or model_args.get("pretrained") == "help":
        return  # the model class prints it
    options = {name: getattr(config, name) for name in ("device", "batch_size", "max_batch_size")}
    settings = parse_arguments({**{k: v for k, v in options.items() if v is not None}, **model_args})
    if not config.tasks:
        raise UsageError("tasks is not set: give --tasks NAME,NAME; lm_eval ls tasks lists all.")
    check_checkpoint(settings, config.gen_kwargs)
    _opened[:] = [settings.checkpoint] if settings.checkpoint is not None else []
    check_device(settings.harness)


def refuse_checkpoint(model: str, model_args: Any) -> None:
    """Raise `UsageError` if the harness's own class is to load an L2D checkpoint.

    It can, by transformers' Auto classes, and would score with the base and generate with the path.
    """
    if model not in PLAIN_MODELS:
        return
    if isinstance(model_args, str):
        from lm_eval.utils import simple_parse_args_string

        model_args = simple_parse_args_string(model_args)
    name, revision = (dict(model_args).get(argument) for argument in ("pretrained", "revision"))
    if not isinstance(name, str):
        return
    revision = None if revision is None or os.path.isdir(name) else str(revision)
    access: dict[str, Any] = {"local_files_only": True}  # from the hub only what the harness would fetch next
    try:
        config_folder(name, revision, **access)
    except ValueError:
        access = {}
    try:
        read_config_file(name, revision, **access)
    except ValueError:  # not an L2D checkpoint, as it should be
        return
    raise UsageError(
        f"pretrained={name!r} is an L2D checkpoint, which --model {model} would not evaluate at one budget: use "
        "--model l2d, whose diffusion_budget=1 is the base."
    )


def check_checkpoint(settings: Settings, gen_kwargs: dict[str, Any] | None = None) -> None:
    """Raise `UsageError` if files are missing, or if `gen_kwargs` or the search over tokens cannot be followed."""
    gen_kwargs, checkpoint = gen_kwargs or {}, settings.checkpoint
    check_settings(gen_kwargs)
    search = token_search(gen_kwargs.get(SEARCH, settings.token_search))
    if checkpoint is None:
        return
    with one_line():
        fitted(settings.sampler.replace(**sampler_changes(gen_kwargs)), checkpoint.settings)
        checkpoint.check_files()
        file = Path(checkpoint.folder, "generation_config.json")
        check_beams(search, json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})


def take_opened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Model args with the open checkpoint instead of its name, if `check_command` opened it for this run."""
    opened = _opened.pop() if _opened else None
    named = tuple(arguments.get(name) for name in ("pretrained", "revision", "base"))
    if opened is None or named != (opened.name, opened.revision, opened.base):
        return arguments
    return {**arguments, "pretrained": opened}


def check_device(harness: dict[str, Any]) -> None:
    """Raise `UsageError` for a GPU on a machine without one, or GPUs; torch is imported only for them."""
    device = harness.get("device", "cuda" if harness.get("parallelize") else None)
    if device == "cpu" and harness.get("parallelize"):
        raise UsageError("parallelize spreads a base over GPUs, and this run is on the CPU: leave it out.")
    if device is None or not device.startswith("cuda"):
        return
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"device={device!r} is not available: this machine has no CUDA device; use cpu.")


def _one_line(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` returns; what it refuses becomes a `UsageError`, as the harness would show a traceback."""
    try:
        return function(*args, **kwargs)
    except UsageError:
        raise
    except (OSError, TypeError, ValueError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{text}: correct the command line, see lm_eval run --help and lm_eval ls tasks.") from error
