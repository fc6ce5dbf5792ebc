"""The study's figure: accuracy against budget, one panel per task and decoding.

* `draw`: a curve per way of training the path, its best single evaluation as an open mark at T = 2 (the free answer of
  the base, and one evaluation), and everything that has no budget as a horizontal line; bars are one standard error
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from training.studies.evaluate import BUDGETS
from training.studies.report import DECODINGS, TaskScores, score, title
from training.studies.tasks import TASKS

COLORS = {
    "plain": "tab:blue",
    "corrupted": "tab:orange",
    "rollout": "tab:green",
    "carried": "tab:red",
    "carried_long": "darkred",
}
LINES = {
    "base": ("plain", "tab:gray", "-"),
    "noise_free": ("single", "black", ":"),
    "noise_free_long": ("single", "black", "--"),
    "lora": ("plain", "tab:purple", "--"),
    "full": ("plain", "tab:purple", ":"),
    "full_long": ("plain", "tab:purple", "-"),
}


def draw(tasks: dict[str, TaskScores], path: Path) -> None:
    """Writes the figure as PNG."""
    size = (5.5 * len(DECODINGS), 3.8 * max(1, len(tasks)) + 1.2)
    figure, panels = pyplot.subplots(len(tasks), len(DECODINGS), figsize=size, squeeze=False, layout="constrained")
    for line, (name, task) in zip(panels, tasks.items(), strict=True):
        for axes, decoding in zip(line, DECODINGS, strict=True):
            _panel(axes, task, decoding)
            axes.set_title(f"{TASKS[name].title}, {decoding}", fontsize=10)
        line[0].set_ylabel("exact match (± standard error)")
    for axes in panels[-1]:
        axes.set_xlabel("budget T: evaluations per token (open marks: one evaluation at its best time)")
        axes.xaxis.label.set_size(8)
    found = [panels[row][0].get_legend_handles_labels() for row in range(len(tasks))]
    named = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axes: Axes, task: TaskScores, decoding: str) -> None:
    for method, (setting, color, style) in LINES.items():
        if (method, setting) in task.problems:
            found = score(task, (method, setting), decoding)
            axes.axhline(found.value, color=color, linestyle=style, linewidth=1, label=title(method))
    shown = [method for method in COLORS if (method, "single") in task.problems]
    for place, method in enumerate(shown):
        shift = 1.03 ** (place - (len(shown) - 1) / 2)
        curve = [score(task, (method, f"T{budget}"), decoding) for budget in BUDGETS]
        look: Any = {"capsize": 3, "markersize": 4, "elinewidth": 1, "color": COLORS[method]}
        values, errors = [one.value for one in curve], [one.stderr for one in curve]
        axes.errorbar([budget * shift for budget in BUDGETS], values, errors, fmt="o-", label=title(method), **look)
        single = score(task, (method, "single"), decoding)
        axes.errorbar([2 * shift], [single.value], [single.stderr], fmt="o", markerfacecolor="white", **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.minorticks_off()
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
