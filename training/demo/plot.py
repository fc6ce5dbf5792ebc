"""The demo's figure: accuracy against budget.

* `draw`: one panel per task; L2D greedy and sampled over its budgets, the control as a single point, plain models as
  horizontal lines; error bars and bands are one standard error
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from training.demo.plan import BUDGETS, TASKS
from training.demo.report import NAMES, Row, Scores, index_rows

PLAIN = {"base": "tab:gray", "lora_sft": "tab:green", "full_sft": "tab:purple"}
# decoding -> format, color of the curve and of the control, and a shift along the axis so that both can be seen
MARKS = {"greedy": ("o-", "tab:blue", "tab:red", 0.98), "sampled": ("s--", "tab:cyan", "tab:orange", 1.02)}


def draw(rows: list[Row], path: Path) -> None:
    """Writes the figure as PNG."""
    scores = index_rows(rows)
    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(11, 4.5), sharey=True, layout="constrained")
    for axes, task in zip(panels, TASKS, strict=True):
        _panel(axes, scores, task)
        axes.set_title(
            task.removeprefix("l2d_demo_") + (" (trained)" if task == TASKS[0] else " (the base's other skill)")
        )
    panels[0].set_ylabel("exact match, held-out problems (± standard error)")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes: Axes, scores: Scores, task: str) -> None:
    for method, color in PLAIN.items():
        row = scores[method, 1, "greedy", task]
        axes.axhline(row.value, color=color, linewidth=1, label=f"{NAMES[method]}, greedy")
        axes.axhspan(row.value - row.stderr, row.value + row.stderr, color=color, alpha=0.15, linewidth=0)
    for decoding, (mark, color, other, shift) in MARKS.items():
        style: dict[str, Any] = {"capsize": 4, "markersize": 4, "elinewidth": 1.2}
        curve = [scores["l2d", budget, decoding, task] for budget in BUDGETS]
        values, errors = [row.value for row in curve], [row.stderr for row in curve]
        places = [budget * shift for budget in BUDGETS]
        axes.errorbar(places, values, errors, fmt=mark, color=color, label=f"L2D, {decoding}", **style)
        one = scores["control", 2, decoding, task]
        label = f"one evaluation at t = {one.final_time}, {decoding}"
        axes.errorbar([2 * shift], [one.value], [one.stderr], fmt=mark[0], color=other, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, *BUDGETS[1:]], [str(budget) for budget in (1, 2, *BUDGETS[1:])])
    axes.minorticks_off()
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("budget T: evaluations per token")
    axes.grid(alpha=0.3)
