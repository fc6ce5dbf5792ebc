"""The figure of the study of a real model: token accuracy, loss and whole solutions against the budget, and how the
trainings went.

* `draw`: curves of everything that has a budget, with one evaluation as an open mark, and horizontal lines for the
  rest; bars are 95 % intervals over problems
"""

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from training.studies.plot import COLORS, DASHES, Curve, draw_curves, legend_below
from training.studies.real.evaluate import BUDGETS
from training.studies.real.plan import METHODS
from training.studies.real.scores import METRICS, Study, score, title

SMOOTHED = 10  # training steps of a mean


def draw(study: Study, path: Path) -> None:
    """Writes the figure as PNG."""
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8.8), layout="constrained")
    for axes, (metric, name) in zip(panels.flat, METRICS.items(), strict=False):
        draw_curves(axes, *_lines(study, metric))
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("budget T: evaluations per token (open marks: one at its best time)", fontsize=8)
    _trainings(panels[1, 1], study, *_lines(study, "loss"))
    legend_below(figure, [panels[0, 0]])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _lines(study: Study, metric: str) -> tuple[list[Curve], dict[str, float]]:
    curves, levels = [], {}
    for method in ("base", *METHODS):
        budgets = [budget for budget in BUDGETS if (method, f"T{budget}") in study.outcomes]
        single = score(study, (method, "single"), metric) if (method, "single") in study.outcomes else None
        if budgets:
            estimates = [score(study, (method, f"T{budget}"), metric) for budget in budgets]
            curves.append(Curve(title(method), budgets, estimates, single))
        elif single is not None:
            levels[title(method)] = single.value
        elif (method, "plain") in study.outcomes:
            levels[title(method)] = score(study, (method, "plain"), metric).value
    return curves, levels


def _trainings(axes: Axes, study: Study, curves: list[Curve], levels: dict[str, float]) -> None:
    """Training losses, drawn like the scores of the same method."""
    looks: dict[str, dict[str, Any]] = {name: {"color": "black", "ls": ls} for name, ls in zip(levels, cycle(DASHES))}
    looks |= {curve.title: {"color": color} for curve, color in zip(curves, cycle(COLORS))}
    for method, losses in study.losses.items():
        width = min(SMOOTHED, len(losses))
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(width, len(losses) + 1), smooth, **looks.get(title(method), {"color": "gray"}))
    axes.set_title("training loss (L2D: at random times)", fontsize=10)
    axes.set_xlabel(f"step (mean of {SMOOTHED})", fontsize=8)
    axes.grid(alpha=0.3)
