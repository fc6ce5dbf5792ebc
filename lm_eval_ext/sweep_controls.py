"""The controls of a sweep: what a curve over the budget has to be compared with.

- `Point`: a model and how it is sampled, with a name
- `read_controls`: the key `controls` of a sweep's file -> points

`one_evaluation` evaluates the path once, at the times listed or at the best one of a file that
`training.compare_budgets` wrote; `noise_free` is the folder of a checkpoint trained with `noise_free`, `finetuned` one
or more folders of plain models. What the harness itself takes (dtype, device, ...) is that of the sweep.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from l2d.checkpoint.opening import open_checkpoint
from l2d.sampler_config import SamplerConfig
from l2d.settings import declared
from lm_eval_ext.arguments import HARNESS_ARGUMENTS, UsageError, one_line

KINDS = ("one_evaluation", "noise_free", "finetuned")
_ONCE = {"diffusion_budget": 2, "solver": "euler"}
_OPTIONS = ("device", "batch_size", "max_batch_size")  # the harness's own model class takes them as options only
_REPLACED = {one.argument for one in declared(SamplerConfig).values() if one.compute}


@dataclasses.dataclass(frozen=True)
class Point:
    """A name, model args, the harness's model class that takes them (l2d, or hf for plain models), and options of the
    command line beside those of the sweep."""

    name: str
    model_args: dict[str, Any]
    model: str = "l2d"
    run: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_controls(controls: dict[str, Any], shared: dict[str, Any]) -> list[Point]:
    """Points of the controls; `UsageError` for what could not run.

    Args:
        shared: model args of every setting of the sweep.
    """
    for name in controls:
        if name not in KINDS:
            raise UsageError(f"controls has the key {name!r}, which is not known: use {', '.join(KINDS)}.")
    harness = {name: value for name, value in shared.items() if name in HARNESS_ARGUMENTS}
    points = []
    if "one_evaluation" in controls:
        kept = {name: value for name, value in shared.items() if name not in _REPLACED}
        for time in _times(controls["one_evaluation"]):
            points.append(Point(f"one_evaluation,t={time:g}", {**kept, **_ONCE, "final_time": time}))
    for folder in _folders("noise_free", controls.get("noise_free", [])):
        with one_line():
            noise_free = open_checkpoint(folder).settings.noise_free
        if not noise_free:
            raise UsageError(
                f"controls: noise_free={folder!r} is a path with noise: give a checkpoint trained with noise_free."
            )
        base = {"base": shared["base"]} if "base" in shared else {}
        points.append(Point(f"noise_free,{Path(folder).name}", {**harness, **base, "pretrained": folder}))
    for folder in _folders("finetuned", controls.get("finetuned", [])):
        _check_plain(folder)
        args = {name: value for name, value in harness.items() if name not in _OPTIONS}
        options = {name: value for name, value in harness.items() if name in _OPTIONS}
        points.append(Point(f"finetuned,{Path(folder).name}", {**args, "pretrained": folder}, "hf", options))
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"controls: {name!r} is listed twice: give folders of different names, and times once.")
    return points


def _times(value: Any) -> list[float]:
    """Times of one evaluation: a list, or the best one in a file that `training.compare_budgets` wrote."""
    if isinstance(value, str):
        try:
            value = [json.loads(Path(value).read_text(encoding="utf-8"))["best_time"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"controls: one_evaluation={value!r} is not a file with a best_time: give one that "
                "python -m training.compare_budgets --json FILE wrote, or a list of times."
            ) from error
    value = value if isinstance(value, list) else [value]
    try:
        if not value:
            raise ValueError("the list is empty.")
        return [SamplerConfig(solver="euler", budget=2, final_time=time).final_time for time in value]
    except ValueError as error:
        raise UsageError(f"controls: one_evaluation={value!r} must be times above 0 and up to 1: {error}") from error


def _folders(name: str, value: Any) -> list[str]:
    folders = value if isinstance(value, list) else [value]
    if not all(isinstance(folder, str) and folder for folder in folders):
        raise UsageError(f"controls: {name}={value!r} must be the folder of a checkpoint, or a list of folders.")
    return [folder.rstrip("/") for folder in folders]


def _check_plain(folder: str) -> None:
    """Raise `UsageError` unless `folder` holds a plain model."""
    try:
        kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"controls: finetuned={folder!r} holds no model's config.json: give the folder of a plain model, "
            "such as method lora_sft or full_sft leaves."
        ) from error
    if kind == "l2d":
        raise UsageError(f"controls: finetuned={folder!r} is an L2D checkpoint: put it under pretrained or noise_free.")
