"""Rows, cells, comparability, differences and averages: everything that the report says, before it is drawn.

- `build_board`: from runs to a `Board`
- `Row`: a model and setting; `Cell`: one of its scores; `Average`: over a group of tasks
- `GROUP_RULE`, `group_of`: which tasks are averaged together
"""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from typing import Any

from lm_eval_ext.leaderboard.files import TOLERANCE, Measure, Run, Sample, Skipped, read_costs, read_samples
from lm_eval_ext.leaderboard.methods import CONTROLS, KINDS, Setting, by_sampler, decoding_of, describe
from lm_eval_ext.leaderboard.protocol import differences, protocol_of, usual_protocol
from lm_eval_ext.leaderboard.statistics import Paired, paired_test

_GROUPS = {
    "math": r"gsm|math|aime|asdiv|svamp|mawps|arithmetic|amc\d|l2d_demo",
    "coding": r"humaneval|mbpp|code|apps|bigcodebench",
    "general knowledge": r"mmlu|arc_|agieval|bbh|triviaqa|nq_open|hellaswag|truthfulqa|gpqa|sciq|openbookqa|piqa|boolq",
}
GROUPS = (*_GROUPS, "all")
_GROUP_ORDER = (*_GROUPS, "other")
GROUP_RULE = (
    "An average is the unweighted mean over all tasks of the group that this report holds (scores from 0 to 1 of which "
    "more is better, under the usual protocol of the table); a row that lacks one of them, or has it under another "
    "protocol, gets no average. Its standard error takes tasks as independent."
)
PERFORMANCE = ("batch_size", "batch_sizes", "device", "model_num_parameters", "use_cache", "l2d", "model_args")
_PERFORMANCE_ARGUMENTS = ("batch_size", "max_batch_size", "device", "parallelize", "max_memory_per_gpu")

_EXACT = ("speculation", "draft_tokens")  # sampler settings that change the cost and never the result


@dataclasses.dataclass
class Cell:
    """A score: `measure` of `task`, with the protocol that it was measured under and how it was decoded.

    others: the remaining numbers of that task; costs: by a document's hash, where the run recorded them.
    reasons: why it is not comparable with the rest of the column; base_reasons: why not with its base.
    paired: the test against the base, where both have samples; its wins are the documents that got better, which for
    some measures is a lower score.
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
    base_reasons: list[str] = dataclasses.field(default_factory=list)
    base: "Cell | None" = None
    paired: Paired | None = None

    @property
    def comparable(self) -> bool:
        """Whether it may be averaged with the other tasks of its row."""
        return not self.reasons


@dataclasses.dataclass(frozen=True)
class Average:
    """Mean over the tasks of a group; the difference is to the same mean of the base."""

    value: float
    stderr: float | None
    difference: float | None
    difference_stderr: float | None
    tasks: tuple[str, ...]


@dataclasses.dataclass
class Row:
    """A model and setting with its scores by task."""

    number: int
    setting: Setting
    runs: list[Run]
    cells: dict[str, Cell]
    base: "Row | None" = None
    averages: dict[str, Average] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Board:
    """All rows, the tasks and groups that are columns, what was skipped, and which controls are missing.

    controls: by base, kinds of controls that are present; usual: by task, the protocol most rows share.
    """

    rows: list[Row]
    tasks: list[str]
    groups: dict[str, list[str]]
    skipped: list[Skipped]
    controls: dict[str, list[str]]
    usual: dict[str, dict[str, Any]]


def build_board(
    runs: list[Run],
    skipped: list[Skipped],
    metrics: dict[str, str] | None = None,
    cluster_fields: tuple[str, ...] = (),
) -> Board:
    """Put `runs` into rows, compare each with its base, average.

    Args:
        skipped: what reading left out; what is found to be unusable here is added.
        metrics: by task, the `metric,filter` to show in place of the first one in the results file.
        cluster_fields: names of document fields whose equal values group documents.
    """
    described = [(part, describe(part)) for run in runs for part in by_sampler(run)]
    rows = _rows(_resolve_bases(described), skipped, metrics or {}, cluster_fields)
    tasks = sorted(
        {task for row in rows for task in row.cells}, key=lambda task: (_GROUP_ORDER.index(group_of(task)), task)
    )
    usual = {}
    for task in tasks:
        usual[task] = usual_protocol([row.cells[task].protocol for row in rows if task in row.cells])
        for row in rows:
            if task in row.cells:
                row.cells[task].reasons = differences(row.cells[task].protocol, usual[task], one_model=False)
    for row in rows:
        _compare_with_base(row, rows)
    groups = _group_tasks(rows, tasks)
    for row in rows:
        row.averages = {group: average for group in groups if (average := _average(row, groups[group]))}
    return Board(rows, tasks, groups, skipped, _controls(rows), usual)


# ---- rows --------------------------------------------------------------------------------------------------------


def _same_model(first: str, second: str) -> bool:
    """Whether two names mean one model: equal, the same folder, or one is the end of the other's path."""
    first, second = (name.rstrip("/") for name in (first, second))
    if first == second or os.path.isdir(first) and os.path.isdir(second) and os.path.samefile(first, second):
        return True
    long, short = sorted((first, second), key=len, reverse=True)
    return "/" in short and long.endswith("/" + short.removeprefix("./"))


def _resolve_bases(described: list[tuple[Run, Setting]]) -> list[tuple[Run, Setting]]:
    """Plain models that others name as their base become bases."""
    names = {setting.base for _, setting in described if setting.base}
    resolved = []
    for run, setting in described:
        if setting.kind == "other" and any(_same_model(setting.model, name) for name in names):
            setting = dataclasses.replace(setting, kind="base", base=setting.model, budget=1, trained=0)
        elif setting.kind == "l2d-base":
            setting = dataclasses.replace(setting, trained=0)
        resolved.append((run, setting))
    return resolved


def _row_key(run: Run, setting: Setting) -> str:
    """Everything that makes two runs the same row: model, settings and software, but not speed."""
    config = {name: value for name, value in run.config.items() if name not in PERFORMANCE}
    arguments = {name: value for name, value in run.model_args.items() if name not in _PERFORMANCE_ARGUMENTS}
    sampler = {name: value for name, value in (run.l2d.get("sampler") or {}).items() if name not in _EXACT}
    software = [run.raw.get(name) for name in ("git_hash", "lm_eval_version", "transformers_version", "max_length")]
    templates = [run.raw.get(name) for name in ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn")]
    own = [setting.kind, setting.decoding, setting.fingerprint, setting.world_size, run.l2d.get("token_search")]
    return json.dumps([config, arguments, sampler, software, templates, own], sort_keys=True, default=str)


def _rows(
    described: list[tuple[Run, Setting]],
    skipped: list[Skipped],
    metrics: dict[str, str],
    cluster_fields: tuple[str, ...],
) -> list[Row]:
    gathered: dict[str, list[tuple[Run, Setting]]] = {}
    for run, setting in described:
        gathered.setdefault(_row_key(run, setting), []).append((run, setting))
    rows = []
    for members in [part for gathered_runs in gathered.values() for part in _by_protocol(gathered_runs, metrics)]:
        cells = {}
        for task, run in _choose_runs([run for run, _ in members], skipped).items():
            measures = run.measures[task]
            first = _first(measures, metrics.get(task))
            samples = read_samples(run, task, first, skipped, cluster_fields)
            if samples is None:
                continue
            others = [measure for measure in measures if measure is not first]
            costs = read_costs(run, task, skipped)
            about = (protocol_of(run, task, first), decoding_of(run, [task]))
            cells[task] = Cell(task, first, others, run, *about, samples, costs)
        if cells:
            used = [run for run, _ in members if any(cell.run is run for cell in cells.values())]
            rows.append(Row(0, _total_cost(members), used, cells))
    order = list(KINDS)
    rows.sort(key=lambda row: _order(row.setting, order))
    for place, row in enumerate(rows, 1):
        row.number = place
    return rows


def _first(measures: list[Measure], wanted: str | None) -> Measure:
    """The number to show: the one named `wanted`, else the first of the results file."""
    return next((measure for measure in measures if measure.name == wanted), measures[0])


def _by_protocol(members: list[tuple[Run, Setting]], metrics: dict[str, str]) -> list[list[tuple[Run, Setting]]]:
    """Runs of one setting, oldest first, in as few rows as put no two protocols of a task (shots, version, ...) into
    one row."""
    rows: list[tuple[dict[str, dict[str, Any]], list[tuple[Run, Setting]]]] = []
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


def _total_cost(members: list[tuple[Run, Setting]]) -> Setting:
    """One setting for several calls: tokens and seconds add; statistics per token are those of the longest call."""
    settings = [setting for _, setting in members]
    longest = max(settings, key=lambda setting: setting.tokens or 0)
    if len(settings) == 1:
        return longest
    tokens = [setting.tokens for setting in settings if setting.tokens is not None]
    seconds = [setting.seconds for setting in settings if setting.seconds is not None]
    return dataclasses.replace(
        longest,
        tokens=sum(tokens) if len(tokens) == len(settings) else None,
        seconds=sum(seconds) if len(seconds) == len(settings) else None,
    )


def _order(setting: Setting, order: list[str]) -> tuple:
    first = 0 if setting.kind in ("base", "l2d-base") else 1
    kind = order.index(setting.kind)
    return (
        setting.base or setting.model,
        first,
        kind,
        setting.decoding,
        setting.model,
        setting.budget or 0,
        str(setting),
    )


# ---- against the base --------------------------------------------------------------------------------------------


def _compare_with_base(row: Row, rows: list[Row]) -> None:
    setting = row.setting
    if setting.kind == "base" or setting.base is None:
        return
    candidates = [other for other in rows if other is not row and _is_base_of(other.setting, setting)]
    for task, cell in row.cells.items():
        found = []
        for other in candidates:
            if task in other.cells and other.cells[task].decoding == cell.decoding:
                reasons = differences(cell.protocol, other.cells[task].protocol)
                found.append((len(reasons), other.setting.kind != "base", other.number, reasons, other))
        if not found:
            cell.base_reasons = ["no result of the base with this decoding"]
            continue
        *_, cell.base_reasons, base = min(found, key=lambda entry: entry[:3])
        cell.base, row.base = base.cells[task], row.base or base
        if not cell.base_reasons:
            _pair(cell, base.cells[task])


def _is_base_of(other: Setting, setting: Setting) -> bool:
    """Whether `other` is the base of `setting`: the model itself, or an L2D model on it at T = 1."""
    if setting.base is None:
        return False
    if other.kind == "l2d-base":
        return setting.kind != "l2d-base" and other.base is not None and _same_model(other.base, setting.base)
    return other.kind in ("base", "lora-ft", "full-ft") and _same_model(other.model, setting.base)


def _pair(cell: Cell, base: Cell) -> None:
    """Test `cell` against `base` where both have samples whose mean is the score: a perplexity, say, is none."""
    mine, theirs = by_document(cell.samples), by_document(base.samples)
    metric = cell.measure.metric
    shared = [key for key in mine if key in theirs and metric in mine[key].scores and metric in theirs[key].scores]
    if not shared:
        return
    if not (_is_mean(cell) and _is_mean(base)):
        cell.base_reasons = ["the score is not the mean of its documents' scores"]
        return
    found = paired_test(
        [mine[key].scores[metric] for key in shared],
        [theirs[key].scores[metric] for key in shared],
        [mine[key].cluster for key in shared],
    )
    if not cell.measure.higher_is_better:
        found = dataclasses.replace(found, wins=found.losses, losses=found.wins)
    cell.paired = found


def _is_mean(cell: Cell) -> bool:
    scores = [sample.scores.get(cell.measure.metric) for sample in cell.samples]
    known = [score for score in scores if score is not None]
    return len(known) == len(scores) and abs(sum(known) / len(known) - cell.measure.value) <= TOLERANCE


def by_document(samples: list[Sample]) -> dict[tuple[str, int], Sample]:
    """Samples by their document's hash and how many equal documents came before."""
    seen: Counter[str] = Counter()
    found = {}
    for sample in samples:
        found[sample.doc_hash, seen[sample.doc_hash]] = sample
        seen[sample.doc_hash] += 1
    return found


# ---- averages and controls ---------------------------------------------------------------------------------------


def group_of(task: str) -> str:
    """The group that a task's name puts it in, "other" for unknown ones."""
    return next((group for group, pattern in _GROUPS.items() if re.search(pattern, task)), "other")


def _group_tasks(rows: list[Row], tasks: list[str]) -> dict[str, list[str]]:
    """By group, the tasks that are averaged; only groups with at least two, so that an average says something new."""
    fit = []
    for task in tasks:
        measures = [row.cells[task].measure for row in rows if task in row.cells and row.cells[task].comparable]
        if measures and all(measure.higher_is_better and 0 <= measure.value <= 1 for measure in measures):
            fit.append(task)
    groups = {group: [task for task in fit if group in ("all", group_of(task))] for group in GROUPS}
    groups = {group: members for group, members in groups.items() if len(members) > 1}
    same_as_all = [group for group in groups if group != "all" and groups[group] == groups.get("all")]
    return {group: members for group, members in groups.items() if not (same_as_all and group == "all")}


def _average(row: Row, tasks: list[str]) -> Average | None:
    cells = [row.cells[task] for task in tasks if task in row.cells and row.cells[task].comparable]
    if len(cells) < len(tasks):
        return None
    paired = [cell.paired for cell in cells if cell.paired is not None]
    complete = len(paired) == len(cells)
    return Average(
        value=sum(cell.measure.value for cell in cells) / len(cells),
        stderr=_error_of_mean([cell.measure.stderr for cell in cells]),
        difference=sum(pair.difference for pair in paired) / len(cells) if complete else None,
        difference_stderr=_error_of_mean([pair.stderr for pair in paired]) if complete else None,
        tasks=tuple(tasks),
    )


def _error_of_mean(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.sqrt(sum(error**2 for error in known)) / len(known)


def _controls(rows: list[Row]) -> dict[str, list[str]]:
    """By base of an L2D model, which of the controls are among the rows."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.setting.kind.startswith("l2d-") and row.setting.kind != "l2d-base" and row.setting.base:
            found.setdefault(row.setting.base, [])
    for base, present in found.items():
        kinds = {row.setting.kind for row in rows if row.setting.base and _same_model(row.setting.base, base)}
        present += [kind for kind in CONTROLS if kind in kinds]
    return found
