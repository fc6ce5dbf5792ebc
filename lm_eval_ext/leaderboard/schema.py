"""What a results file must look like for the report to read it; others are left out with the reason.

- `check_results`: raises `ValueError` naming the first entry that is not what lm-eval writes
- `number`: a finite number, or `None`

The rest of the package relies on what is checked here and checks nothing again.
"""

import math
from typing import Any

_LARGEST = 1e30
_OBJECTS = ("configs", "versions", "n-shot", "n-samples", "higher_is_better", "task_hashes", "group_subtasks")
_TEXTS = ("git_hash", "chat_template_sha", "system_instruction_sha", "lm_eval_version", "transformers_version")
_L2D_TEXTS = ("revision", "commit", "base", "variant", "base_fingerprint", "checkpoint_fingerprint", "dtype", "command")
_L2D_NUMBERS = ("generated_tokens", "scored_tokens", "seconds", "world_size", "trained_parameters")
_SAMPLER_NUMBERS = ("budget", "seed", "final_time", "start_time", "guidance_scale", "mc_samples", "votes")
_L2D_TRUTHS = ("carried_state", "noise_free")
_STATISTICS = ("mean", "median", "p95", "max")


def number(value: Any) -> float | None:
    """`value` as a finite float of a size that can be reckoned with; also from text, as lm-eval writes times."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and abs(found) < _LARGEST else None


def check_results(raw: Any) -> None:
    """Check a parsed results file; missing objects that are optional are filled in as empty."""
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), dict) for key in ("results", "config")):
        raise ValueError("is not a results file of lm-eval: it has no 'results' and 'config'")
    for key in _OBJECTS:
        _kind(raw.setdefault(key, {}), dict, key)
    for key in ("results", "configs", "higher_is_better", "n-samples"):
        for name, value in raw[key].items():
            _kind(value, dict, f"{key}.{name}")
    for name, value in raw["n-samples"].items():
        _whole(value.get("effective"), f"n-samples.{name}.effective")
    for name, tasks in raw["group_subtasks"].items():
        _kind(tasks, list, f"group_subtasks.{name}")
        for task in tasks:
            _kind(task, str, f"group_subtasks.{name}")
            if task == name:
                raise ValueError(f"is not laid out like lm-eval's results: group_subtasks.{name} holds itself")
    for name in raw["results"]:
        if "/" in name or "\0" in name or len(name) > 150:
            raise ValueError("is not laid out like lm-eval's results: a task's name is no file name")
    for name, config in raw["configs"].items():
        _check_task(config, f"configs.{name}")
    for name in _TEXTS:
        _kind(raw.get(name), (str, type(None)), name)
    _check_call(raw["config"])


def _check_task(config: dict[str, Any], place: str) -> None:
    _kind(config.get("generation_kwargs"), (dict, type(None)), f"{place}.generation_kwargs")
    metrics = config.get("metric_list")
    _kind(metrics, (list, type(None)), f"{place}.metric_list")
    for entry in metrics or []:
        _kind(entry, dict, f"{place}.metric_list")
        _kind(entry.get("metric"), (str, type(None)), f"{place}.metric_list.metric")
        aggregation = entry.get("aggregation")
        _kind(aggregation, (str, type(None)), f"{place}.metric_list.aggregation")


def _check_call(config: dict[str, Any]) -> None:
    _kind(config.get("model_args"), (dict, str, type(None)), "config.model_args")
    _kind(config.get("gen_kwargs"), (dict, str, type(None)), "config.gen_kwargs")
    _kind(config.get("model_dtype"), (str, type(None)), "config.model_dtype")
    if config.get("limit") is not None and number(config["limit"]) is None:
        raise ValueError("is not laid out like lm-eval's results: config.limit is not a number")
    ours = config.get("l2d")
    if ours is None:
        return
    _kind(ours, dict, "config.l2d")
    for name in _L2D_TEXTS:
        _kind(ours.get(name), (str, type(None)), f"config.l2d.{name}")
    for name in _L2D_NUMBERS:
        _number(ours.get(name), f"config.l2d.{name}")
    for name in _L2D_TRUTHS:
        _kind(ours.get(name), (bool, type(None)), f"config.l2d.{name}")
    sampler = ours.get("sampler")
    _kind(sampler, dict, "config.l2d.sampler")
    _check_sampler({"budget": None, **sampler}, "config.l2d.sampler")
    _kind(ours.get("token_search"), (str, type(None)), "config.l2d.token_search")
    recorded = ours.get("task_samplers")
    _kind(recorded, (dict, type(None)), "config.l2d.task_samplers")
    for task, entries in (recorded or {}).items():
        place = f"config.l2d.task_samplers.{task}"
        _kind(entries, list, place)
        for entry in entries:
            _kind(entry, dict, place)
            _kind(entry.get("token_search"), (str, type(None)), f"{place}.token_search")
            _check_sampler(entry, place)
    for name in ("nfe_requested", "nfe_computed", "passes"):
        statistics = ours.get(f"{name}_per_token")
        _kind(statistics, (dict, type(None)), f"config.l2d.{name}_per_token")
        for key in _STATISTICS if statistics else ():
            place = f"config.l2d.{name}_per_token.{key}"
            _kind(statistics.get(key), (int, float), place)
            _number(statistics[key], place)


def _check_sampler(sampler: dict[str, Any], place: str) -> None:
    """A whole sampler, or what of it was changed."""
    if "budget" in sampler:
        _whole(sampler["budget"], f"{place}.budget")
        if (sampler["budget"] or 0) < 1:
            raise ValueError(f"is not laid out like lm-eval's results: {place}.budget is not at least 1")
    for name in _SAMPLER_NUMBERS:
        _number(sampler.get(name), f"{place}.{name}")
    _kind(sampler.get("solver"), (str, type(None)), f"{place}.solver")
    _kind(sampler.get("guidance_class"), (str, int, type(None)), f"{place}.guidance_class")


def _kind(value: Any, kinds: Any, place: str) -> None:
    if not isinstance(value, kinds):
        raise ValueError(f"is not laid out like lm-eval's results: {place} is {type(value).__name__}")


def _number(value: Any, place: str) -> None:
    found = number(value)
    if value is not None and (isinstance(value, (bool, str)) or found is None or found < 0):
        raise ValueError(f"is not laid out like lm-eval's results: {place} is not a number of at least 0")


def _whole(value: Any, place: str) -> None:
    _number(value, place)
    if value is not None and value != int(value):
        raise ValueError(f"is not laid out like lm-eval's results: {place} is not a whole number")
