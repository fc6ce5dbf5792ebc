"""The board as Markdown, CSV and JSON, and the words that these share with the page.

- `markdown`: scores, comparisons, and what a reader must know with them
- `csv_text`: one line per setting, task and number
- `json_text`: everything, unrounded
- `missing_controls`, `score_text`, `p_text`, `judged`, `compared`, `reading`: the words
"""

import csv
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

from l2d.statistics import Estimate, shown, verdict
from lm_eval_ext.leaderboard import paper_table
from lm_eval_ext.leaderboard.board import GROUP_RULE, Board
from lm_eval_ext.leaderboard.comparisons import CONTROL_KINDS
from lm_eval_ext.leaderboard.methods import CONTROL_NAMES, KINDS
from lm_eval_ext.leaderboard.provenance import provenance
from lm_eval_ext.leaderboard.rows import Cell, Comparison, Row

AGAINST = {"base": "base"} | {kind: KINDS[kind].removeprefix("control: ") for kind in CONTROL_KINDS}
"""What a score is compared with, and what that is called."""


def relative(file: Path | str, out: Path) -> str:
    """`file` as seen from the folder `out`."""
    return Path(os.path.relpath(file, out)).as_posix()


def missing_controls(board: Board) -> list[str]:
    """One sentence per base of an L2D model: which controls of a budget curve are there, and which are not."""
    sentences = []
    for base, present in board.controls.items():
        missing = [name for kind, name in CONTROL_NAMES.items() if kind not in present]
        shown = [CONTROL_NAMES[kind] for kind in present]
        text = f"Controls for models on {Path(base).name}: {', '.join(shown) or 'none'} present; "
        text += f"missing: {', '.join(missing)}" if missing else "none missing"
        why = "; without them the curve over T does not tell whether its evaluations are what helps" if missing else ""
        sentences.append(f"{text}{why}.")
    return sentences


def score_text(score: Estimate) -> str:
    """A score with its standard error; with its interval where all documents agree."""
    text = f"{score.value:.3f}" if abs(score.value) < 100 else f"{score.value:.1f}"
    return shown(score) if score.stderr is None else f"{text} ± {score.stderr:.3f}"


def p_text(p_value: float | None) -> str:
    """`p = .012`, `p < .001`, or nothing."""
    return "" if p_value is None else "p < .001" if p_value < 0.001 else f"p = {p_value:.3f}".replace("0.", ".")


def judged(cell: Cell, comparison: Comparison, margin: float | None) -> str:
    """`better`, `worse`, `equal within MARGIN` or `not told apart`; empty where nothing was tested."""
    if comparison.paired is None:
        return ""
    return verdict(comparison.paired, margin, cell.measure.higher_is_better)


def compared(board: Board) -> dict[str, str]:
    """Of `AGAINST`, what this report holds tests against."""
    kinds = {kind for _, _, kind, comparison in board.comparisons() if comparison.paired}
    return {kind: name for kind, name in AGAINST.items() if kind in kinds}


def reading(board: Board) -> list[str]:
    """How scores, differences, p-values and averages are to be read."""
    sentences = [
        "Scores are ± one standard error, or with a 95 % interval (Wilson) where all documents agree; errors are over "
        "clusters where documents are grouped.",
        "Differences are means over the same documents with a 95 % interval and a two-sided p-value: paired t-test "
        "over documents or clusters, exact sign test where all differ alike. Better and worse mean p < .05.",
        f"p-values are not corrected for {board.tests} tests. A difference that was not told apart from 0 is not "
        "shown to be 0.",
        "Of several controls of a kind the one with the best score on the task is compared with.",
    ]
    sentences += [f"Equal within {board.margin:g}: two one-sided tests at 5 %."] if board.margin else []
    return sentences + ([GROUP_RULE] if board.groups else [])


# ---- Markdown ----------------------------------------------------------------------------------------------------


def markdown(board: Board, out: Path) -> str:
    """`leaderboard.md`: scores ± standard errors, comparisons, notes."""
    header = ["#", "setting", "decoding", "trained", "evaluations / token", "tokens / s"]
    header += [_plain(f"{task} ({board.usual[task]['measure']})") for task in board.tasks]
    header += [f"mean: {group}" for group in board.groups]
    lines = ["# Leaderboard", "", *_table(header, [_cells(row, board, out) for row in board.rows])]
    lines += ["", "≠ marks scores that are not comparable with the rest of their column.", ""]
    lines += [f"- {sentence}" for sentence in [*reading(board), *missing_controls(board)]]
    for row in board.rows:
        for task, cell in row.cells.items():
            reasons = cell.reasons + [f"against its base: {reason}" for reason in cell.base_reasons]
            if reasons:
                lines.append(f"- #{row.number}, {_plain(task)}: {_plain('; '.join(dict.fromkeys(reasons)))}")
    if board.paper:
        table = [[_plain(text) for text in paper_table.cells(row)] for row in board.paper]
        lines += ["", "## The paper's table", "", *_table(paper_table.header(), table), ""]
        lines += [f"- {_plain(note)}" for note in paper_table.notes(board.paper)]
    if board.tests:
        lines += ["", "## Paired differences", "", *_comparison_table(board)]
    if board.skipped:
        lines += ["", "## Left out", ""]
        lines += [f"- `{_plain(relative(s.file, out))}` {_plain(s.part)}: {_plain(s.reason)}" for s in board.skipped]
    return "\n".join(lines) + "\n"


def _comparison_table(board: Board) -> list[str]:
    lines, against = [], compared(board)
    for row in board.rows:
        for task, cell in row.cells.items():
            tests = [_comparison(cell, cell.comparisons.get(kind), board.margin) for kind in against]
            if any(tests):
                lines.append([str(row.number), _plain(row.setting.label), _plain(f"{task}, {cell.decoding}"), *tests])
    return _table(["#", "setting", "task", *(f"against {name}" for name in against.values())], lines)


def _comparison(cell: Cell, comparison: Comparison | None, margin: float | None) -> str:
    if comparison is None or comparison.paired is None:
        return ""
    test, words = comparison.paired, judged(cell, comparison, margin)
    counts = f"{test.wins} better, {test.losses} worse, {test.ties} equal"
    text = ", ".join(filter(None, (shown(test, signed=True), p_text(test.p_value), words)))
    return f"{text} (#{comparison.row.number})<br>{counts}"


def _cells(row: Row, board: Board, out: Path) -> list[str]:
    s = row.setting
    cost, speed = s.cost.get("nfe_computed") or {}, s.tokens_per_second
    texts = [str(row.number), f"{_plain(s.label)} ({_plain(s.name)})", _plain(s.decoding)]
    texts.append("" if s.trained is None else f"{s.trained:,}")
    texts.append(f"{cost['mean']:.1f}, p95 {cost['p95']}" if cost.get("mean") is not None else "")
    texts.append("" if speed is None else f"{speed:.1f}")
    for task in board.tasks:
        cell = row.cells.get(task)
        mark = "" if cell is None or cell.comparable else " ≠"
        texts.append("" if cell is None else f"[{score_text(cell.score)}](<{relative(cell.run.file, out)}>){mark}")
    return texts + [score_text(row.averages[group][0]) if group in row.averages else "" for group in board.groups]


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *lines]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "'").replace("\n", " ")


# ---- CSV and JSON ------------------------------------------------------------------------------------------------


def csv_text(board: Board, out: Path) -> str:
    """`leaderboard.csv`: one line per setting, task and number; empty where unknown."""
    stream = io.StringIO()
    writer = None
    for row in board.rows:
        for task, cell in row.cells.items():
            for measure in [cell.measure, *cell.others]:
                record = _record(row, task, cell, measure, out)
                if writer is None:
                    writer = csv.DictWriter(stream, list(record), lineterminator="\n")
                    writer.writeheader()
                writer.writerow({name: _harmless(value) for name, value in record.items()})
    return stream.getvalue()


def _record(row: Row, task: str, cell: Cell, measure: Any, out: Path) -> dict[str, Any]:
    s, cost = row.setting, row.setting.cost.get("nfe_computed") or {}
    first = measure is cell.measure
    record = {
        **{"row": row.number, "method": KINDS[s.kind], "model": s.model, "base": s.base, "budget": s.budget},
        **{"solver": s.solver, "guidance": s.guidance, "final_time": s.final_time, "decoding": s.decoding},
        **{"seed": s.seed, "trained_parameters": s.trained, "evaluations_per_token": cost.get("mean")},
        **{"evaluations_per_token_p95": cost.get("p95"), "tokens": s.tokens, "seconds": s.seconds, "task": task},
        **{"metric": measure.metric, "filter": measure.filter, "value": measure.value},
        **{"stderr": cell.score.stderr if first else measure.stderr, "n": cell.protocol["n"]},
        **{"shots": cell.protocol["shots"], "version": cell.protocol["version"], "comparable": cell.comparable},
        "reasons": "; ".join([*cell.reasons, *cell.base_reasons]),
    }
    for kind, name in AGAINST.items():
        comparison = cell.comparisons.get(kind) if first else None
        test = comparison.paired.record() if comparison and comparison.paired else {}
        for part in ("value", "stderr", "low", "high", "p_value", "wins", "losses", "ties", "units"):
            record[f"against {name}: {part}"] = test.get(part)
    return record | {"file": relative(cell.run.file, out)}


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "@", "-", "\t") else value


def json_text(board: Board, out: Path) -> str:
    """`leaderboard.json`: rows with settings, scores, tests, averages and provenance; what was left out and why."""
    rows = []
    for row in board.rows:
        rows.append(
            {
                "number": row.number,
                "label": row.setting.label,
                "setting": dataclasses.asdict(row.setting),
                "base": row.base.number if row.base else None,
                "scores": {task: _score_record(cell, out, board.margin) for task, cell in row.cells.items()},
                "averages": {group: _average_record(*means) for group, means in row.averages.items()},
                "provenance": [provenance(run, out) for run in row.runs],
            }
        )
    content = {
        "rows": rows,
        "tasks": {task: board.usual[task] for task in board.tasks},
        "groups": board.groups,
        "group_rule": GROUP_RULE,
        "controls": board.controls,
        "tests": board.tests,
        "margin": board.margin,
        "paper_table": paper_table.records(board.paper),
        "left_out": [{**dataclasses.asdict(s), "file": relative(s.file, out)} for s in board.skipped],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"


def _average_record(score: Estimate, difference: Estimate | None) -> dict[str, Any]:
    return {**score.record(), "difference": difference.record() if difference else None}


def _score_record(cell: Cell, out: Path, margin: float | None) -> dict[str, Any]:
    low, high = cell.score.interval() or (None, None)
    comparisons = {
        kind: {
            **(comparison.paired.record() if comparison.paired else {}),
            **{"row": comparison.row.number, "verdict": judged(cell, comparison, margin)},
            "not_comparable": comparison.reasons,
        }
        for kind, comparison in cell.comparisons.items()
    }
    return {
        **dataclasses.asdict(cell.measure),
        **{"stderr": cell.score.stderr, "low": low, "high": high, "units": cell.score.units},
        "others": [dataclasses.asdict(measure) for measure in cell.others],
        "protocol": cell.protocol,
        "not_comparable": cell.reasons,
        "not_comparable_with_base": cell.base_reasons,
        "against": comparisons,
        "file": relative(cell.run.file, out),
        "samples": [
            relative(cell.run.samples[leaf], out) for leaf in cell.run.leaves[cell.task] if leaf in cell.run.samples
        ],
    }
