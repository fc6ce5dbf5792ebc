"""The demo's figure: accuracy against budget.

* `draw`: one panel per task and decoding; the budget curves of L2D with error bars, with a gate as an open mark; base,
  controls and finetuning as horizontal lines; error bars are 95 % intervals over problems
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from l2d.statistics import mean
from training.demo.plan import BUDGETS, CONTROLS, CURVES, DECODINGS, GATED, GATED_BUDGET, NAMES, TASKS
from training.demo.report import Demo, at, title

# Colours that the colour-blind tell apart (Okabe and Ito), and with each another mark or dash.
MARKS = dict(zip(CURVES, (("o-", "#0072b2"), ("s-", "#d55e00"), ("^-", "#f0b800")), strict=False))
LINES = {
    "base": ("#808080", (0, (1, 1))),
    **{CONTROLS[curve]: (color, (0, (8, 2))) for curve, (_, color) in MARKS.items()},
    "noise_free": ("#000000", (0, (6, 2, 1, 2))),
    "lora_sft": ("#009e73", (0, (3, 2))),
    "full_sft": ("#cc79a7", (0, (4, 1, 1, 1, 1, 1))),
}


def draw(demo: Demo, path: Path) -> None:
    """Writes the figure as PNG."""
    shape = (len(DECODINGS), len(TASKS))
    figure, panels = pyplot.subplots(*shape, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for line, decoding in zip(panels, DECODINGS, strict=True):
        for axes, task in zip(line, TASKS, strict=True):
            _panel(axes, demo, task, decoding)
            skill = "trained" if task == TASKS[0] else "the base's other skill"
            axes.set_title(f"{task.removeprefix('l2d_demo_')} ({skill}), {decoding}")
        line[0].set_ylabel("exact match, held-out problems")
    for axes in panels[-1]:
        axes.set_xlabel("budget T: evaluations per token")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axes: Axes, demo: Demo, task: str, decoding: str) -> None:
    for method, (mark, color) in MARKS.items():
        estimates = [mean(demo.answers[at(method, budget, decoding, task)].right) for budget in BUDGETS]
        values, ends = [one.value for one in estimates], [one.interval() or (one.value,) * 2 for one in estimates]
        bars = [[value - low for value, (low, _) in zip(values, ends, strict=True)],
                [high - value for value, (_, high) in zip(values, ends, strict=True)]]  # fmt: skip
        style: dict[str, Any] = {"capsize": 3, "markersize": 5, "elinewidth": 1.2}
        axes.errorbar(BUDGETS, values, bars, fmt=mark, color=color, label=NAMES[method], **style)
        gated = demo.share(at(GATED[method], GATED_BUDGET, decoding, task))
        axes.plot(GATED_BUDGET, gated, mark[0], color=color, mfc="white", ms=9, mew=1.8, label=NAMES[GATED[method]])
    for method, (color, dashes) in LINES.items():
        key = at(method, 2 if method in (*CONTROLS.values(), "noise_free") else 1, decoding, task)
        axes.axhline(demo.share(key), color=color, linestyle=dashes, linewidth=1.8, label=title(demo, method))
    axes.set_xscale("log", base=2)
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.minorticks_off()
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
