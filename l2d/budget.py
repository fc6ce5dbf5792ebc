"""Budget arithmetic: how many evaluations a solver spends, and which budgets it can meet.

- `FIXED_SOLVERS`, `ADAPTIVE_SOLVERS`: the solvers by name
- `budget_for_levels`, `levels_for_budget`: number of time levels <-> budget T
- `nearest_budgets`: the budgets around one that a solver cannot meet

A budget T counts every evaluation of the diffusion path, the last one (which reads the output) included. T = 1 is the
base model. With `n` time levels a solver of `s` stages spends `s (n - 1) + 1`; Euler spends `n`. No torch is imported.
"""

FIXED_SOLVERS: dict[str, int] = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
"""Fixed-grid solvers and their evaluations per grid step."""

ADAPTIVE_SOLVERS: tuple[str, ...] = ("adaptive_heun", "bosh3", "fehlberg2", "dopri5")
"""Solvers that choose the number of evaluations themselves."""


def stages(solver: str) -> int:
    """Evaluations per grid step of a fixed-grid solver; `ValueError` for any other name."""
    if solver not in FIXED_SOLVERS:
        raise ValueError(f"solver={solver!r} has no fixed grid; choose one of {', '.join(FIXED_SOLVERS)}.")
    return FIXED_SOLVERS[solver]


def budget_for_levels(solver: str, levels: int) -> int:
    """Budget T that `levels` time levels cost with a fixed-grid `solver`."""
    if levels < 1:
        raise ValueError(f"levels={levels} is not possible: a grid has at least 1 time level (the base model).")
    return stages(solver) * (levels - 1) + 1


def levels_for_budget(solver: str, budget: int) -> int:
    """Number of time levels that spend exactly `budget` evaluations.

    Raises `ValueError`, naming the nearest budgets that `solver` can meet, if there is none.
    """
    steps, rest = divmod(budget - 1, stages(solver))
    if rest or budget < 1:
        near = " or ".join(str(b) for b in nearest_budgets(solver, budget))
        raise ValueError(
            f"diffusion_budget={budget} cannot be met by solver={solver!r}, which spends "
            f"{_formula(solver)} evaluations on n time levels: use {near}."
        )
    return steps + 1


def nearest_budgets(solver: str, budget: int) -> list[int]:
    """The one or two budgets next to `budget` that a fixed-grid `solver` can meet, in rising order."""
    count = stages(solver)
    below = max(1, (budget - 1) // count * count + 1)
    return [below] if below >= budget else [below, below + count]


def _formula(solver: str) -> str:
    count = stages(solver)
    return "n" if count == 1 else f"{count}(n-1)+1"
