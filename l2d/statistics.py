"""Standard errors, paired differences, intervals and verdicts: every figure with an error in this project is made here.

- `mean`, `ratio`: of a sample, with clusters where its values are not independent
- `paired`: the difference of two settings on the same documents; `sign_test`: wins against losses
- `over_trainings`: several trainings, with the error over problems and the error over trainings
- `average`, `independent_average`: the mean of several tasks, which share documents or do not
- `holm`: p-values of several tests, corrected for their number
- `wilson`: interval of a share; `verdict`, `shown`: a result in words

Every result is an `Estimate`: value, standard error, interval, p-value and test of equality. Standard errors with
clusters are those of Miller 2024, "Adding Error Bars to Evals", section 2.2, with the factor G / (G - 1) for G
clusters; quantiles are Student's with G - 1 degrees of freedom. A value is a cluster of its own where none are named.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import bdtr, ndtri, stdtr, stdtrit

ALPHA = 0.05
"""Of every test; intervals hold 1 - ALPHA."""
_ROUNDING = 1e-12  # spread relative to the values below which all of them count as equal

Values = Sequence[float] | np.ndarray
Clusters = Sequence[Hashable] | None
Bounds = tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean or a difference with what is known of its error.

    value: in units of the score. units: independent clusters (values, where none were named).
    stderr: `None` below two units, and where all units agree: their spread then says nothing.
    bounds: the range of single values, from which an interval follows where all units agree; `None` for no range.
    """

    value: float
    stderr: float | None
    units: int
    bounds: Bounds = None

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float] | None:
        """The two-sided interval at `level`; `None` where nothing is known of the error.

        Student's t; where all units agree, at most the share of units that Wilson's interval leaves may differ, by the
        whole range: for a share of 0 or 1 this is Wilson's interval.
        """
        if self.units < 2:
            return None
        if self.stderr is not None:
            reach = float(stdtrit(self.units - 1, (1 + level) / 2)) * self.stderr
            return self.value - reach, self.value + reach
        if self.bounds is None or not self.bounds[0] <= self.value <= self.bounds[1]:
            return None
        agreeing = wilson(self.units, self.units, level)[0]
        low, high = (agreeing * self.value + (1 - agreeing) * bound for bound in self.bounds)
        return low, high

    @property
    def p_value(self) -> float | None:
        """Two-sided, of "the true value is 0": t-test; exact sign test over units where all agree."""
        if self.units < 2:
            return None
        if self.stderr is None:
            return sign_test(self.units if self.value else 0, 0)
        return float(2 * stdtr(self.units - 1, -abs(self.value) / self.stderr))

    def equal_within(self, margin: float) -> bool:
        """Whether two one-sided tests at `ALPHA` (TOST) both reject a true value of `margin` or more either way.

        Raises `ValueError` for a margin that is not positive.
        """
        if not margin > 0:
            raise ValueError(
                f"margin must be positive, not {margin}: it is the largest difference that does not matter."
            )
        interval = self.interval(1 - 2 * ALPHA)
        return interval is not None and -margin < interval[0] and interval[1] < margin

    def record(self) -> dict[str, Any]:
        """Plain values for JSON: value, stderr, low, high, p_value, units."""
        low, high = self.interval() or (None, None)
        return {
            **{"value": self.value, "stderr": self.stderr, "low": low, "high": high},
            **{"p_value": self.p_value, "units": self.units},
        }


@dataclasses.dataclass(frozen=True)
class Paired(Estimate):
    """Scores of one setting minus another's on the same documents.

    wins, losses, ties: documents on which the score is higher, lower, equal; clustered: whether documents share units.
    """

    wins: int = 0
    losses: int = 0
    ties: int = 0
    clustered: bool = False

    @property
    def documents(self) -> int:
        """How many were paired."""
        return self.wins + self.losses + self.ties

    @property
    def sign_p_value(self) -> float | None:
        """Exact binomial test on wins against losses; `None` where documents are not independent."""
        return None if self.clustered else sign_test(self.wins, self.losses)

    def record(self) -> dict[str, Any]:
        """As `Estimate.record`, with the counts."""
        counts = {name: getattr(self, name) for name in ("wins", "losses", "ties", "documents", "sign_p_value")}
        return super().record() | counts


class Trainings(NamedTuple):
    """The mean of several trainings: `problems` has the error over problems, `trainings` that over trainings."""

    problems: Estimate
    trainings: Estimate


# ---- one sample --------------------------------------------------------------------------------------------------


def mean(values: Values, clusters: Clusters = None, bounds: Bounds = (0.0, 1.0)) -> Estimate:
    """Mean of `values` (N,), with `clusters` (N,) naming each one's group; `bounds` of single values, if any.

    Raises `ValueError` where there is no value, one is not finite, or the lengths differ.
    """
    return ratio(values, np.ones(len(values)), clusters, bounds)


def ratio(sums: Values, counts: Values, clusters: Clusters = None, bounds: Bounds = None) -> Estimate:
    """Sum of `sums` (N,) over sum of `counts` (N,): a mean per token, say, with the error over documents.

    Raises `ValueError` where there is no value, one is not finite, the counts sum to 0, or the lengths differ.
    """
    top, bottom = _checked("sums", sums), _checked("counts", counts)
    if len(top) != len(bottom) or not bottom.sum() > 0:
        raise ValueError(f"counts must be {len(top)} numbers with a positive sum: one for each value.")
    value = float(top.sum() / bottom.sum())
    residuals = _by_cluster(top - value * bottom, clusters)
    units = len(residuals)
    spread = math.sqrt(float(residuals @ residuals) * units / max(units - 1, 1))
    known = units > 1 and spread > _ROUNDING * float(np.abs(top).sum())
    return Estimate(value, spread / float(bottom.sum()) if known else None, units, bounds)


def _checked(name: str, values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a list of at least one finite number.")
    return array


def _by_cluster(values: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Sums of `values` (N,) over the values of one cluster."""
    if clusters is None:
        return values
    if len(clusters) != len(values):
        raise ValueError(f"clusters names {len(clusters)} groups for {len(values)} values: name one for each.")
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    return np.bincount(member, weights=values)


def wilson(successes: int, trials: int, level: float = 1 - ALPHA) -> tuple[float, float]:
    """Wilson's interval of a share. Raises `ValueError` unless 0 <= successes <= trials and trials > 0."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes must be from 0 to trials, and trials at least 1, not {successes} of {trials}.")
    z2, share = float(ndtri((1 + level) / 2)) ** 2, successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return max(0.0, centre - reach), min(1.0, centre + reach)


# ---- two settings on the same documents --------------------------------------------------------------------------


def paired(first: Values, second: Values, clusters: Clusters = None, bounds: Bounds = (-1.0, 1.0)) -> Paired:
    """`first` minus `second`, both (N,), document by document; `bounds` of single differences, if any.

    The error is the standard deviation of the differences over the square root of N, or its clustered form.
    Raises `ValueError` where nothing can be paired.
    """
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} and second {len(second)} values: give the same documents.")
    differences = _checked("first", first) - _checked("second", second)
    estimate = mean(differences, clusters, bounds)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return Paired(
        **vars(estimate),
        wins=wins,
        losses=losses,
        ties=len(differences) - wins - losses,
        clustered=estimate.units < len(differences),
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact binomial test that wins and losses are equally likely."""
    if wins == losses:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))


# ---- several trainings, several tasks ----------------------------------------------------------------------------


def over_trainings(runs: Sequence[Values], bounds: Bounds = (0.0, 1.0)) -> Trainings:
    """Mean of R trainings on the same N problems, `runs` (R, N); for a difference give differences per problem.

    Over problems, the mean over trainings of each problem is one value; over trainings, the mean of each training is.
    Raises `ValueError` where there is no training or they have different numbers of problems.
    """
    if not len(runs) or len({len(run) for run in runs}) > 1:
        raise ValueError("runs must hold at least one training, all of them on the same problems.")
    table = np.asarray(runs, dtype=np.float64)
    return Trainings(mean(table.mean(0), bounds=bounds), mean(table.mean(1), bounds=None))


def average(tasks: Sequence[tuple[Values, Clusters]]) -> Estimate:
    """Unweighted mean of the means of K tasks, each with values (N,) and clusters (N,) or `None`.

    Clusters of one name in several tasks are one cluster, so that tasks may share documents; `None` shares with
    nothing. Without sharing this is `independent_average`. Units, and so the degrees of freedom, are those of the task
    with the fewest, which is on the careful side. Raises `ValueError` as `mean`, and where there is no task.
    """
    if not tasks:
        raise ValueError("tasks must hold at least one task.")
    estimates = [mean(values, clusters, bounds=None) for values, clusters in tasks]
    units = min(estimate.units for estimate in estimates)
    sums: dict[Hashable, float] = {}
    for number, ((values, clusters), estimate) in enumerate(zip(tasks, estimates, strict=True)):
        scale = math.sqrt(estimate.units / max(estimate.units - 1, 1)) / len(values)
        names = [(number, i) for i in range(len(values))] if clusters is None else clusters
        for name, value in zip(names, values, strict=True):
            sums[name] = sums.get(name, 0.0) + scale * (float(value) - estimate.value)
    error = math.sqrt(math.fsum(value**2 for value in sums.values()))
    size = math.fsum(float(np.abs(np.asarray(values)).mean()) for values, _ in tasks)
    known = units > 1 and error > _ROUNDING * size
    value = math.fsum(estimate.value for estimate in estimates) / len(tasks)
    return Estimate(value, error / len(tasks) if known else None, units)


def independent_average(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of estimates that share no documents; no error where that of one of them is not known."""
    value = math.fsum(estimate.value for estimate in estimates) / len(estimates)
    errors = [estimate.stderr for estimate in estimates if estimate.stderr is not None]
    known = len(errors) == len(estimates)
    error = math.sqrt(math.fsum(error**2 for error in errors)) / len(estimates) if known else None
    return Estimate(value, error, min(estimate.units for estimate in estimates))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of several tests: adjusted p-values, of which all below alpha hold together at level alpha.

    `None`, an unknown p-value, stays `None` and is not counted.
    """
    known = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, number) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[number] = highest
    return adjusted


# ---- words -------------------------------------------------------------------------------------------------------


def verdict(
    difference: Estimate,
    margin: float | None = None,
    higher_is_better: bool = True,
    corrected: float | None = None,
) -> str:
    """ "better", "worse", "equal within MARGIN" (two one-sided tests; only if a margin is given) or "not told apart".

    Better and worse need p < `ALPHA`. No verdict is corrected for the number of verdicts: say how many there are, or
    give the p-value that `holm` corrected.
    """
    p_value = difference.p_value if corrected is None else corrected
    if p_value is not None and p_value < ALPHA:
        return "better" if (difference.value > 0) == higher_is_better else "worse"
    if margin is not None and difference.equal_within(margin):
        return f"equal within {margin:g}"
    return "not told apart"


def shown(estimate: Estimate, digits: int = 3, signed: bool = False, limits: Bounds = None) -> str:
    """`0.512 [0.480, 0.544]`: the value and its 95 % interval, if there is one, as far as it is within `limits`."""
    sign, interval = "+" if signed else "", estimate.interval()
    text = f"{estimate.value:{sign}.{digits}f}"
    if interval is None:
        return text
    lowest, highest = limits or (-math.inf, math.inf)
    return f"{text} [{', '.join(f'{min(max(end, lowest), highest):{sign}.{digits}f}' for end in interval)}]"
