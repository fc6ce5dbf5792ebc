"""What a run of `l2d_released` tasks needs, checked before a model is loaded.

- `released_benchmarks`: the benchmarks of a run's tasks
- `allows_code`: whether the environment confirms running programs
- `check_run`, `check_command_line`: options, data sets and the model's tokenizer; each mistake is one sentence
"""

import os
from collections.abc import Mapping
from typing import Any

from l2d.checkpoint.opening import Checkpoint
from lm_eval_ext.arguments import UsageError, one_line, parse_arguments
from lm_eval_ext.released.benchmarks import BENCHMARKS, SHOTS
from lm_eval_ext.released.options import PREFIX, benchmark_of, row_source, template_option
from lm_eval_ext.released.rows import load

_GROUPS = (PREFIX, f"{PREFIX}_greedy")
_MEMBERS = ("gsm8k", "math", "mmlu", "mmlu_pro", "humaneval", "mbpp")


def released_benchmarks(tasks: Any) -> list[str]:
    """Benchmarks of the released tasks and groups among `tasks`."""
    names: list[str] = []
    for task in tasks or ():
        task = task.get("task") if isinstance(task, dict) else getattr(task, "task_name", task)
        member = benchmark_of(str(task))
        names += _MEMBERS if task in _GROUPS else [member] if member else []
    return list(dict.fromkeys(names))


def check_command_line(given: Mapping[str, Any]) -> None:
    """`check_run` for the options of the harness's command line, before it reads its tasks."""
    tasks = given.get("tasks") or ()
    tasks = tasks.split(",") if isinstance(tasks, str) else [name for task in tasks for name in str(task).split(",")]
    benchmarks = released_benchmarks(tasks)
    if benchmarks:
        confirmed = given.get("confirm_run_unsafe_code") or allows_code()
        check_run(
            given.get("model"), given.get("model_args"), benchmarks, {**given, "confirm_run_unsafe_code": confirmed}
        )


def check_run(model: Any, model_args: Any, benchmarks: list[str], options: dict[str, Any]) -> None:
    """Raise `UsageError` for what released tasks would refuse, or what would break their protocol, later.

    Args:
        model, model_args: as the harness's `simple_evaluate` takes them.
        benchmarks: keys of `BENCHMARKS`.
        options: the other arguments of `simple_evaluate`.
    """
    if not options.get("apply_chat_template"):
        raise UsageError("--tasks l2d_released_... needs --apply_chat_template: the protocol has no other form.")
    code = [name for name in benchmarks if BENCHMARKS[name].code]
    if code and not (options.get("confirm_run_unsafe_code") or options.get("predict_only")):
        raise UsageError(
            f"l2d_released_{code[0]} runs programs that the model writes: confirm with --confirm_run_unsafe_code (or "
            "HF_ALLOW_CODE_EVAL=1) where they can do no harm, or leave the code tasks out."
        )
    if options.get("num_fewshot") not in (None, SHOTS):
        raise UsageError(f"--num_fewshot {options['num_fewshot']}: the released protocol has {SHOTS}; leave it out.")
    if options.get("system_instruction"):
        raise UsageError("--system_instruction: the released protocol has none of its own; leave it out.")
    if options.get("fewshot_as_multiturn") is False:
        raise UsageError(
            "--fewshot_as_multiturn false: the released shots are turns of the conversation; leave it out."
        )
    if options.get("cache_requests"):
        raise UsageError("--cache_requests does not know templates and lengths of l2d_released tasks; leave it out.")
    metadata = options.get("metadata") or getattr(options.get("task_manager"), "metadata", None) or {}
    template = template_option(metadata)
    for name in benchmarks:
        load(name, row_source(metadata))
    tokenizer = _tokenizer(model, model_args)
    if tokenizer is not None and template is None and getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            "the model's tokenizer has no chat template, which l2d_released tasks need: use a chat model, give "
            '--model_args tokenizer=NAME of one, or --metadata \'{"released_template": "base_llama"}\'.'
        )
    if tokenizer is not None and tokenizer.eos_token_id is None:
        raise UsageError(
            "the model's tokenizer has no end-of-sequence token, which is the only stop of l2d_released tasks: set "
            "eos_token in its tokenizer_config.json."
        )


def allows_code() -> bool:
    """Whether the environment confirms running a model's programs, as the metric `code_eval` asks."""
    return os.environ.get("HF_ALLOW_CODE_EVAL") == "1"


def _tokenizer(model: Any, model_args: Any) -> Any:
    """The tokenizer that `model` will use, or `None` where only its class can tell."""
    if not isinstance(model, str):
        return getattr(model, "tokenizer", None)
    if isinstance(model_args, str):
        from lm_eval.utils import simple_parse_args_string

        model_args = simple_parse_args_string(model_args)
    arguments = dict(model_args or {})
    if model == "l2d":
        return _checkpoint_tokenizer(arguments)
    if model not in ("hf", "hf-auto", "huggingface", "vllm") or "gguf_file" in arguments:
        return None
    name = arguments.get("tokenizer") or arguments.get("pretrained")
    if not isinstance(name, str):
        return name
    from transformers import AutoTokenizer

    options = {option: arguments[option] for option in ("revision", "trust_remote_code") if option in arguments}
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):  # the model's class says why
        return None


def _checkpoint_tokenizer(arguments: dict[str, Any]) -> Any:
    from l2d.checkpoint.loading import load_tokenizer

    settings = parse_arguments(arguments)
    source = settings.harness.get("tokenizer") or settings.checkpoint
    if source is None or not isinstance(source, (str, Checkpoint)):
        return source
    with one_line():
        return load_tokenizer(source)
