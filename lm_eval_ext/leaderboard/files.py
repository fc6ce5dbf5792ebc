"""lm-eval's result folders: finds results and samples, checks them, and names everything that it could not use.

- `read_runs`: all usable runs below some folders, and the list of what was skipped
- `Run`, `Measure`: a results file; one number in it
- `Sample`, `read_samples`: one document's answer and scores; `read_costs`: what each document cost
- `Skipped`: a file, or a part of one, that is not in the report, and why
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from lm_eval_ext.leaderboard.schema import check_results, number, renamed

_STAMP = re.compile(r"results_(.+)\.json")
TOLERANCE = 1e-6
"""Of a score against the mean of its documents' scores."""
_LOWER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
"""The harness's metrics of which less is better; its older versions do not write that into the results."""
COSTS = ("solved_tokens", "nfe_requested", "nfe_computed", "passes", "seconds")
"""Sums over a document's requests, as the model class records them."""
_UNSCORED = "bypass"
"""The harness's metric, always 999, of a call with `--predict_only`."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What was left out: the file, the part of it (a task, or empty for all of it), and why."""

    file: str
    part: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a results file: `value` of `metric` after `filter`, with the harness's standard error."""

    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool

    @property
    def name(self) -> str:
        """As the harness writes it."""
        return f"{self.metric},{self.filter}"


@dataclasses.dataclass
class Run:
    """A results file.

    measures: by task (or group of tasks), its numbers in the file's order, the one to show first.
    leaves: by task, the tasks whose documents it averages: itself, unless it is a group.
    samples, compute: by task, the files beside it with every document's answer and with every request's cost.
    """

    file: Path
    raw: dict[str, Any]
    measures: dict[str, list[Measure]]
    leaves: dict[str, list[str]]
    samples: dict[str, Path]
    compute: dict[str, Path]

    @property
    def config(self) -> dict[str, Any]:
        """What the harness recorded of the call."""
        return self.raw["config"]

    @property
    def l2d(self) -> dict[str, Any]:
        """What our model class recorded; empty for other models."""
        return self.config.get("l2d") or {}

    @property
    def model_args(self) -> dict[str, Any]:
        """Model arguments, as a dictionary whatever the harness's version wrote."""
        arguments = self.config.get("model_args") or {}
        if isinstance(arguments, str):
            return dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
        return arguments

    @property
    def seconds(self) -> float | None:
        """Time spent on requests where the model class measured it, else of the whole call, loading included."""
        seconds = number(self.l2d.get("seconds")) or number(self.raw.get("total_evaluation_time_seconds"))
        return seconds if seconds and seconds > 1e-9 else None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One document under one filter: identity, texts, scores by metric; `cluster` names the group it belongs to."""

    doc_hash: str
    prompt_hash: str
    cluster: str
    prompt: str
    target: str
    answer: str
    scores: dict[str, float]


# ---- results -----------------------------------------------------------------------------------------------------


def read_runs(folders: list[Path]) -> tuple[list[Run], list[Skipped]]:
    """All runs below `folders` (or files given directly), in the order of their paths, and what was skipped.

    Raises `ValueError` for a path that does not exist.
    """
    runs, skipped = [], []
    for file in _candidates(folders):
        if any(part.endswith(".partial") for part in file.parts):
            skipped.append(Skipped(str(file), "", "belongs to an unfinished run of a sweep (.partial)"))
            continue
        try:
            run = _read_run(file)
        except (OSError, ValueError, RecursionError) as error:
            skipped.append(Skipped(str(file), "", _reason(error)))
            continue
        for task in list(run.measures):
            if not run.measures[task]:
                del run.measures[task]
                unscored = any(name.partition(",")[0] == _UNSCORED for name in run.raw["results"].get(task, {}))
                reason = "has answers without scores (--predict_only)" if unscored else "holds no number for this task"
                skipped.append(Skipped(str(file), task, reason))
        if run.measures:
            runs.append(run)
        else:
            skipped.append(Skipped(str(file), "", "holds no scores"))
    return runs, skipped


def _candidates(folders: list[Path]) -> list[Path]:
    files: dict[Path, Path] = {}
    for folder in folders:
        if not folder.exists():
            raise ValueError(f"{str(folder)!r} does not exist: give folders with lm-eval's results_*.json.")
        for file in [folder] if folder.is_file() else sorted(folder.rglob("results*.json")):
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not complete JSON ({error.msg}, line {error.lineno}): truncated or damaged"
    if isinstance(error, UnicodeDecodeError):
        return "is not text: damaged"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return str(error) if type(error) is ValueError else f"is not laid out like lm-eval's results ({error!r})"


def _read_run(file: Path) -> Run:
    raw = json.loads(file.read_text(encoding="utf-8"))
    check_results(raw)
    children = {name: tasks for name, tasks in raw["group_subtasks"].items() if tasks}
    inner = {task for tasks in children.values() for task in tasks}
    stamp = _STAMP.fullmatch(file.name)
    measures, leaves = {}, {}
    for task, values in raw["results"].items():
        numbers = _measures(values, _higher(raw, task))
        if task in inner or (task in children and not numbers):  # part of a group, or a group without an own score
            continue
        measures[task], leaves[task] = numbers, _leaves(task, children)
    for group in children:  # the parts of a group without a score stand for themselves
        if group not in measures:
            for task in _leaves(group, children):
                if task in raw["results"] and not any(task in own for own in leaves.values()):
                    measures[task] = _measures(raw["results"][task], _higher(raw, task))
                    leaves[task] = [task]
    tasks = sorted({leaf for own in leaves.values() for leaf in own}) if stamp else []
    time = stamp[1] if stamp else ""
    beside = {
        kind: {task: path for task in tasks if (path := file.with_name(f"{kind}_{task}_{time}.jsonl")).is_file()}
        for kind in ("samples", "compute")
    }
    return Run(file, raw, measures, leaves, beside["samples"], beside["compute"])


def _leaves(task: str, children: dict[str, list[str]]) -> list[str]:
    if task not in children:
        return [task]
    return [leaf for child in children[task] if child != task for leaf in _leaves(child, children)]


def _higher(raw: dict[str, Any], task: str) -> dict[str, Any]:
    """By metric, whether more is better: as the results file says, else as the task's own list of metrics does."""
    listed = (raw["configs"].get(task) or {}).get("metric_list") or []
    own = {entry.get("metric"): entry.get("higher_is_better") for entry in listed}
    stated = {**own, **(raw["higher_is_better"].get(task) or {})}
    return {**dict.fromkeys(_LOWER, False), **{name: value for name, value in stated.items() if value is not None}}


def _measures(values: dict[str, Any], higher: dict[str, Any]) -> list[Measure]:
    measures = []
    for key, value in values.items():
        metric, comma, rest = key.partition(",")
        if not comma or metric.endswith("_stderr") or metric == _UNSCORED or number(value) is None:
            continue
        stderr = number(values.get(f"{metric}_stderr,{rest}"))
        measures.append(Measure(metric, rest, float(value), stderr, higher.get(metric) is not False))
    return measures


# ---- samples -----------------------------------------------------------------------------------------------------


def read_samples(
    run: Run, task: str, measure: Measure, skipped: list[Skipped], cluster_fields: tuple[str, ...] = ()
) -> list[Sample] | None:
    """The samples behind one number, of all tasks that it averages; empty, with a reason in `skipped`, if unusable.

    Where the number is a mean of one task, the samples must give it; `None` if they contradict it. Documents with the
    same value of the first of `cluster_fields` that they have belong together, and so do equal documents.
    """
    samples: list[Sample] = []
    for leaf in run.leaves[task]:
        file = run.samples.get(leaf)
        if file is None:
            continue
        try:
            read = _read_file(file, measure, cluster_fields)
            _check_count(run, leaf, read)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            skipped.append(Skipped(str(file), leaf, _reason(error)))
            return []
        if contradiction := _contradiction(run, leaf, measure, read):
            skipped.append(Skipped(str(file), leaf, contradiction))
            skipped.append(Skipped(str(run.file), task, "its samples contradict it: not in the table"))
            return None
        samples += read
    return samples


def _read_file(file: Path, measure: Measure, cluster_fields: tuple[str, ...]) -> list[Sample]:
    samples = []
    for line_number, line in enumerate(_lines(file), 1):
        try:
            raw = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {line_number} is not complete JSON: truncated or damaged") from error
        if raw.get("filter", "none") == measure.filter:
            samples.append(_sample(raw, cluster_fields))
    return samples


def _lines(file: Path) -> list[str]:
    """Lines of a JSONL file. Not `splitlines`: texts hold other separators, such as U+2028, as they are."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return lines if lines[-1] else lines[:-1]


def _check_count(run: Run, leaf: str, samples: list[Sample]) -> None:
    expected = run.raw["n-samples"].get(leaf, {}).get("effective")
    if expected is not None and len(samples) != expected:
        raise ValueError(f"holds {len(samples)} samples where the results file counts {expected}: truncated")


def _contradiction(run: Run, leaf: str, measure: Measure, samples: list[Sample]) -> str:
    """In words, how the samples contradict the results file; empty where they agree or cannot tell."""
    metrics = (run.raw["configs"].get(leaf) or {}).get("metric_list") or []
    kinds = {entry.get("metric"): entry.get("aggregation", "mean") for entry in metrics}
    stated = number(run.raw["results"].get(leaf, {}).get(measure.name))
    scores = [sample.scores.get(measure.metric) for sample in samples]
    known = [score for score in scores if score is not None]
    if stated is None or kinds.get(measure.metric) not in ("mean", "acc") or not known or len(known) < len(scores):
        return ""
    mean = sum(known) / len(known)
    if abs(mean - stated) <= TOLERANCE:
        return ""
    return f"contradictory: gives {measure.name} = {mean:.6g} where the results file says {stated:.6g}"


def _sample(raw: dict[str, Any], cluster_fields: tuple[str, ...]) -> Sample:
    doc = raw["doc"] if isinstance(raw.get("doc"), dict) else {}
    own = [f"{name}={doc[name]!r}" for name in cluster_fields if name in doc]
    scores = {name: number(raw.get(name)) for name in raw.get("metrics") or []}
    prompt, answer = _texts(raw)
    return Sample(
        doc_hash=str(raw["doc_hash"]),
        prompt_hash=str(raw.get("prompt_hash", "")),
        cluster=own[0] if own else str(raw["doc_hash"]),
        prompt=sys.intern(prompt),  # the same in every run
        target=str(raw.get("target", "")),
        answer=answer,
        scores={name: score for name, score in scores.items() if score is not None},
    )


def _texts(raw: dict[str, Any]) -> tuple[str, str]:
    """Prompt and answer; the answer of a multiple-choice document is its most likely continuation."""
    requests = raw.get("arguments")
    requests = list(requests.values()) if isinstance(requests, dict) else list(requests or [])
    parts = [list(r.values()) if isinstance(r, dict) else list(r) for r in requests]
    prompt = str(parts[0][0]) if parts and parts[0] else ""
    answers = raw.get("filtered_resps", raw.get("resps", ""))
    if not isinstance(answers, list):
        return prompt, str(answers)
    pairs = [number(a[0]) if isinstance(a, list) and len(a) == 2 else None for a in answers]
    known = [value for value in pairs if value is not None]
    if known and len(known) == len(pairs) == len(parts) and isinstance(parts[0][-1], str):
        best = max(range(len(known)), key=known.__getitem__)
        shown = str(parts[best][1]).strip() if len(parts) > 1 else "the target"
        return prompt, f"{shown}  (log-probability {known[best]:.3f})"
    only = answers[0] if len(answers) == 1 else answers
    return prompt, only if isinstance(only, str) else json.dumps(only, ensure_ascii=False)


# ---- costs -------------------------------------------------------------------------------------------------------


def read_costs(run: Run, task: str, skipped: list[Skipped]) -> dict[str, dict[str, float]]:
    """By a document's hash, the sums of `COSTS` over its requests. Empty where the run recorded none."""
    costs: dict[str, dict[str, float]] = {}
    for leaf in run.leaves[task]:
        file = run.compute.get(leaf)
        if file is None:
            continue
        try:
            for line in map(renamed, map(json.loads, _lines(file))):
                cost = costs.setdefault(line["doc_hash"], dict.fromkeys(COSTS, 0))
                for name in COSTS:
                    if isinstance(line[name], (bool, str)) or number(line[name]) is None:
                        raise ValueError(f"{name} is not a number")
                    cost[name] += line[name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            skipped.append(Skipped(str(file), leaf, _reason(error)))
            return {}
    return costs
