"""The study's figure: accuracy against budget, one panel per task and decoding.

* `Curve`, `draw_curves`, `legend_below`: what such a panel is made of, for other studies too
* `draw`: a curve per way of training the path, its best single evaluation as an open mark at T = 2 (the free answer of
  the base, and one evaluation), and everything that has no budget as a horizontal line; bars are 95 % intervals over
  problems, and dots the single seeds
"""

from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    legend_below(figure, [line[0] for line in panels])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


@dataclass(frozen=True)
class Curve:
    """Scores of one way of training, over its budgets.

    Attributes:
        budgets: of the marks that a line joins, with `estimates`, one for each.
        single: of one evaluation at its best time, drawn at T = 2; `None` where it was not measured.
        seeds: values of single trainings, for each budget and last for the single evaluation.
    """

    title: str
    budgets: list[int]
    estimates: list[Estimate]
    single: Estimate | None = None
    seeds: list[list[float]] = field(default_factory=list)


def draw_curves(axes: Axes, curves: list[Curve], levels: dict[str, float]) -> None:
    """Curves with error bars against the budget, and horizontal lines, the base's in gray, by their titles."""
    for (name, value), dashes in zip(levels.items(), cycle(DASHES), strict=False):
        axes.axhline(value, color="gray" if name == title("base") else "black", linestyle=dashes, label=name)
    for number, (curve, color) in enumerate(zip(curves, cycle(COLORS), strict=False)):
        shift = 1.03 ** (number - (len(curves) - 1) / 2)
        look: Any = {"capsize": 3, "markersize": 4, "elinewidth": 1, "color": color}
        positions = [budget * shift for budget in curve.budgets]
        values, bars = [one.value for one in curve.estimates], [_reach(one) for one in curve.estimates]
        axes.errorbar(positions, values, bars, fmt="o-", label=curve.title, **look)
        if curve.single is not None:
            once: Any = {"fmt": "o", "markerfacecolor": "white", **look}
            axes.errorbar([2 * shift], [curve.single.value], [_reach(curve.single)], **once)
        for position, seeds in zip([*positions, 2 * shift], curve.seeds, strict=False):
            axes.plot([position] * len(seeds), seeds, ".", color=color, markersize=3, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, *BUDGETS], ["one", *map(str, BUDGETS)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def legend_below(figure: Figure, panels: list[Axes]) -> None:
    """One legend for all panels."""
    legends = [axes.get_legend_handles_labels() for axes in panels]
    named = {label: handle for handles, labels in legends for handle, label in zip(handles, labels, strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3, fontsize=8)


def _panel(axes: Axes, task: TaskScores, decoding: str) -> None:
    methods = dict.fromkeys(method for method, _ in task.outcomes)
    curves, levels = [], {}
    for method in methods:
        if (method, "T3") not in task.outcomes:
            key = (method, "single" if (method, "single") in task.outcomes else "plain")
            levels[title(method)] = score(task, key, decoding).problems.value
            continue
        keys = [*((method, f"T{budget}") for budget in BUDGETS), (method, "single")]
        estimates = [score(task, key, decoding).problems for key in keys]
        seeds = [[values.mean() for values in task.outcomes[key][decoding].values()] for key in keys]
        curves.append(Curve(title(method), list(BUDGETS), estimates[:-1], estimates[-1], seeds))
    draw_curves(axes, curves, levels)
    axes.set_ylim(0, 1.03)


def _reach(estimate: Estimate) -> float:
    """Half of the 95 % interval; 0 where it is not known or not symmetric."""
    interval = estimate.interval()
    return 0.0 if interval is None or estimate.stderr is None else (interval[1] - interval[0]) / 2
