"""Writes `compute_<task>_<time>.jsonl` beside the harness's results: what every request cost.

- `install`: makes the harness's tracker write the files whenever it saves the results of an L2D run

The harness tells a model neither where results go nor when they are saved, so its tracker's methods are wrapped. The
costs come with the results, attached to `RunInfo`; results of other models are left alone. The harness only warns when
a file cannot be written, and leaves half of it: such files are removed here, and the run ends with one sentence.
"""

import functools
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

from l2d.cli.files import write_files
from lm_eval_ext.arguments import UsageError
from lm_eval_ext.requests.compute_record import RequestCost, RunInfo

logger = logging.getLogger(__name__)


def install() -> None:
    """Wrap the tracker's methods, once."""
    if getattr(EvaluationTracker.save_results_aggregated, "writes_compute_files", False):
        return
    save_results, save_samples = EvaluationTracker.save_results_aggregated, EvaluationTracker.save_results_samples

    @functools.wraps(save_results)
    def save_with_compute(self: EvaluationTracker, results: dict[str, Any], samples: dict | None = None) -> None:
        save_results(self, results=results, samples=samples)
        info = results.get("config", {}).get("l2d")
        if isinstance(info, RunInfo) and self.output_path and hasattr(self, "date_id"):
            self.saves_l2d, path = True, Path(self.output_path)
            name = f"{path.stem}_{self.date_id}.json" if path.suffix == ".json" else f"results_{self.date_id}.json"
            _check(folder(self) / name, json.loads)
            write(folder(self), self.date_id, info.requests)

    @functools.wraps(save_samples)
    def save_and_check(self: EvaluationTracker, task_name: str, samples: list[dict]) -> None:
        save_samples(self, task_name=task_name, samples=samples)
        if getattr(self, "saves_l2d", False):
            file = folder(self) / f"samples_{task_name}_{self.date_id}.jsonl"
            _check(file, functools.partial(_lines, count=len(samples)))

    vars(save_with_compute)["writes_compute_files"] = True
    EvaluationTracker.save_results_aggregated = save_with_compute
    EvaluationTracker.save_results_samples = save_and_check


def folder(tracker: EvaluationTracker) -> Path:
    """Where the harness puts its files."""
    path = Path(tracker.output_path)
    return path.parent if path.suffix == ".json" else path / str(tracker.general_config_tracker.model_name_sanitized)


def _lines(text: str, count: int) -> None:
    if text.count("\n") != count:
        raise ValueError("lines are missing")


def _check(file: Path, whole: Callable[[str], Any]) -> None:
    """Raise `UsageError` if `file` is not there or `whole` raises `ValueError`; half of a file is removed."""
    try:
        whole(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        file.unlink(missing_ok=True)
        raise UsageError(
            f"--output_path: {str(file)!r} could not be written completely, so these results are lost: make room "
            "or name another folder, and run again (--use_cache FILE keeps answers)."
        ) from error


def write(folder: Path, time: str, costs: list[RequestCost]) -> None:
    """One file per task in `folder`, lines ordered by document, request and repeat."""
    by_task: dict[str, list[RequestCost]] = defaultdict(list)
    for cost in costs:
        if cost.task is not None:
            by_task[cost.task].append(cost)
    texts = {}
    for task, lines in by_task.items():
        lines.sort(key=lambda cost: (cost.doc_id or 0, cost.request, cost.repeat))
        texts[f"compute_{task}_{time}.jsonl"] = "".join(cost.line() + "\n" for cost in lines)
    try:
        write_files(folder, texts, "--output_path")
    except ValueError as error:
        raise UsageError(str(error)) from error
    for name in texts:
        logger.info("Saving compute per request to %s", folder / name)
