"""The report's page: one HTML file that needs nothing else.

- `html_page`: board -> text of `leaderboard.html`

Jinja escapes everything that comes from models, data sets and files; figures are matplotlib's; samples travel as
base64 and are put on the page as text.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from l2d.statistics import shown
from lm_eval_ext.leaderboard import paper_table
from lm_eval_ext.leaderboard.board import Board
from lm_eval_ext.leaderboard.files import Run
from lm_eval_ext.leaderboard.methods import KINDS
from lm_eval_ext.leaderboard.plots import cost_figures, curve_figures, difference_figures
from lm_eval_ext.leaderboard.provenance import provenance
from lm_eval_ext.leaderboard.samples import pack_samples
from lm_eval_ext.leaderboard.tables import compared, judged, missing_controls, p_text, reading, relative, score_text

MOST_PANELS = 24
"""Panels per kind of figure; the page says how many more there would be."""


def html_page(board: Board, out: Path, title: str = "Leaderboard") -> str:
    """The page as it is to lie in the folder `out`, from where its links lead to the results."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"svg": Markup, "score": score_text, "p": p_text, "short": _short, "speed": _speed}
    environment.filters |= {"shown": shown, "link": lambda file: quote(relative(file, out))}
    environment.filters |= {"relative": lambda file: relative(file, out)}
    names = {str(row.number): f"#{row.number} {row.setting.label}, {row.setting.decoding}" for row in board.rows}
    against = compared(board)
    return environment.get_template("page.html").render(
        title=title,
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        js=Markup((here / "page.js").read_text(encoding="utf-8")),
        built=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        board=board,
        paper=paper_table,
        kinds=KINDS,
        heads={task: _about(board, task) for task in board.tasks},
        lower={task: not _first(board, task).measure.higher_is_better for task in board.tasks},
        against=against if len(against) > 1 else {},
        judged=judged,
        reading=reading(board),
        controls=missing_controls(board),
        figures=_figures(board),
        documents=sum(max((c.protocol["n"] or 0) for r in board.rows if (c := r.cells.get(t))) for t in board.tasks),
        provenance=[(row, [_call(run, out) for run in row.runs]) for row in board.rows],
        samples=pack_samples(board),
        names=Markup(_embedded(names)),
    )


def _embedded(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value).replace("<", "\\u003c").replace("&", "\\u0026")


def _figures(board: Board) -> list[dict[str, Any]]:
    sections = [
        ("Score against budget", "curves", curve_figures(board, "budget"), "Bars and bands are 95 % intervals."),
        ("Differences to the base and the controls", "differences", difference_figures(board), "Mean paired difference "
         "with a 95 % interval, on the same documents. Filled: told apart from 0 at p < .05, not corrected for "
         f"{board.tests} tests; hollow: not told apart."),
        ("Score against measured time", "time", curve_figures(board, "seconds"), "Seconds per generated "
         "or scored token, of the requests where they were measured, else of the whole call with loading; models that "
         "count no tokens appear as lines."),
        ("Evaluations per token", "cost", cost_figures(board), "Evaluations that the network made for a token, "
         "speculative ones included; guidance doubles them."),
    ]  # fmt: skip
    return [
        {"title": title, "id": name, "panels": figures[:MOST_PANELS], "note": note, "more": len(figures) - MOST_PANELS}
        for title, name, figures, note in sections
        if figures
    ]


def _first(board: Board, task: str) -> Any:
    return next(row.cells[task] for row in board.rows if task in row.cells and row.cells[task].comparable)


def _about(board: Board, task: str) -> str:
    """Measure and protocol of a column, in a line."""
    usual = board.usual[task]
    parts = [usual["measure"].replace(",none", "").replace(",", ", ")]
    parts += [f"n = {usual['n']:,}"] if usual["n"] is not None else []
    parts += [f"{usual['shots']}\N{NON-BREAKING HYPHEN}shot"] if usual["shots"] is not None else []
    parts += [f"version {usual['version']}"] if usual["version"] is not None else []
    parts += [f"limit {usual['limit']:g}"] if usual["limit"] is not None else []
    return " · ".join(parts)


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def _speed(speed: float | None) -> str:
    return "" if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _call(run: Run, out: Path) -> dict[str, Any]:
    """What the page tells of one call: command, files, and everything else that is known as `facts`."""
    known = provenance(run, out)
    facts = {name: value for name, value in known.items() if name not in ("file", "samples", "command", "sampler")}
    facts |= {f"task hash, {task}": value for task, value in facts.pop("task_hashes").items()}
    facts |= {f"sampler {name}": value for name, value in (known.get("sampler") or {}).items()}
    recorded = facts.pop("command_recorded")
    shown_facts = {name.replace("_", " "): str(value) for name, value in facts.items() if value is not None}
    return {"run": run, "command": known["command"], "recorded": recorded, "facts": shown_facts}
