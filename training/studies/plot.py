"""The study's figure: accuracy against budget, one panel per task and decoding.

* `draw`: a curve per way of training the path, its best single evaluation as an open mark at T = 2 (the free answer of
  the base, and one evaluation), and everything that has no budget as a horizontal line; bars are 95 % intervals over
  problems, and dots the single seeds
"""

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from l2d.statistics import Estimate
from training.studies.evaluate import BUDGETS
from training.studies.report import title
from training.studies.scores import DECODINGS, TaskScores, score
from training.studies.tasks import TASKS

COLORS = ("tab:blue", "tab:orange", "tab:red", "tab:green", "tab:brown", "tab:pink", "tab:cyan", "tab:olive")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1)))


def draw(tasks: dict[str, TaskScores], path: Path) -> None:
    """Writes the figure as PNG."""
    size = (5.5 * len(DECODINGS), 3.8 * max(1, len(tasks)) + 1.2)
    figure, panels = pyplot.subplots(len(tasks), len(DECODINGS), figsize=size, squeeze=False, layout="constrained")
    for line, (name, task) in zip(panels, tasks.items(), strict=True):
        for axes, decoding in zip(line, DECODINGS, strict=True):
            _panel(axes, task, decoding)
            axes.set_title(f"{TASKS[name].title}, {decoding}", fontsize=10)
        line[0].set_ylabel("exact match")
    for axes in panels[-1]:
        axes.set_xlabel("budget T: evaluations per token (open marks: one evaluation at its best time)")
        axes.xaxis.label.set_size(8)
    legends = [panels[row][0].get_legend_handles_labels() for row in range(len(tasks))]
    named = {label: handle for handles, labels in legends for handle, label in zip(handles, labels, strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axes: Axes, task: TaskScores, decoding: str) -> None:
    methods = dict.fromkeys(method for method, _ in task.outcomes)
    curves = [method for method in methods if (method, "T3") in task.outcomes]
    for method, dashes in zip([method for method in methods if method not in curves], cycle(DASHES), strict=False):
        key = (method, "single" if (method, "single") in task.outcomes else "plain")
        value = score(task, key, decoding).problems.value
        axes.axhline(value, color="gray" if method == "base" else "black", linestyle=dashes, label=title(method))
    for number, (method, color) in enumerate(zip(curves, cycle(COLORS), strict=False)):
        shift = 1.03 ** (number - (len(curves) - 1) / 2)
        keys = [(method, "single"), *((method, f"T{budget}") for budget in BUDGETS)]
        positions = [budget * shift for budget in (2, *BUDGETS)]
        estimates = [score(task, key, decoding).problems for key in keys]
        look: Any = {"capsize": 3, "markersize": 4, "elinewidth": 1, "color": color}
        values, bars = [one.value for one in estimates], [_reach(one) for one in estimates]
        axes.errorbar(positions[1:], values[1:], bars[1:], fmt="o-", label=title(method), **look)
        axes.errorbar(positions[:1], values[:1], bars[:1], fmt="o", markerfacecolor="white", **look)
        for key, position in zip(keys, positions, strict=True):
            seeds = [outcomes.mean() for outcomes in task.outcomes[key][decoding].values()]
            axes.plot([position] * len(seeds), seeds, ".", color=color, markersize=3, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, *BUDGETS], ["one", *map(str, BUDGETS)])
    axes.minorticks_off()
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)


def _reach(estimate: Estimate) -> float:
    """Half of the 95 % interval; 0 where it is not known or not symmetric."""
    interval = estimate.interval()
    return 0.0 if interval is None or estimate.stderr is None else (interval[1] - interval[0]) / 2
