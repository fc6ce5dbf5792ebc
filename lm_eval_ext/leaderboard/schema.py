"""What a results file must look like for the report to read it; others are left out with the reason.

- `check_results`: raises `ValueError` naming the first entry that is not what lm-eval writes
- `number`: a finite number, or `None`
- `renamed`: entries of older versions under today's names

The rest of the package relies on what is checked here and checks nothing again.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, StrictBool, StrictInt, ValidationError

_LARGEST = 1e30
_OLDER_NAMES = {"asked": "nfe_requested", "computed": "nfe_computed", "rounds": "passes"}


def number(value: Any) -> float | None:
    """`value` as a finite float of a size that can be reckoned with; also from text, as lm-eval writes times."""
    try:
        as_float = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return as_float if math.isfinite(as_float) and abs(as_float) < _LARGEST else None


def renamed(entries: dict[str, Any]) -> dict[str, Any]:
    """`entries` of `config.l2d` or of a compute file, with names of earlier versions replaced by those of today."""
    names = _OLDER_NAMES | {f"{old}_per_token": f"{new}_per_token" for old, new in _OLDER_NAMES.items()}
    return {names.get(name, name): value for name, value in entries.items()}


def _task_name(name: str) -> str:
    if "/" in name or "\0" in name or len(name) > 150:
        raise ValueError("a task's name must be usable as a file name")
    return name


Real = Annotated[float, Field(strict=True, gt=-_LARGEST, lt=_LARGEST)]
Amount = Annotated[float, Field(strict=True, ge=0, lt=_LARGEST)]
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
Budget = Annotated[int, Field(strict=True, ge=1, lt=1 << 62)]
TaskName = Annotated[str, AfterValidator(_task_name)]


class _Changes(BaseModel):
    """What of a sampler was changed."""

    budget: Budget = 1
    token_search: str | None = None
    solver: str | None = None
    guidance_class: str | StrictInt | None = None
    guidance_scale: Real | None = None
    seed: Amount | None = None
    final_time: Amount | None = None


class _Sampler(_Changes):
    budget: Budget


class _Statistics(BaseModel):
    mean: Amount
    median: Amount
    p95: Amount
    max: Amount


class _L2D(BaseModel):
    """What our model class records."""

    sampler: _Sampler
    task_samplers: dict[str, list[_Changes]] | None = None
    token_search: str | None = None
    revision: str | None = None
    commit: str | None = None
    base: str | None = None
    variant: str | None = None
    base_fingerprint: str | None = None
    checkpoint_fingerprint: str | None = None
    dtype: str | None = None
    command: str | None = None
    generated_tokens: Amount | None = None
    scored_tokens: Amount | None = None
    seconds: Amount | None = None
    world_size: Count | None = None
    trained_parameters: Count | None = None
    carried_state: StrictBool | None = None
    noise_free: StrictBool | None = None
    warm_start: StrictBool | None = None
    nfe_requested_per_token: _Statistics | None = None
    nfe_computed_per_token: _Statistics | None = None
    passes_per_token: _Statistics | None = None


class _Call(BaseModel):
    model_args: dict[str, Any] | str | None = None
    gen_kwargs: dict[str, Any] | str | None = None
    model_dtype: str | None = None
    limit: Amount | None = None
    l2d: _L2D | None = None


class _Metric(BaseModel):
    metric: str | None = None
    aggregation: str | None = None


class _Task(BaseModel):
    generation_kwargs: dict[str, Any] | None = None
    metric_list: list[_Metric] | None = None


class _Samples(BaseModel):
    effective: Count | None = None


class _Results(BaseModel):
    results: dict[TaskName, dict[str, Any]]
    config: _Call
    configs: dict[str, _Task] = {}
    samples: dict[str, _Samples] = Field({}, alias="n-samples")
    shots: dict[str, Any] = Field({}, alias="n-shot")
    higher_is_better: dict[str, dict[str, Any]] = {}
    versions: dict[str, Any] = {}
    task_hashes: dict[str, Any] = {}
    group_subtasks: dict[str, list[str]] = {}
    git_hash: str | None = None
    chat_template_sha: str | None = None
    system_instruction_sha: str | None = None
    lm_eval_version: str | None = None
    transformers_version: str | None = None


def check_results(raw: Any) -> None:
    """Check a parsed results file; missing objects that are optional are filled in as empty."""
    if not isinstance(raw, dict) or not all(isinstance(raw.get(key), dict) for key in ("results", "config")):
        raise ValueError("is not a results file of lm-eval: it has no 'results' and 'config'")
    if isinstance(raw["config"].get("l2d"), dict):
        raw["config"]["l2d"] = renamed(raw["config"]["l2d"])
    for field, about in _Results.model_fields.items():
        if about.default == {}:
            raw.setdefault(about.alias or field, {})
    try:
        _Results.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"is not laid out like lm-eval's results: {place}: {first['msg']}") from None
