"""The settings of L2D in a sweep's file: the keys `base`, `points`, `trajectory` and `grid`.

- `read_points`: all of them, in this order, as points
"""

import itertools
from collections.abc import Iterator
from typing import Any

from l2d.sampler_config import FIXED_SOLVERS, budget_for_levels, levels_for_budget
from lm_eval_ext.arguments import BUDGET, UsageError, parse_arguments
from lm_eval_ext.sweep_controls import Point


def read_points(content: dict[str, Any], shared: dict[str, Any], grid: dict[str, Any]) -> list[Point]:
    """Points of a sweep's file; `UsageError` for what could not run.

    Args:
        shared: model args of every setting. grid: model args with their values, all combinations of which are points.
    """
    for key in ("base", "trajectory"):
        if not isinstance(content.get(key, False), bool):
            raise UsageError(f"{key}={content[key]!r} must be true or false.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"grid: {name}={values!r} must be a list of values.")
    named = content.get("points") or {}
    points = []
    if content.get("base"):
        unguided = {name: value for name, value in shared.items() if not name.startswith("guidance_")}
        points.append(Point("base", {**unguided, BUDGET: 1}))
    for name, chosen in named.items() if isinstance(named, dict) else [("", named)]:
        if not name or not isinstance(name, str) or "/" in name or not isinstance(chosen, dict):
            raise UsageError(f"points: {name}={chosen!r} must be a name without a slash and a mapping of model args.")
        points.append(Point(name, {**shared, **chosen}))
    if content.get("trajectory"):
        points += _trajectory(shared)
    if grid or not points:
        points += _grid(shared, grid)
    return points


def _grid(shared: dict[str, Any], grid: dict[str, list]) -> Iterator[Point]:
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        name = ",".join(f"{name}={str(value).replace('/', '_')}" for name, value in chosen.items())
        yield Point(name or "default", {**shared, **chosen})


def _trajectory(shared: dict[str, Any]) -> Iterator[Point]:
    """The trajectory of the shared model args, ended early at each of its inner time levels, as the release reports it:
    the first levels of the same grid, and the output read at the last of them.
    """
    sampler = parse_arguments(dict(shared)).sampler
    if sampler.solver not in FIXED_SOLVERS or sampler.is_base:
        raise UsageError(f"trajectory needs a fixed grid: set solver to one of {', '.join(FIXED_SOLVERS)}.")
    levels, span = levels_for_budget(sampler.solver, sampler.budget), sampler.final_time - sampler.start_time
    for count in range(2, levels):
        time = sampler.start_time + span * (count - 1) / (levels - 1)
        chosen = {BUDGET: budget_for_levels(sampler.solver, count), "final_time": time}
        yield Point(f"trajectory,t={time:.3g}", {**shared, **chosen})
