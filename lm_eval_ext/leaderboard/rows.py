"""Rows and cells: which runs belong to one setting, and which score each of its tasks has.

- `Row`: a model and setting; `Cell`: one of its scores; `Comparison`: a score against another row's
- `build_rows`: from runs to rows, with what cannot be used named
- `same_model`: whether two names mean one model; `by_document`: samples that can be paired
"""

import dataclasses
import json
import os
from collections import Counter
from functools import cached_property
from typing import Any

from l2d.statistics import Estimate, Paired, mean
from lm_eval_ext.arguments import PLACEMENT
from lm_eval_ext.leaderboard.files import TOLERANCE, Measure, Run, Sample, Skipped, read_costs, read_samples
from lm_eval_ext.leaderboard.methods import EXACT_SETTINGS, KINDS, Setting, by_sampler, decoding_of, describe
from lm_eval_ext.leaderboard.protocol import differences, protocol_of

PERFORMANCE = ("batch_size", "batch_sizes", "device", "model_num_parameters", "use_cache", "l2d", "model_args")
Described = list[tuple[Run, Setting]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A score minus the score of `row` on the same documents.

    reasons: why both cannot be compared, or not by documents; paired: the test, where they can. Its wins are the
    documents that got better, which for some measures is a lower score.
    """

    row: "Row"
    reasons: list[str]
    paired: Paired | None


@dataclasses.dataclass
class Cell:
    """A score: `measure` of `task`, with the protocol that it was measured under and how it was decoded.

    others: the remaining numbers of that task; costs: by a document's hash, where the run recorded them.
    reasons: why it is not comparable with the rest of the column.
    comparisons: by "base" or the kind of control, what it was compared with; base_reasons: why not with its base.
    """

    task: str
    measure: Measure
    others: list[Measure]
    run: Run
    protocol: dict[str, Any]
    decoding: str
    samples: list[Sample]
    costs: dict[str, dict[str, float]]
    reasons: list[str] = dataclasses.field(default_factory=list)
    comparisons: dict[str, Comparison] = dataclasses.field(default_factory=dict)
    base_reasons: list[str] = dataclasses.field(default_factory=list)

    @property
    def comparable(self) -> bool:
        """Whether it may be averaged with the other tasks of its row."""
        return not self.reasons

    @property
    def paired(self) -> Paired | None:
        """The test against the base, where there is one."""
        return self.comparisons["base"].paired if "base" in self.comparisons else None

    @cached_property
    def documents(self) -> tuple[list[float], list[str]] | None:
        """Scores and clusters of its documents, where their mean is the score; a perplexity, say, is none."""
        scores = [sample.scores.get(self.measure.metric) for sample in self.samples]
        known = [score for score in scores if score is not None]
        if not known or len(known) < len(scores) or abs(sum(known) / len(known) - self.measure.value) > TOLERANCE:
            return None
        return known, [sample.cluster for sample in self.samples]

    @cached_property
    def score(self) -> Estimate:
        """The score with its error: over clusters of documents where they are known, else as the harness gives it."""
        value, stderr = self.measure.value, self.measure.stderr
        if self.documents is not None:
            values, clusters = self.documents
            return mean(values, clusters, (0.0, 1.0) if min(values) >= 0 and max(values) <= 1 else None)
        return Estimate(value, stderr or None, self.protocol["n"] or 0, (0.0, 1.0) if stderr == 0 else None)


@dataclasses.dataclass
class Row:
    """A model and setting with its scores by task; averages: by group of tasks, the mean and the mean difference."""

    number: int
    setting: Setting
    runs: list[Run]
    cells: dict[str, Cell]
    base: "Row | None" = None
    averages: dict[str, tuple[Estimate, Estimate | None]] = dataclasses.field(default_factory=dict)


def build_rows(
    runs: list[Run], skipped: list[Skipped], metrics: dict[str, str], cluster_fields: tuple[str, ...]
) -> list[Row]:
    """One row per setting and protocol, in the order of the table. Arguments as for `board.build_board`."""
    described = _resolve_bases([(part, describe(part)) for run in runs for part in by_sampler(run)])
    by_setting: dict[str, Described] = {}
    for run, setting in described:
        by_setting.setdefault(_row_key(run, setting), []).append((run, setting))
    rows = []
    for members in [part for same in by_setting.values() for part in _by_protocol(same, metrics)]:
        cells = {}
        for task, run in _choose_runs([run for run, _ in members], skipped).items():
            first = _first(run.measures[task], metrics.get(task))
            samples = read_samples(run, task, first, skipped, cluster_fields)
            if samples is None:
                continue
            others = [measure for measure in run.measures[task] if measure is not first]
            about = (protocol_of(run, task, first), decoding_of(run, [task]))
            cells[task] = Cell(task, first, others, run, *about, samples, read_costs(run, task, skipped))
        if cells:
            used = [run for run, _ in members if any(cell.run is run for cell in cells.values())]
            rows.append(Row(0, _total_cost(members), used, cells))
    rows.sort(key=_order)
    for position, row in enumerate(rows, 1):
        row.number = position
    return rows


def same_model(first: str, second: str) -> bool:
    """Whether two names mean one model: equal, the same folder, or one is the end of the other's path."""
    first, second = (name.rstrip("/") for name in (first, second))
    if first == second or os.path.isdir(first) and os.path.isdir(second) and os.path.samefile(first, second):
        return True
    long, short = sorted((first, second), key=len, reverse=True)
    return "/" in short and long.endswith("/" + short.removeprefix("./"))


def by_document(samples: list[Sample]) -> dict[tuple[str, int], Sample]:
    """Samples by their document's hash and how many equal documents came before."""
    seen: Counter[str] = Counter()
    numbered = {}
    for sample in samples:
        numbered[sample.doc_hash, seen[sample.doc_hash]] = sample
        seen[sample.doc_hash] += 1
    return numbered


def _resolve_bases(described: Described) -> Described:
    """Plain models that others name as their base become bases."""
    names = {setting.base for _, setting in described if setting.base}
    resolved = []
    for run, setting in described:
        if setting.kind == "other" and any(same_model(setting.model, name) for name in names):
            setting = dataclasses.replace(setting, kind="base", base=setting.model, budget=1, trained=0)
        elif setting.kind == "l2d-base":
            setting = dataclasses.replace(setting, trained=0)
        resolved.append((run, setting))
    return resolved


def _row_key(run: Run, setting: Setting) -> str:
    """Everything that makes two runs the same row: model, settings and software, but not speed."""
    config = {name: value for name, value in run.config.items() if name not in PERFORMANCE}
    arguments = {name: value for name, value in run.model_args.items() if name not in PLACEMENT}
    sampler = {name: value for name, value in run.l2d.get("sampler", {}).items() if name not in EXACT_SETTINGS}
    software = [run.raw.get(name) for name in ("git_hash", "lm_eval_version", "transformers_version", "max_length")]
    templates = [run.raw.get(name) for name in ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn")]
    own = [setting.kind, setting.decoding, setting.fingerprint, setting.world_size, run.l2d.get("token_search")]
    return json.dumps([config, arguments, sampler, software, templates, own], sort_keys=True, default=str)


def _first(measures: list[Measure], name: str | None) -> Measure:
    """The number to show: the one called `name`, else the first of the results file."""
    return next((measure for measure in measures if measure.name == name), measures[0])


def _by_protocol(members: Described, metrics: dict[str, str]) -> list[Described]:
    """Runs of one setting, oldest first, in as few rows as put no two protocols of a task (shots, version, ...) into
    one row."""
    rows: list[tuple[dict[str, dict[str, Any]], Described]] = []
    for run, setting in sorted(members, key=lambda member: str(member[0].raw.get("date") or "")):
        own = {task: protocol_of(run, task, _first(run.measures[task], metrics.get(task))) for task in run.measures}
        for protocols, row in rows:
            if not any(task in protocols and differences(own[task], protocols[task]) for task in own):
                row.append((run, setting))
                protocols.update(own)
                break
        else:
            rows.append((own, [(run, setting)]))
    return [row for _, row in rows]


def _choose_runs(runs: list[Run], skipped: list[Skipped]) -> dict[str, Run]:
    """By task, the run that gives its score; of equal ones the newest, of contradictory ones none."""
    chosen = {}
    for task in {task: None for run in runs for task in run.measures}:
        having = [run for run in runs if task in run.measures]
        if len({json.dumps([dataclasses.astuple(m) for m in run.measures[task]]) for run in having}) > 1:
            for run in having:
                rest = ", ".join(other.file.name for other in having if other is not run)
                skipped.append(Skipped(str(run.file), task, f"contradictory: same setting, other scores than {rest}"))
            continue
        chosen[task] = having[-1]
        for run in having[:-1]:
            skipped.append(Skipped(str(run.file), task, f"the same scores again in {having[-1].file.name}"))
    return chosen


def _total_cost(members: Described) -> Setting:
    """One setting for several calls: tokens and seconds add; statistics per token are those of the longest call."""
    settings = [setting for _, setting in members]
    longest = max(settings, key=lambda setting: setting.tokens or 0)
    tokens, seconds = ([getattr(setting, name) for setting in settings] for name in ("tokens", "seconds"))
    return dataclasses.replace(
        longest,
        tokens=None if None in tokens else sum(tokens),
        seconds=None if None in seconds else sum(seconds),
    )


def _order(row: Row) -> tuple:
    setting, kinds = row.setting, list(KINDS)
    rest = (setting.decoding, setting.model, setting.budget or 0, str(setting))
    return (
        *(setting.base or setting.model, setting.kind not in ("base", "l2d-base"), kinds.index(setting.kind)),
        *rest,
    )
