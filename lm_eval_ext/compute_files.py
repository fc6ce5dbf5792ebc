"""Writes `compute_<task>_<time>.jsonl` beside the harness's results: what every request cost.

- `install`: makes the harness's tracker write the files whenever it saves the results of an L2D run

The harness tells a model neither where results go nor when they are saved, so its tracker's method is wrapped. The
costs come with the results, attached to `RunInfo`; results of other models are left alone.
"""

import functools
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

from lm_eval_ext.record import RequestCost, RunInfo

logger = logging.getLogger(__name__)


def install() -> None:
    """Wrap `EvaluationTracker.save_results_aggregated`, once."""
    save = EvaluationTracker.save_results_aggregated
    if getattr(save, "writes_compute_files", False):
        return

    @functools.wraps(save)
    def save_with_compute(self: EvaluationTracker, results: dict[str, Any], samples: dict | None = None) -> None:
        save(self, results=results, samples=samples)
        info = results.get("config", {}).get("l2d")
        if isinstance(info, RunInfo) and self.output_path and hasattr(self, "date_id"):
            path = Path(self.output_path)
            name = str(self.general_config_tracker.model_name_sanitized)
            write(path.parent if path.suffix == ".json" else path / name, self.date_id, info.requests)

    vars(save_with_compute)["writes_compute_files"] = True
    EvaluationTracker.save_results_aggregated = save_with_compute


def write(folder: Path, time: str, costs: list[RequestCost]) -> None:
    """One file per task in `folder`, lines ordered by document, request and repeat."""
    by_task: dict[str, list[RequestCost]] = defaultdict(list)
    for cost in costs:
        if cost.task is not None:
            by_task[cost.task].append(cost)
    for task, lines in by_task.items():
        lines.sort(key=lambda cost: (cost.doc_id or 0, cost.request, cost.repeat))
        file = folder / f"compute_{task}_{time}.jsonl"
        file.write_text("".join(cost.line() + "\n" for cost in lines), encoding="utf-8")
        logger.info("Saving compute per request to %s", file)
