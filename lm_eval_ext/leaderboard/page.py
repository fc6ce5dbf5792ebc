"""The report's page: one HTML file that needs nothing else.

- `html_page`: board -> text of `leaderboard.html`

Jinja escapes everything that comes from models, data sets and files; figures escape their own labels; samples travel as
base64 and are put on the page as text.
"""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lm_eval_ext.leaderboard.board import GROUP_RULE, Average, Board, Cell, Row
from lm_eval_ext.leaderboard.methods import KINDS
from lm_eval_ext.leaderboard.plots import cost_figures, curve_figures, difference_figures
from lm_eval_ext.leaderboard.provenance import provenance
from lm_eval_ext.leaderboard.samples import pack_samples
from lm_eval_ext.leaderboard.tables import missing_controls, relative

MOST_PANELS = 24
"""Panels per kind of figure; the page says how many more there would be."""


def html_page(board: Board, out: Path, title: str = "Leaderboard") -> str:
    """The page as it is to lie in the folder `out`, from where its links lead to the results."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["svg"] = Markup
    samples = pack_samples(board)
    names = {str(row.number): f"#{row.number} {row.setting.label}, {row.setting.decoding}" for row in board.rows}
    return environment.get_template("page.html").render(
        title=title,
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        js=Markup((here / "page.js").read_text(encoding="utf-8")),
        built=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        tasks=[_task_head(board, task) for task in board.tasks],
        groups=[{"name": group, "tasks": ", ".join(tasks)} for group, tasks in board.groups.items()],
        rows=[_row_view(row, board, out, samples) for row in board.rows],
        methods=list(dict.fromkeys(KINDS[row.setting.kind] for row in board.rows)),
        decodings=list(dict.fromkeys(row.setting.decoding for row in board.rows)),
        guidance=any(row.setting.guidance for row in board.rows),
        solvers=any(row.setting.solver for row in board.rows),
        averages=bool(board.groups),
        rule=GROUP_RULE,
        controls=missing_controls(board),
        skipped=[{"file": relative(s.file, out), "part": s.part, "reason": s.reason} for s in board.skipped],
        figures=_figures(board),
        comparisons=sum(cell.paired is not None for row in board.rows for cell in row.cells.values()),
        documents=sum(max((c.protocol["n"] or 0) for r in board.rows if (c := r.cells.get(t))) for t in board.tasks),
        provenance=[_provenance_view(row, out) for row in board.rows],
        samples=samples,
        names=Markup(_embedded(names)),
    )


def _embedded(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value).replace("<", "\\u003c").replace("&", "\\u0026")


def _figures(board: Board) -> list[dict[str, Any]]:
    sections = [
        ("Accuracy against budget", "curves", curve_figures(board, "budget"), "Bars and bands are ± 1 standard error."),
        ("Accuracy against measured time", "time", curve_figures(board, "seconds"), "Seconds per generated "
         "or scored token, of the requests where they were measured, else of the whole call with loading; models that "
         "count no tokens appear as lines."),
        ("Evaluations per token", "cost", cost_figures(board), "Evaluations that the network made for a token, "
         "speculative ones included; guidance doubles them."),
        ("Differences to the base", "differences", difference_figures(board), "Mean paired difference with a 95 % "
         "interval, on the same documents."),
    ]  # fmt: skip
    return [
        {"title": title, "id": name, "panels": figures[:MOST_PANELS], "note": note, "more": len(figures) - MOST_PANELS}
        for title, name, figures, note in sections
        if figures
    ]


def _task_head(board: Board, task: str) -> dict[str, Any]:
    usual = board.usual[task]
    counts = Counter(row.cells[task].measure.higher_is_better for row in board.rows if task in row.cells)
    parts = [usual["measure"].replace(",none", "").replace(",", ", ")]
    if usual["n"] is not None:
        parts.append(f"n = {usual['n']:,}")
    if usual["shots"] is not None:
        parts.append(f"{usual['shots']}\N{NON-BREAKING HYPHEN}shot")
    if usual["version"] is not None:
        parts.append(f"version {usual['version']}")
    if usual["limit"] is not None:
        parts.append(f"limit {usual['limit']:g}")
    return {"name": task, "about": " · ".join(parts), "lower": not counts.most_common(1)[0][0]}


def _row_view(row: Row, board: Board, out: Path, samples: dict[str, str]) -> dict[str, Any]:
    s = row.setting
    cost, nfe_requested = s.cost.get("nfe_computed") or {}, s.cost.get("nfe_requested") or {}
    speed = s.tokens / s.seconds if s.tokens and s.seconds else None
    details = [
        f"{name}: mean {v['mean']:.2f}, max {v['max']}" for name, v in s.cost.items() if v.get("mean") is not None
    ]
    return {
        "number": row.number,
        "kind": s.kind,
        "method": KINDS[s.kind],
        "label": s.label,
        "model": s.name,
        "decoding": s.decoding,
        "budget": s.budget if s.budget is not None else nfe_requested.get("mean"),
        "budget_text": str(s.budget)
        if s.budget is not None
        else f"{nfe_requested['mean']:.1f}"
        if nfe_requested.get("mean")
        else "",
        "solver": s.solver or "",
        "guidance": s.guidance or "",
        "trained": s.trained,
        "trained_text": "" if s.trained is None else _short(s.trained),
        "cost": cost.get("mean"),
        "cost_text": "" if cost.get("mean") is None else f"{cost['mean']:.1f}",
        "p95": cost.get("p95"),
        "cost_details": "; ".join(details),
        "speed": speed,
        "speed_text": "" if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}",
        "cells": [_cell_view(row.cells.get(task), out, task in samples) for task in board.tasks],
        "averages": [_average_view(row.averages.get(group)) for group in board.groups],
        "comparable": all(cell.comparable for cell in row.cells.values()),
        "base": row.base.number if row.base else None,
    }


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def _cell_view(cell: Cell | None, out: Path, packed: bool) -> dict[str, Any] | None:
    if cell is None:
        return None
    measure, pair = cell.measure, cell.paired
    view = {
        "task": cell.task,
        "value": repr(measure.value),
        "text": f"{measure.value:.3f}" if abs(measure.value) < 100 else f"{measure.value:.1f}",
        "error": "" if measure.stderr is None else f"±{measure.stderr:.3f}",
        "link": quote(relative(cell.run.file, out)),
        "reasons": "; ".join(cell.reasons),
        "base_reasons": "" if cell.base_reasons == cell.reasons else "; ".join(cell.base_reasons),
        "samples": packed and bool(cell.samples),
        "difference": None,
    }
    if pair is not None:
        sure = pair.p_value is not None and pair.p_value < 0.05
        better = (pair.difference > 0) == measure.higher_is_better
        view["difference"] = {
            "text": f"{pair.difference:+.3f}" if abs(pair.difference) >= 5e-4 or not pair.difference else "±<.001",
            "error": "" if pair.stderr is None else f"±{pair.stderr:.3f}",
            "p": _p_text(pair.p_value),
            "mark": "same" if not sure else "better" if better else "worse",
            "counts": f"{pair.wins}↑ {pair.losses}↓ {pair.ties}=",
            "words": f"{pair.wins} documents better, {pair.losses} worse, {pair.ties} equal"
            + (f", {pair.clusters} clusters" if pair.clusters != pair.documents else ""),
        }
    return view


def _p_text(p_value: float | None) -> str:
    return "" if p_value is None else "p < .001" if p_value < 0.001 else f"p = {p_value:.3f}".replace("0.", ".")


def _average_view(average: Average | None) -> dict[str, Any] | None:
    if average is None:
        return None
    difference = average.difference
    return {
        "value": repr(average.value),
        "text": f"{average.value:.3f}",
        "error": "" if average.stderr is None else f"±{average.stderr:.3f}",
        "difference": "" if difference is None else f"{difference:+.3f}",
        "difference_error": "" if average.difference_stderr is None else f"±{average.difference_stderr:.3f}",
    }


def _provenance_view(row: Row, out: Path) -> dict[str, Any]:
    calls = []
    for run in row.runs:
        known = provenance(run, out)
        shown = {name: value for name, value in known.items() if name not in ("file", "samples", "command", "sampler")}
        hashes = shown.pop("task_hashes")
        recorded = shown.pop("command_recorded")
        shown |= {f"task hash, {task}": value for task, value in hashes.items()}
        shown |= {f"sampler {name}": value for name, value in (known.get("sampler") or {}).items()}
        calls.append(
            {
                "file": known["file"],
                "link": quote(known["file"]),
                "samples": [{"name": Path(name).name, "link": quote(name)} for name in known["samples"]],
                "command": known["command"],
                "recorded": recorded,
                "facts": {name.replace("_", " "): str(value) for name, value in shown.items() if value is not None},
            }
        )
    return {"number": row.number, "label": row.setting.label, "decoding": row.setting.decoding, "calls": calls}
