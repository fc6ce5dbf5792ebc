"""What a parity run measures and prints.

- `TOLERANCES`: every tolerance, in one table
- `Recorder`: collects the comparisons of one case
- `table`, `failure_lines`, `summary_line`: the printed report
"""

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TOLERANCES: dict[str, float] = {
    # float32, largest absolute difference
    "base logits": 5e-5,
    "base hidden": 5e-5,
    "vocabulary table": 5e-5,
    "token embeddings": 5e-5,
    "clean estimate": 5e-5,
    "noised input": 5e-5,
    "time embedding": 5e-5,
    "modulation": 5e-5,
    "input projection": 5e-5,
    "forward logits": 5e-5,
    "velocity": 5e-5,
    "fixed-grid trajectory": 5e-5,
    "fixed-grid final logits": 5e-5,
    "adaptive trajectory": 2e-3,
    "adaptive final logits": 1e-3,
    "scheduled temperature": 1e-6,
    "adaptive scheduled temperature": 1e-2,
    "decode logits": 5e-5,
    "training input": 5e-5,
    "training logits": 5e-5,
    "training loss": 1e-5,
    # times are float32 numbers
    "times": 1e-6,
    # relative norm of the difference
    "gradient": 1e-4,
    "gradient norm": 1e-4,
    # norm of a gradient that must vanish, relative to the norm of all gradients
    "zero gradient": 1e-6,
}
"""Largest deviation that passes. Quantities that are not here (weights, tokens, counts) must be equal."""

_LISTED_PER_QUANTITY = 6


@dataclasses.dataclass
class Result:
    """One comparison: status is `ok`, `FAIL` or `skip`; deviation is `None` where nothing could be measured."""

    case: str
    quantity: str
    name: str
    status: str
    deviation: float | None = None
    tolerance: float | None = None
    message: str = ""


class Recorder:
    """Comparisons of one case; `only` keeps those whose quantity contains one of the given words."""

    def __init__(self, case: str, only: list[str] | None = None):
        self.case, self.only = case, [word.lower() for word in only or []]
        self.results: list[Result] = []

    def close(
        self,
        quantity: str,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        where: torch.Tensor | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Largest absolute difference; `where` (bool, the leading dimensions) selects what is compared."""
        tolerance = TOLERANCES[quantity] if tolerance is None else tolerance
        if (pair := self._pair(quantity, name, got, want, where)) is not None:
            difference = (pair[0].detach().double() - pair[1].double()).abs()
            self.measured(quantity, name, difference.max().item(), tolerance)

    def relative(self, quantity: str, name: str, got: torch.Tensor, want: torch.Tensor) -> None:
        """Norm of the difference over the norm of `want`."""
        if self._pair(quantity, name, got, want, None) is not None:
            want = want.double()
            deviation = (got.detach().double() - want).norm() / want.norm().clamp(min=1e-30)
            self.measured(quantity, name, deviation.item(), TOLERANCES[quantity])

    def same(
        self, quantity: str, name: str, got: torch.Tensor, want: torch.Tensor, where: torch.Tensor | None = None
    ) -> None:
        """Equality; the deviation is the number of entries that differ."""
        if (pair := self._pair(quantity, name, got, want, where)) is not None:
            differing, total = int((pair[0].detach() != pair[1]).sum()), pair[1].numel()
            self.measured(quantity, name, float(differing), 0.0, f"{differing} of {total} differ" if differing else "")

    def equal(self, quantity: str, name: str, got: Any, want: Any) -> None:
        """Equality of plain values."""
        self._add(quantity, name, "ok" if got == want else "FAIL", message="" if got == want else f"{got} not {want}")

    def measured(self, quantity: str, name: str, deviation: float, tolerance: float, message: str = "") -> None:
        """A deviation that was computed elsewhere; one that is not a number fails."""
        status = "ok" if deviation <= tolerance else "FAIL"
        self._add(quantity, name, status, deviation, tolerance, message)

    def fail(self, quantity: str, name: str, message: str) -> None:
        """A check that could not even be made."""
        self._add(quantity, name, "FAIL", message=message)

    def skip(self, quantity: str, name: str, reason: str) -> None:
        """A comparison that the fixture itself rules out; it counts neither as passed nor as failed."""
        self._add(quantity, name, "skip", message=reason)

    @contextlib.contextmanager
    def attempt(self, quantity: str, name: str) -> Iterator[None]:
        """Turn an exception of the body into a failed check."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  (whatever went wrong is the check's result)
            self.fail(quantity, name, _describe(error))

    def _pair(
        self, quantity: str, name: str, got: torch.Tensor, want: torch.Tensor, where: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What is to be compared, or `None` after a failure: other shapes, or nothing left to compare."""
        if tuple(got.shape) != tuple(want.shape):
            self.fail(quantity, name, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}")
            return None
        if where is not None:
            got, want = got[where], want[where]
        if not want.numel():
            self.fail(quantity, name, "nothing to compare: no entry is valid")
            return None
        return got, want

    def _add(
        self,
        quantity: str,
        name: str,
        status: str,
        deviation: float | None = None,
        tolerance: float | None = None,
        message: str = "",
    ) -> None:
        if not self.only or any(word in quantity.lower() for word in self.only):
            self.results.append(Result(self.case, quantity, name, status, deviation, tolerance, message))


def _describe(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return f"{type(error).__name__}: {text[:300]}{place}"


def table(results: list[Result]) -> list[str]:
    """One line per case and quantity, with the largest deviation: aligned columns under a heading."""
    rows = [("case", "quantity", "checks", "deviation", "tolerance", "", "largest at")]
    for group in _groups(results).values():
        worst = max(group, key=_severity)
        checked = sum(result.status != "skip" for result in group)
        rows.append(
            (
                worst.case,
                worst.quantity,
                str(checked),
                _number(worst.deviation),
                _number(worst.tolerance),
                worst.status,
                worst.name if worst.status != "skip" else f"{worst.name}: {worst.message}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    aligned = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in (2, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        aligned.append("  ".join([*cells, row[6]]).rstrip())
    return aligned


def failure_lines(results: list[Result]) -> list[str]:
    """Every failed and skipped comparison with its reason, the longest lists shortened."""
    lines = []
    for status, heading in (("skip", "Skipped:"), ("FAIL", "Failed:")):
        groups = _groups([result for result in results if result.status == status])
        if groups:
            lines += ["", heading]
        for group in groups.values():
            lines += [f"  {_sentence(result)}" for result in group[:_LISTED_PER_QUANTITY]]
            if len(group) > _LISTED_PER_QUANTITY:
                first = group[0]
                lines.append(f"  {first.case}: {first.quantity}: and {len(group) - _LISTED_PER_QUANTITY} more")
    return lines


def summary_line(results: list[Result]) -> str:
    """`N passed, M failed`."""
    counts = {status: sum(result.status == status for result in results) for status in ("ok", "FAIL")}
    return f"{counts['ok']} passed, {counts['FAIL']} failed"


def _groups(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.case, result.quantity), []).append(result)
    return groups


def _severity(result: Result) -> tuple[int, float]:
    """Order of results by how bad they are: failures without a number first, then by deviation over tolerance."""
    rank = {"skip": 0, "ok": 1, "FAIL": 2}[result.status]
    if result.deviation is None:
        return rank, math.inf if result.status == "FAIL" else -1.0
    if math.isnan(result.deviation):
        return rank, math.inf
    return rank, result.deviation / result.tolerance if result.tolerance else result.deviation


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}" if value else "0"


def _sentence(result: Result) -> str:
    text = f"{result.case}: {result.quantity}: {result.name}"
    if result.deviation is not None:
        text += f": deviation {_number(result.deviation)} exceeds {_number(result.tolerance)}"
    return f"{text}: {result.message}" if result.message else text
