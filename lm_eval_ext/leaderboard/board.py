"""Everything that the report says, before it is drawn: rows, comparability, comparisons, averages, controls.

- `build_board`: from runs to a `Board`
- `group_rule`, `group_of`: which tasks are averaged together
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from l2d.statistics import Estimate, average, independent_average
from lm_eval_ext.leaderboard.comparisons import compare_row, paired_scores
from lm_eval_ext.leaderboard.files import Run, Skipped
from lm_eval_ext.leaderboard.methods import CONTROLS
from lm_eval_ext.leaderboard.paper_table import PaperRow, paper_rows
from lm_eval_ext.leaderboard.protocol import differences, usual_protocol
from lm_eval_ext.leaderboard.rows import Cell, Comparison, Row, build_rows, same_model

_GROUPS = {
    "math": r"gsm|math|aime|asdiv|svamp|mawps|arithmetic|amc\d|l2d_demo",
    "coding": r"humaneval|mbpp|code|apps|bigcodebench",
    "general knowledge": r"mmlu|arc_|agieval|bbh|triviaqa|nq_open|hellaswag|truthfulqa|gpqa|sciq|openbookqa|piqa|boolq",
}
GROUPS = (*_GROUPS, "all")
_GROUP_ORDER = (*_GROUPS, "other")
GROUP_RULE = (
    "An average is the unweighted mean over all tasks of the group that this report holds (scores from 0 to 1 of which "
    "more is better, under the usual protocol of the table); a row that lacks one of them, or has it under another "
    "protocol, gets no average. Its standard error counts a document, or cluster, that several tasks share once; where "
    "samples are missing it takes tasks as independent."
)


@dataclasses.dataclass
class Board:
    """All rows, the tasks and groups that are columns, what was skipped, and which controls are missing.

    controls: by base, kinds of controls that are present; usual: by task, the protocol most rows share.
    margin: differences below it do not matter, `None` where nobody said so. paper: rows of the paper's table.
    """

    rows: list[Row]
    tasks: list[str]
    groups: dict[str, list[str]]
    skipped: list[Skipped]
    controls: dict[str, list[str]]
    usual: dict[str, dict[str, Any]]
    margin: float | None = None
    paper: list[PaperRow] = dataclasses.field(default_factory=list)

    def comparisons(self) -> Iterator[tuple[Row, Cell, str, Comparison]]:
        """Every comparison, by row, task and what it is with ("base" or a kind of control)."""
        for row in self.rows:
            for task in self.tasks:
                if cell := row.cells.get(task):
                    yield from ((row, cell, kind, comparison) for kind, comparison in cell.comparisons.items())

    @property
    def tests(self) -> int:
        """How many p-values the report holds."""
        return sum(c.paired is not None and c.paired.p_value is not None for *_, c in self.comparisons())


def build_board(
    runs: list[Run],
    skipped: list[Skipped],
    metrics: dict[str, str] | None = None,
    cluster_fields: tuple[str, ...] = (),
    margin: float | None = None,
) -> Board:
    """Put `runs` into rows, compare each with its base and its controls, average.

    Args:
        skipped: what reading left out; what turns out to be unusable here is added.
        metrics: by task, the `metric,filter` to show in place of the first one in the results file.
        cluster_fields: names of document fields whose equal values group documents.
        margin: the largest difference that does not matter, for "equal within".
    """
    rows = build_rows(runs, skipped, metrics or {}, cluster_fields)
    tasks = sorted(
        {task for row in rows for task in row.cells}, key=lambda task: (_GROUP_ORDER.index(group_of(task)), task)
    )
    usual = {}
    for task in tasks:
        usual[task] = usual_protocol([row.cells[task].protocol for row in rows if task in row.cells])
        for row in rows:
            if task in row.cells:
                row.cells[task].reasons = differences(row.cells[task].protocol, usual[task], one_model=False)
    for row in rows:
        compare_row(row, rows)
    groups = _group_tasks(rows, tasks)
    for row in rows:
        row.averages = {group: means for group in groups if (means := _average(row, groups[group]))}
    return Board(rows, tasks, groups, skipped, _controls(rows), usual, margin, paper_rows(runs))


def group_of(task: str) -> str:
    """The group that a task's name puts it in, "other" for unknown ones."""
    return next((group for group, pattern in _GROUPS.items() if re.search(pattern, task)), "other")


def _group_tasks(rows: list[Row], tasks: list[str]) -> dict[str, list[str]]:
    """By group, the tasks that are averaged; only groups with at least two, so that an average says something new."""
    fit = []
    for task in tasks:
        measures = [row.cells[task].measure for row in rows if task in row.cells and row.cells[task].comparable]
        if measures and all(measure.higher_is_better and 0 <= measure.value <= 1 for measure in measures):
            fit.append(task)
    groups = {group: [task for task in fit if group in ("all", group_of(task))] for group in GROUPS}
    groups = {group: members for group, members in groups.items() if len(members) > 1}
    same_as_all = [group for group in groups if group != "all" and groups[group] == groups.get("all")]
    return {group: members for group, members in groups.items() if not (same_as_all and group == "all")}


def _average(row: Row, tasks: list[str]) -> tuple[Estimate, Estimate | None] | None:
    """The mean over `tasks`, and its difference to the same mean of the base where every task is paired."""
    cells = [row.cells[task] for task in tasks if task in row.cells and row.cells[task].comparable]
    if len(cells) < len(tasks):
        return None
    known = [cell.documents for cell in cells if cell.documents is not None]
    if len(known) == len(cells):
        score = average(known)
    else:
        score = independent_average([cell.score for cell in cells])
    if any(cell.paired is None for cell in cells):
        return score, None
    pairs = [paired_scores(cell, cell.comparisons["base"].row.cells[cell.task]) for cell in cells]
    return score, average(
        [([a - b for a, b in zip(first, second, strict=True)], clusters) for first, second, clusters in pairs]
    )


def _controls(rows: list[Row]) -> dict[str, list[str]]:
    """By base of an L2D model, which of the controls are among the rows."""
    controls: dict[str, list[str]] = {}
    for row in rows:
        if row.setting.kind.startswith("l2d-") and row.setting.kind != "l2d-base" and row.setting.base:
            controls.setdefault(row.setting.base, [])
    for base, present in controls.items():
        kinds = {row.setting.kind for row in rows if row.setting.base and same_model(row.setting.base, base)}
        present += [kind for kind in CONTROLS if kind in kinds]
    return controls
