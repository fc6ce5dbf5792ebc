"""The paper's table: the released benchmarks of every setting, their mean, and the published figures.

- `paper_rows`: one row per model and setting that ran `l2d_released` tasks
- `lines`: the table's cells and notes; `records`: the same for machines

Means are plain means over the six benchmarks, once for each pass@k, since the paper does not say which k it reports.
Published figures are those of `published.yaml`; the settings that it names only roughly (adaptive solver, guidance
scale, token search) stand beside the closest of ours.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from l2d.statistics import Estimate, independent_average
from lm_eval_ext.leaderboard.files import Run
from lm_eval_ext.leaderboard.methods import Setting, describe, recipe_of

BENCHMARKS = ("gsm8k", "math", "mmlu", "mmlu_pro", "humaneval", "mbpp")
RATES = ("pass@1", "pass@10")
_NAMES = {"gsm8k": "GSM8K", "math": "MATH", "mmlu": "MMLU", "mmlu_pro": "MMLU-Pro", "humaneval": "HumanEval"}
_SETTINGS = (
    *("base", "lora-sft", "lora-sft-all-linear", "full-sft", "T=15", "T=127", "adaptive", "guided", "token search"),
    *("on lora-sft", "on full-sft"),
)
COLUMNS = tuple(
    f"{_NAMES.get(name, 'MBPP')}{f' {rate}' if rate else ''}"
    for name in BENCHMARKS
    for rate in (RATES if name in ("humaneval", "mbpp") else ("",))
)


@dataclasses.dataclass
class PaperRow:
    """One model and setting.

    Attributes:
        base: name of its base in `published.yaml`, else the base's own, or `None` where it is not known.
        setting: one of the paper's, or ours in words. label: method and sampler in words.
        scores: by column of `COLUMNS`, in percent. means: by pass@k, where all six benchmarks are there.
        published: what the paper reports of this setting: `mean`, `mmlu`, ...
        left_out, raised: problems in no denominator; answers of MATH on which the release aborts.
        seconds: of all calls, loading included. notes: what keeps it from being the released protocol.
    """

    base: str | None
    setting: str
    label: str
    scores: dict[str, Estimate]
    means: dict[str, Estimate]
    published: dict[str, float]
    left_out: int
    raised: int
    seconds: float | None
    notes: list[str]


@functools.cache
def published() -> dict[str, Any]:
    """The published figures."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def paper_rows(runs: Iterable[Run]) -> list[PaperRow]:
    """Rows of all runs with released tasks; runs of one model and setting make one row."""
    together: dict[tuple, list[tuple[Run, Setting]]] = {}
    for run in runs:
        if any(f"l2d_released_{name}" in run.measures for name in BENCHMARKS):
            setting = describe(run)
            key = (setting.model, setting.label, setting.seed, *_notes(run))
            together.setdefault(key, []).append((run, setting))
    rows = [_row([run for run, _ in members], members[0][1]) for members in together.values()]
    order = {name: place for place, name in enumerate(_SETTINGS)}
    return sorted(rows, key=lambda row: (row.base or "~", order.get(row.setting, len(order)), _numbered(row.label)))


def _numbered(label: str) -> str:
    """For sorting: T = 3 before T = 11."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(4), label)


def _row(runs: list[Run], setting: Setting) -> PaperRow:
    measures = {
        (name, measure.metric): measure
        for run in runs
        for name in BENCHMARKS
        for measure in run.measures.get(f"l2d_released_{name}", ())
    }
    scores = {}
    for column in COLUMNS:
        title, _, rate = column.partition(" ")
        name = {**{shown: name for name, shown in _NAMES.items()}, "MBPP": "mbpp"}[title]
        if measure := measures.get((name, rate or "accuracy")):
            error = 100 * measure.stderr if measure.stderr else None
            scores[column] = Estimate(100 * measure.value, error, _documents(runs, name))
    means = {}
    for rate in RATES:
        parts = [scores.get(column) for column in COLUMNS if " " not in column or column.endswith(f" {rate}")]
        if None not in parts:
            means[rate] = independent_average([part for part in parts if part is not None])
    base, key = _published_base(setting), _key(setting)
    figures = {} if base is None else published()["bases"][base]
    count = {metric: sum(int(m.value) for (_, name), m in measures.items() if name == metric) for metric in
             ("left_out", "raised")}  # fmt: skip
    times = [time for run in runs if (time := run.raw.get("total_evaluation_time_seconds"))]
    return PaperRow(
        base=base or (Path(setting.base or setting.model).name or None),
        setting=key or setting.label,
        label=f"{setting.label} ({setting.name})",
        scores=scores,
        means=means,
        published={what: values[key] for what, values in figures.items() if what != "names" and key in values},
        left_out=count["left_out"],
        raised=count["raised"],
        seconds=sum(map(float, times)) if times else None,
        notes=_notes(runs[0]),
    )


def _documents(runs: list[Run], name: str) -> int:
    counts = [run.raw["n-samples"].get(f"l2d_released_{name}", {}).get("effective") for run in runs]
    return next((count for count in counts if count), 0)


def _notes(run: Run) -> list[str]:
    """What the call changed of the protocol."""
    tasks = [run.raw["configs"].get(f"l2d_released_{name}") or {} for name in BENCHMARKS]
    substituted = any((task.get("metadata") or {}).get("released_rows") == "substitute" for task in tasks)
    notes = [f"limit {run.config['limit']:g}"] if run.config.get("limit") else []
    notes += ["substitutes for missing rows"] if substituted else []
    overrides = run.config.get("gen_kwargs")
    return notes + ([f"gen_kwargs {overrides}"] if overrides else [])


def _published_base(setting: Setting) -> str | None:
    """Key of `published.yaml` for the base, through the recipe of a base that was finetuned itself."""
    name = str(setting.base or setting.model)
    name = str(recipe_of(name).get("base") or name)
    last = Path(name).name.lower()
    for base, entry in published()["bases"].items():
        if last in [known.lower() for known in entry["names"]]:
            return base
    return None


def _key(setting: Setting) -> str | None:
    """The setting as the paper's table knows it, `None` for others."""
    if setting.kind in ("base", "l2d-base") or (setting.kind == "other" and _published_base(setting)):
        return "base"
    if setting.kind in ("lora-ft", "full-ft"):
        modules = recipe_of(setting.model).get("lora_target_modules")
        all_linear = setting.kind == "lora-ft" and sorted(modules or []) != ["q_proj", "v_proj"]
        return "full-sft" if setting.kind == "full-ft" else "lora-sft-all-linear" if all_linear else "lora-sft"
    if setting.kind != "l2d-lora":
        return None
    method = recipe_of(setting.base or "").get("method")
    details = [part for part in setting.details.split(", ") if part and not part.startswith("seed ")]
    search = [part for part in details if part.startswith(("best_of", "beam"))]
    chosen = [
        *(["adaptive"] if setting.budget is None else []),
        *(["guided"] if setting.guidance else []),
        *(["token search"] if search else []),
        *([f"on {method.replace('_', '-')}"] if method in ("lora_sft", "full_sft") else []),
    ]
    usual = setting.budget in (15, None) or (setting.budget == 127 and not chosen)
    if len(chosen) > 1 or details != search or not usual:
        return None
    return chosen[0] if chosen else f"T={setting.budget}"


# ---- the table -------------------------------------------------------------------------------------------------------


def header() -> list[str]:
    """Names of the columns."""
    return ["base", "setting", *COLUMNS, *(f"mean, {rate}" for rate in RATES), "published mean", "left out", "time"]


def cells(row: PaperRow) -> list[str]:
    """The columns of a row in words; published figures of single benchmarks in brackets."""
    figures = {_NAMES.get(name, name): value for name, value in row.published.items()}
    texts = [row.base or "?", row.setting if row.setting in row.label else f"{row.setting}: {row.label}"]
    for column in COLUMNS:
        text = _shown(row.scores.get(column))
        texts.append(f"{text} [{figures[column]:.2f}]" if column in figures else text)
    texts += [_shown(row.means.get(rate)) for rate in RATES]
    texts.append(f"{figures['mean']:.2f}" if "mean" in figures else "")
    texts.append(f"{row.left_out}" + (f", {row.raised} raised" if row.raised else ""))
    return [*texts, "" if row.seconds is None else _duration(row.seconds)]


def notes(rows: list[PaperRow]) -> list[str]:
    """What a reader has to know."""
    changed = [
        f"{row.setting} ({row.base}): {'; '.join(row.notes)}, not the released protocol." for row in rows if row.notes
    ]
    return [
        "In percent, ± standard error; means are plain means over the six benchmarks. The paper does not say which "
        "pass@k it reports, nor its adaptive solver, guidance scale and token search exactly.",
        f"Published figures, in brackets for single benchmarks: {published()['source']}.",
        *dict.fromkeys(changed),
    ]


def records(rows: list[PaperRow]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [dataclasses.asdict(row) for row in rows]


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.2f}" + (f" ± {estimate.stderr:.2f}" if estimate.stderr is not None else "")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if seconds >= 60 else f"{seconds:.0f} s"
