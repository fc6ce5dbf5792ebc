"""Measured accuracies by budget, from wherever they were measured.

- `Measured`: one number, with the setting that it belongs to
- `read_results`: from lm-eval's results (files, folders or dictionaries), training metrics, or plain numbers
- `curves`: the same as curves, one for every task and setting
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from l2d.sampler_config import ADAPTIVE_SOLVERS, unusual

_TRAINING = re.compile(r"eval_accuracy_budget_(\d+)")
TRAINING_TASK = "held-out examples"
"""The task of accuracies that training measures: each response token after the true ones."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """`value` of `metric` on `task` at `budget` evaluations per token, with its standard error where there is one.

    setting: guidance, decoding and whatever else is not the default, in words; documents: how many were answered;
    fingerprint, base: fingerprints of the checkpoint and its base, where the results record them.
    """

    task: str
    metric: str
    budget: float
    value: float
    stderr: float | None = None
    setting: str = ""
    documents: int | None = None
    fingerprint: str | None = None
    base: str | None = None


def read_results(results: Any, metric: str | None = None) -> list[Measured]:
    """All that `results` hold, in their order.

    Args:
        results: lm-eval's results as `simple_evaluate` returns them, `results_*.json` or folders with these, a mapping
            from budgets to values, metrics of a training run, or a list of such.
        metric: which one of a task's metrics, such as `exact_match`; default: its first.

    Raises `ValueError` for what is none of these, or holds no result of an L2D model.
    """
    measured = list(_read(results, metric))
    if not measured:
        raise ValueError("results hold no accuracy of an L2D model: give what lm_eval --model l2d wrote or returned.")
    return measured


def curves(measured: list[Measured]) -> dict[str, list[Measured]]:
    """By name, points of rising budget; of several measurements of one setting the last counts."""
    found: dict[str, dict[float, Measured]] = {}
    for one in measured:
        name = ", ".join(filter(None, (one.task, one.metric, one.setting)))
        found.setdefault(name, {})[one.budget] = one
    return {name: [points[budget] for budget in sorted(points)] for name, points in found.items()}


def _read(results: Any, metric: str | None) -> Iterator[Measured]:
    if isinstance(results, (str, os.PathLike)):
        for file in _files(Path(results)):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"results file {str(file)!r} cannot be read ({error}).") from error
            yield from _read(content, metric)
    elif isinstance(results, Mapping):
        if "results" in results:
            yield from _of_lm_eval(results, metric)
        elif results and all(isinstance(key, (int, float)) for key in results):
            yield from (Measured("", metric or "accuracy", key, float(value)) for key, value in results.items())
        else:
            found = {int(match[1]): results[key] for key in results if (match := _TRAINING.fullmatch(str(key)))}
            yield from (Measured(TRAINING_TASK, "token accuracy", key, float(found[key])) for key in sorted(found))
    elif isinstance(results, (list, tuple)):
        for one in results:
            yield from [one] if isinstance(one, Measured) else _read(one, metric)
    else:
        raise ValueError(f"results={results!r} must be lm-eval's results, their files or folders, or a list of these.")


def _files(place: Path) -> list[Path]:
    if not place.exists():
        raise ValueError(f"results {str(place)!r} do not exist: give files or folders that lm_eval wrote.")
    return [place] if place.is_file() else sorted(place.rglob("results_*.json"))


def _of_lm_eval(content: Mapping[str, Any], metric: str | None) -> Iterator[Measured]:
    ours = (content.get("config") or {}).get("l2d")
    if not isinstance(ours, dict):
        return  # another model's
    for task, values in content["results"].items():
        names = [name for name, value in values.items() if "," in name and isinstance(value, (int, float))]
        names = [name for name in names if not name.partition(",")[0].endswith("_stderr")]
        chosen = next((name for name in names if metric in (None, name, name.partition(",")[0])), None)
        if chosen is None:
            continue
        kind, _, rest = chosen.partition(",")
        stderr = values.get(f"{kind}_stderr,{rest}")
        noted = (ours.get("task_samplers") or {}).get(task) or [{}]  # what its generation kwargs changed
        sampler = {**ours["sampler"], **(noted[0] if len(noted) == 1 else {})}
        counts = (content.get("n-samples") or {}).get(task) or {}
        yield Measured(
            task=task,
            metric=kind if rest == "none" else f"{kind} ({rest})",
            budget=_budget(sampler, ours),
            value=float(values[chosen]),
            stderr=stderr if isinstance(stderr, float) else None,
            setting=_setting(sampler, ours, (content.get("configs") or {}).get(task) or {}, len(noted)),
            documents=counts.get("effective"),
            fingerprint=ours.get("checkpoint_fingerprint"),
            base=ours.get("base_fingerprint"),
        )


def _budget(sampler: Mapping[str, Any], ours: Mapping[str, Any]) -> float:
    """Evaluations per token: as set, or with a solver that chooses them the mean of those requested."""
    if sampler.get("solver") in ADAPTIVE_SOLVERS and sampler["budget"] > 1:
        return round((ours.get("nfe_requested_per_token") or {}).get("mean", sampler["budget"]), 1)
    return sampler["budget"]


def _setting(sampler: Mapping[str, Any], ours: Mapping[str, Any], config: Mapping[str, Any], settings: int) -> str:
    words = unusual(sampler) if sampler["budget"] > 1 else []
    if sampler["budget"] > 1 and sampler.get("guidance_scale", 1.0) != 1.0:
        words.append(f"guidance {sampler['guidance_scale']:g} towards {sampler.get('guidance_class')}")
    decoding = config.get("generation_kwargs") or {}
    if decoding.get("do_sample") in (True, "true"):
        words.append(f"sampled at {decoding.get('temperature') or 1.0:g}")
    if settings > 1:
        words.append(f"{settings} samplers")
    if search := sampler.get("token_search", ours.get("token_search")):
        words.append(str(search))
    return ", ".join(words)
