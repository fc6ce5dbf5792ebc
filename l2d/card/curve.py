"""The figure of accuracy against budget.

- `plot_budget_curve`: in one line, for a notebook, a file or a model card
"""

from typing import Any

from l2d.card.results import curves, read_results


def plot_budget_curve(results: Any, metric: str | None = None, axes: Any = None) -> Any:
    """Draw accuracy against budget, with one standard error; returns matplotlib's `Axes`.

    A setting that was measured at one budget only is a single mark; budget 1, the base, belongs to every curve of its
    task and metric.

    Args:
        results, metric: see `l2d.card.results.read_results`.
        axes: where to draw; default: the axes of a figure of its own.

    Raises `ValueError` where there is nothing to draw, or matplotlib is missing.
    """
    found = curves(read_results(results, metric))
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError(
            "plot_budget_curve needs matplotlib, which is not installed: pip install 'l2d[plot]'."
        ) from error
    if axes is None:
        _, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    budgets = sorted({point.budget for points in found.values() for point in points})
    for name, points in found.items():
        base = next(
            (p for n, ps in found.items() for p in ps if p.budget == 1 and n != name and _same(p, points)), None
        )
        if points[0].setting and base is not None:
            points = [base, *points]
        errors = [point.stderr or 0.0 for point in points]
        places, values = [point.budget for point in points], [point.value for point in points]
        axes.errorbar(places, values, errors, fmt="o-", capsize=3, markersize=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("budget T: evaluations per token (1 is the base)")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    if len(found) > 1:
        axes.legend(fontsize=8)
    else:
        axes.set_title(next(iter(found)), fontsize=10)
    return axes


def _same(point: Any, points: list[Any]) -> bool:
    return (point.task, point.metric, point.setting) == (points[0].task, points[0].metric, "") and points[0].budget > 1
