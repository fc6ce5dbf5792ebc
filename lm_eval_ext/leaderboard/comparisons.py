"""Paired comparisons: every row against its base, and every budget against each control.

- `compare_row`: fills in the comparisons of a row's cells
- `paired_scores`: what two cells have of the same documents
- `CONTROL_KINDS`: the kinds of rows that a budget is compared with
"""

import dataclasses

from l2d.statistics import Paired, paired
from lm_eval_ext.leaderboard.methods import Setting
from lm_eval_ext.leaderboard.protocol import differences
from lm_eval_ext.leaderboard.rows import Cell, Comparison, Row, by_document, same_model

CONTROL_KINDS = ("one-evaluation", "noise-free", "lora-ft", "full-ft")
_BUDGETS = ("l2d-lora", "l2d-full")


def compare_row(row: Row, rows: list[Row]) -> None:
    """Compare the scores of `row` with those of its base and, if it spends a budget, of each kind of control.

    Of several controls of a kind the one with the best score on the task is taken, as a strict control.
    """
    setting = row.setting
    if setting.kind == "base" or setting.base is None:
        return
    others = [other for other in rows if other is not row]
    bases = [other for other in others if _is_base_of(other.setting, setting)]
    for cell in row.cells.values():
        if comparison := _closest(cell, [other for other in bases if _measured(other, cell)], _base_rank):
            cell.comparisons["base"], row.base = comparison, row.base or comparison.row
            cell.base_reasons = comparison.reasons
        elif setting.kind != "l2d-base":  # which is its base, bit for bit
            cell.base_reasons = ["no result of the base with this decoding"]
        for kind in CONTROL_KINDS if setting.kind in _BUDGETS else ():
            controls = [other for other in others if _is_control_of(other.setting, setting, kind)]
            if comparison := _closest(cell, [other for other in controls if _measured(other, cell)], _control_rank):
                cell.comparisons[kind] = comparison


def _measured(other: Row, cell: Cell) -> bool:
    return cell.task in other.cells and other.cells[cell.task].decoding == cell.decoding


def _is_base_of(other: Setting, setting: Setting) -> bool:
    """Whether `other` is the base of `setting`: the model itself, or an L2D model on it at T = 1."""
    if setting.base is None:
        return False
    if other.kind == "l2d-base":
        return setting.kind != "l2d-base" and other.base is not None and same_model(other.base, setting.base)
    return other.kind in ("base", "lora-ft", "full-ft") and same_model(other.model, setting.base)


def _is_control_of(other: Setting, setting: Setting, kind: str) -> bool:
    """Whether `other` is a control of this kind: one evaluation of the same checkpoint, else one on the same base."""
    if other.kind != kind or other.base is None or setting.base is None:
        return False
    return same_model(other.base, setting.base) and (kind != "one-evaluation" or other.model == setting.model)


def _base_rank(other: Row, cell: Cell) -> tuple[float, ...]:
    return other.setting.kind != "base", other.number


def _control_rank(other: Row, cell: Cell) -> tuple[float, ...]:
    measure = other.cells[cell.task].measure
    return -measure.value if measure.higher_is_better else measure.value, other.number


def _closest(cell: Cell, candidates: list[Row], rank) -> Comparison | None:
    """Of `candidates` the one whose protocol differs least; of equal ones the first by `rank`."""
    if not candidates:
        return None
    reasons = {other.number: differences(cell.protocol, other.cells[cell.task].protocol) for other in candidates}
    other = min(candidates, key=lambda other: (len(reasons[other.number]), *rank(other, cell)))
    return _compare(cell, other, reasons[other.number])


def _compare(cell: Cell, other: Row, reasons: list[str]) -> Comparison:
    test = None if reasons else _pair(cell, other.cells[cell.task])
    if isinstance(test, str):
        return Comparison(other, [test], None)
    return Comparison(other, reasons, test)


def paired_scores(cell: Cell, other: Cell) -> tuple[list[float], list[float], list[str]]:
    """Scores of both on shared documents, and the clusters of these; empty where a score is not its documents' mean."""
    if cell.documents is None or other.documents is None:
        return [], [], []
    mine, theirs = by_document(cell.samples), by_document(other.samples)
    shared = [key for key in mine if key in theirs]
    first, second = ([samples[key].scores[cell.measure.metric] for key in shared] for samples in (mine, theirs))
    return first, second, [mine[key].cluster for key in shared]


def _pair(cell: Cell, other: Cell) -> Paired | str | None:
    """The test on the documents of both; words where it cannot be made, `None` where documents are not known."""
    if cell.samples and other.samples and (cell.documents is None or other.documents is None):
        return "the score is not the mean of its documents' scores"
    first, second, clusters = paired_scores(cell, other)
    if not first:
        return None
    bounds = (-1.0, 1.0) if all(0 <= score <= 1 for score in (*first, *second)) else None
    test = paired(first, second, clusters, bounds)
    return test if cell.measure.higher_is_better else dataclasses.replace(test, wins=test.losses, losses=test.wins)
