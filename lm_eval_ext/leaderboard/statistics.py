"""The paired test: two scores per document, the same documents, clustered where documents belong together.

- `paired_test`: mean difference, standard error, t-test, wins, losses and ties
- `Paired`: its result

With one document per cluster it is the paired t-test; with clusters of one size it is the t-test on cluster means
(Miller 2024, "Adding Error Bars to Evals", section 3, gives both).
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Paired:
    """Scores of one setting minus another's on the same documents.

    difference, stderr: of the mean, in units of the score; p_value: two-sided, of "no difference" (`None` where it
    cannot be told: fewer than two clusters); wins, losses, ties: documents on which the score is higher, lower, equal;
    sign_p_value: exact binomial test on wins against losses (`None` with clusters: documents are not independent).
    """

    difference: float
    stderr: float | None
    p_value: float | None
    wins: int
    losses: int
    ties: int
    documents: int
    clusters: int
    sign_p_value: float | None


def paired_test(
    scores: Sequence[float], baseline: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Paired:
    """Test `scores` against `baseline`, both (N,), document by document; `clusters` (N,) names each one's group.

    Raises `ValueError` where nothing can be paired.
    """
    if len(scores) != len(baseline) or not len(scores):
        raise ValueError(f"scores has {len(scores)} and baseline {len(baseline)} documents: give the same, at least 1.")
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    names = range(len(differences)) if clusters is None else clusters
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(name, len(numbers)) for name in names])
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    count, groups = len(differences), len(numbers)
    mean = float(differences.mean())
    stderr = _clustered_error(differences - mean, member, groups)
    return Paired(
        difference=mean,
        stderr=stderr,
        p_value=_t_test(mean, stderr, groups - 1),
        wins=wins,
        losses=losses,
        ties=count - wins - losses,
        documents=count,
        clusters=groups,
        sign_p_value=_sign_test(wins, losses) if groups == count else None,
    )


def _clustered_error(residuals: np.ndarray, member: np.ndarray, groups: int) -> float | None:
    if groups < 2:
        return None
    sums = np.bincount(member, weights=residuals, minlength=groups)
    return math.sqrt(groups / (groups - 1) * float(sums @ sums)) / len(residuals)


def _t_test(mean: float, stderr: float | None, freedom: int) -> float | None:
    if stderr is None:
        return None
    if stderr < 1e-15:  # every document differs by the same amount
        return 1.0 if abs(mean) < 1e-15 else 0.0
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(mean) / stderr))


def _sign_test(wins: int, losses: int) -> float:
    if wins == losses:
        return 1.0
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(wins, losses), wins + losses, 0.5)))
