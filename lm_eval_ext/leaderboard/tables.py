"""The board as Markdown, CSV and JSON.

- `markdown`: one table, and what a reader must know with it
- `csv_text`: one line per setting, task and number
- `json_text`: everything, unrounded
"""

import csv
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

from lm_eval_ext.leaderboard.board import GROUP_RULE, Board, Cell, Row
from lm_eval_ext.leaderboard.methods import CONTROL_NAMES, KINDS
from lm_eval_ext.leaderboard.provenance import provenance


def relative(file: Path | str, out: Path) -> str:
    """`file` as seen from the folder `out`."""
    return Path(os.path.relpath(file, out)).as_posix()


def missing_controls(board: Board) -> list[str]:
    """One sentence per base of an L2D model: which controls of a budget curve are there, and which are not."""
    sentences = []
    for base, present in board.controls.items():
        missing = [name for kind, name in CONTROL_NAMES.items() if kind not in present]
        shown = [CONTROL_NAMES[kind] for kind in present]
        text = f"Controls for {Path(base).name}: {', '.join(shown) or 'none'} present; "
        text += f"missing: {', '.join(missing)}" if missing else "none missing"
        why = "; without them the curve over T does not tell whether its evaluations are what helps" if missing else ""
        sentences.append(f"{text}{why}.")
    return sentences


def difference_text(cell: Cell) -> str:
    """Difference to the base with its standard error and p-value, or why there is none."""
    if cell.paired is None:
        return ""
    pair = cell.paired
    error = "" if pair.stderr is None else f" ± {pair.stderr:.3f}"
    p_value = "" if pair.p_value is None else ", p < .001" if pair.p_value < 0.001 else f", p = {pair.p_value:.3f}"
    return f"{pair.difference:+.3f}{error}{p_value}"


# ---- Markdown ----------------------------------------------------------------------------------------------------


def markdown(board: Board, out: Path) -> str:
    """`leaderboard.md`: scores ± standard errors, differences to the base, notes."""
    header = ["#", "setting", "decoding", "trained", "evaluations / token", "tokens / s"]
    header += [_plain(f"{task} ({board.usual[task]['measure']})") for task in board.tasks] + [
        f"mean: {g}" for g in board.groups
    ]
    lines = ["# Leaderboard", "", _line(header), _line(["---"] * len(header))]
    lines += [_line(_cells(row, board, out)) for row in board.rows]
    lines += [
        "",
        "Score ± standard error; below it the difference to the row's base: mean ± standard error of the paired",
    ]
    lines += [
        "differences on the same documents, two-sided t-test (clustered where documents are grouped). ≠ marks scores"
    ]
    lines += ["that are not comparable with the rest of their column.", "", GROUP_RULE, ""]
    lines += [f"- {sentence}" for sentence in missing_controls(board)]
    for row in board.rows:
        for task, cell in row.cells.items():
            reasons = cell.reasons + [f"against its base: {reason}" for reason in cell.base_reasons]
            if reasons:
                lines.append(f"- #{row.number}, {_plain(task)}: {_plain('; '.join(dict.fromkeys(reasons)))}")
    if board.skipped:
        lines += ["", "## Left out", ""]
        lines += [f"- `{_plain(relative(s.file, out))}` {_plain(s.part)}: {_plain(s.reason)}" for s in board.skipped]
    return "\n".join(lines) + "\n"


def _cells(row: Row, board: Board, out: Path) -> list[str]:
    s = row.setting
    cost, speed = s.cost.get("nfe_computed") or {}, s.tokens / s.seconds if s.tokens and s.seconds else None
    texts = [str(row.number), f"{_plain(s.label)} ({_plain(s.name)})", _plain(s.decoding)]
    texts.append("" if s.trained is None else f"{s.trained:,}")
    texts.append(f"{cost['mean']:.1f}, p95 {cost['p95']}" if cost.get("mean") is not None else "")
    texts.append("" if speed is None else f"{speed:.1f}")
    for task in board.tasks:
        texts.append(_score(row.cells[task], out) if task in row.cells else "")
    for group in board.groups:
        average = row.averages.get(group)
        error = "" if average is None or average.stderr is None else f" ± {average.stderr:.3f}"
        texts.append("" if average is None else f"{average.value:.3f}{error}")
    return texts


def _score(cell: Cell, out: Path) -> str:
    error = "" if cell.measure.stderr is None else f" ± {cell.measure.stderr:.3f}"
    mark = "" if cell.comparable else " ≠"
    text = f"[{cell.measure.value:.3f}](<{relative(cell.run.file, out)}>){error}{mark}"
    return f"{text}<br>{difference_text(cell)}" if cell.paired else text


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


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
    pair = cell.paired if measure is cell.measure else None
    paired = {
        name: getattr(pair, name, None) for name in ("difference", "p_value", "wins", "losses", "ties", "clusters")
    }
    return {
        "row": row.number,
        "method": KINDS[s.kind],
        "model": s.model,
        "base": s.base,
        "budget": s.budget,
        "solver": s.solver,
        "guidance": s.guidance,
        "votes": s.votes,
        "final_time": s.final_time,
        "decoding": s.decoding,
        "seed": s.seed,
        "trained_parameters": s.trained,
        "evaluations_per_token": cost.get("mean"),
        "evaluations_per_token_p95": cost.get("p95"),
        "tokens": s.tokens,
        "seconds": s.seconds,
        "task": task,
        "metric": measure.metric,
        "filter": measure.filter,
        "value": measure.value,
        "stderr": measure.stderr,
        "n": cell.protocol["n"],
        "shots": cell.protocol["shots"],
        "version": cell.protocol["version"],
        "comparable": cell.comparable,
        "reasons": "; ".join([*cell.reasons, *cell.base_reasons]),
        **paired,
        "difference_stderr": None if pair is None else pair.stderr,
        "file": relative(cell.run.file, out),
    }


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
                "scores": {task: _score_record(cell, out) for task, cell in row.cells.items()},
                "averages": {group: dataclasses.asdict(average) for group, average in row.averages.items()},
                "provenance": [provenance(run, out) for run in row.runs],
            }
        )
    content = {
        "rows": rows,
        "tasks": {task: board.usual[task] for task in board.tasks},
        "groups": board.groups,
        "group_rule": GROUP_RULE,
        "controls": board.controls,
        "left_out": [{**dataclasses.asdict(s), "file": relative(s.file, out)} for s in board.skipped],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"


def _score_record(cell: Cell, out: Path) -> dict[str, Any]:
    return {
        **dataclasses.asdict(cell.measure),
        "others": [dataclasses.asdict(measure) for measure in cell.others],
        "protocol": cell.protocol,
        "not_comparable": cell.reasons,
        "not_comparable_with_base": cell.base_reasons,
        "against_base": dataclasses.asdict(cell.paired) if cell.paired else None,
        "file": relative(cell.run.file, out),
        "samples": [
            relative(cell.run.samples[leaf], out) for leaf in cell.run.leaves[cell.task] if leaf in cell.run.samples
        ],
    }
