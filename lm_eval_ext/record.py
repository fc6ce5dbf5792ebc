"""How much compute a run spent, for the results file.

- `RunRecord`: evaluations asked and computed, and rounds, per generated or scored token
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

QUANTITIES = ("asked", "computed", "rounds")
Rows = Iterable[list[int]]


class RunRecord:
    """Counts per token: evaluations `asked` by the budget or the solver, evaluations `computed`, and `rounds` (batched
    passes through the diffusion path, one after the other).

    Values are kept as a histogram, so that mean, maximum and quantiles are exact and records of several processes add.
    """

    def __init__(self) -> None:
        self.generated_tokens = 0
        self.scored_tokens = 0
        self.capped_tokens = 0
        self.counts: dict[str, Counter[int]] = {name: Counter() for name in QUANTITIES}

    def add(self, asked: Rows, computed: Rows, rounds: Rows, generated: bool) -> None:
        """Add some tokens, generated or scored: one value of each quantity per token, in one list per row."""
        before = self.tokens
        for name, rows in zip(QUANTITIES, (asked, computed, rounds), strict=True):
            for row in rows:
                self.counts[name].update(row)
        if generated:
            self.generated_tokens += self.tokens - before
        else:
            self.scored_tokens += self.tokens - before

    def merge(self, other: "RunRecord") -> None:
        """Add the tokens of `other`, for example another process's."""
        self.generated_tokens += other.generated_tokens
        self.scored_tokens += other.scored_tokens
        self.capped_tokens += other.capped_tokens
        for name in QUANTITIES:
            self.counts[name].update(other.counts[name])

    @property
    def tokens(self) -> int:
        """Tokens recorded so far."""
        return self.counts["asked"].total()

    def summary(self) -> dict[str, Any]:
        """Totals as plain values: token counts, and mean, median, 95th percentile and maximum of each quantity."""
        totals = {name: getattr(self, name) for name in ("generated_tokens", "scored_tokens", "capped_tokens")}
        return totals | {f"{name}_per_token": _statistics(self.counts[name]) for name in QUANTITIES}


def _statistics(counts: Counter[int]) -> dict[str, float] | None:
    total = counts.total()
    if not total:
        return None
    mean = sum(value * count for value, count in counts.items()) / total
    return {
        "mean": mean,
        "median": _quantile(counts, 0.5),
        "p95": _quantile(counts, 0.95),
        "max": max(counts),
    }


def _quantile(counts: Counter[int], share: float) -> int:
    """Smallest value that at least `share` of the tokens do not exceed."""
    needed, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            break
    return value
