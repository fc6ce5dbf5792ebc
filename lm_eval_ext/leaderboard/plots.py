"""Figures as inline SVG, drawn by matplotlib in the page's own colours so that they follow light, dark and print.

- `curve_figures`: accuracy against budget or seconds per token, one panel per task and decoding; the base, finetuning
  and the controls are horizontal lines beside the budget curves
- `difference_figures`: differences to the base and the controls with 95 % intervals, one panel per task and decoding
- `cost_figures`: evaluations per token: histograms where the runs recorded them, else mean, median, p95 and maximum

Every function returns `Figure`s. Equal boards give equal bytes.
"""

import dataclasses
import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, NullLocator

from l2d.statistics import verdict
from lm_eval_ext.leaderboard.board import Board
from lm_eval_ext.leaderboard.comparisons import CONTROL_KINDS
from lm_eval_ext.leaderboard.methods import CONTROL_NAMES, CONTROLS, KINDS, Setting
from lm_eval_ext.leaderboard.rows import Comparison, Row

COLOURS = 8
WIDTH, HEIGHT = 5.0, 3.1  # inches
_LINES = {"base": "base", "l2d-base": "base", "lora-ft": "lora", "full-ft": "full"}
_CONTROL_LINES = {"one-evaluation": "control", "noise-free": "free"}
"""By kind of row that is a line in a panel, the name of its colour; against time controls are points."""
_DASHES = {"lora-ft": (2, 3), "full-ft": (8, 3, 2, 3), "one-evaluation": (14, 4), "noise-free": (10, 3, 2, 3, 2, 3)}
_CURVES = ("l2d-lora", "l2d-full", "l2d-base")
_PALETTE = (*(f"c{n}" for n in range(COLOURS)), *("base", "lora", "full", "control", "free"))
_PALETTE += ("ink", "soft", "line", "sheet")
_STYLE: dict[str, Any] = {
    **{"svg.fonttype": "none", "text.parse_math": False, "font.size": 9},
    **{"figure.facecolor": "none", "axes.facecolor": "none", "axes.axisbelow": True},
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{"xtick.minor.visible": False, "ytick.minor.visible": False, "ytick.major.size": 0, "lines.linewidth": 1.8},
}
Position = Callable[[Setting], Any]
"""Where a setting stands on the axis; `None` where it is not known, and the setting is then left out."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """An SVG with its title and, by class of its mark, the names in its legend; label: what it shows, in words."""

    title: str
    label: str
    svg: str
    legend: list[tuple[str, str]]
    note: str = ""


# ---- matplotlib in the page's colours ----------------------------------------------------------------------------


def _colour(name: str) -> str:
    """A colour that stands for the page's variable of this name until `_svg` puts that in."""
    return f"#01fa{_PALETTE.index(name):02x}"


def _draw(label: str, paint: Callable[[Axes], None], height: float = HEIGHT) -> str:
    """The SVG of a panel that `paint` fills; `label` keeps its identifiers apart from those of others."""
    named = {"text.color": "ink", "axes.labelcolor": "soft", "xtick.color": "soft", "ytick.color": "soft"}
    named |= {"axes.edgecolor": "line", "grid.color": "line"}
    style: Any = _STYLE | {key: _colour(name) for key, name in named.items()} | {"svg.hashsalt": label}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the font
        drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
        paint(drawing.add_subplot())
        stream = io.StringIO()
        drawing.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = stream.getvalue()
    svg = re.sub(r' id="[a-zA-Z]+[\w.]*_\d+"', "", svg[svg.index("<svg") :])  # names that every figure would repeat
    svg = re.sub(r"(?s)<style.*?</style>", "", svg)  # it is for all elements, and so would be for the whole page
    return re.sub(r"#01fa([0-9a-f]{2})", lambda match: f"var(--{_PALETTE[int(match[1], 16)]})", svg)


def _text(text: str) -> str:
    """Text that XML can hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _label(row: Row) -> str:
    """Number and label of a row; the number tells rows apart whose labels are equal or cut off."""
    label = _text(f"#{row.number} {row.setting.label.removeprefix('control: ')}")
    return label if len(label) <= 32 else label[:31] + "…"


def _reach(row: Row, task: str) -> tuple[float, float, float]:
    """The score and how far its interval reaches down and up."""
    score = row.cells[task].score
    low, high = score.interval() or (score.value, score.value)
    return score.value, max(0.0, score.value - low), max(0.0, high - score.value)


# ---- scores ------------------------------------------------------------------------------------------------------


def curve_figures(board: Board, horizontal: str) -> list[Figure]:
    """Panels of scores against `horizontal`, "budget" or "seconds" (per token, of the whole call)."""
    figures = []
    for task in board.tasks:
        measured = [row for row in board.rows if task in row.cells]
        for decoding in dict.fromkeys(row.cells[task].decoding for row in measured):
            cells = [(row, row.cells[task]) for row in measured]
            rows = [row for row, cell in cells if cell.decoding == decoding and cell.comparable]
            if figure := _curve_panel(f"{task}, {decoding}", task, rows, horizontal):
                figures.append(figure)
    return figures


def _budget(setting: Setting) -> float | None:
    return setting.budget if setting.budget is not None else (setting.cost.get("nfe_requested") or {}).get("mean")


def _series(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows on one line: the same model and sampler at several budgets; L2D at T = 1 starts every line of its base."""
    named: dict[str, list[Row]] = {}
    several = len({row.setting.model for row in rows}) > 1
    for row in rows:
        s = row.setting
        if s.kind == "l2d-base":
            continue
        parts = [KINDS[s.kind], *([s.name] if several else []), s.solver or "", s.guidance or "", s.details]
        name = ", ".join(dict.fromkeys(part for part in parts if part and part != "midpoint"))
        if name not in named:
            starts = [r for r in rows if r.setting.kind == "l2d-base" and r.setting.base == s.base]
            named[name] = [r for r in starts if r.setting.model == s.model] or starts[:1]
        named[name].append(row)
    return {name: sorted(members, key=lambda row: _budget(row.setting) or 0) for name, members in named.items()}


def _curve_panel(title: str, task: str, rows: list[Row], horizontal: str) -> Figure | None:
    by_budget = horizontal == "budget"
    position: Position = _budget if by_budget else lambda setting: setting.seconds_per_token
    series = _series([row for row in rows if row.setting.kind in _CURVES and position(row.setting)])
    kinds = _LINES | (_CONTROL_LINES if by_budget else {})
    points = [row for row in rows if row.setting.kind in _CONTROL_LINES and position(row.setting)]
    points = [] if by_budget else points
    if not series and not points:
        return None
    marks: dict[str, str] = {}  # by model, the colour of its first curve
    for number, members in enumerate(series.values()):
        marks.setdefault(members[-1].setting.model, f"c{number % COLOURS}")
    measure = rows[0].cells[task].measure
    lines = _lines(rows, task, kinds, marks if len(marks) > 1 else {})
    legend = [(f"c{number % COLOURS}", name) for number, name in enumerate(series)]
    legend += [
        (f"line {row.setting.kind.removeprefix('l2d-')} {colour}", f"{name}: {row.cells[task].score.value:.3f}")
        for row, name, colour in lines
    ]
    legend += [("control", "controls: one evaluation, noise-free path")] if points else []

    def paint(axes: Axes) -> None:
        for row, _, colour in lines:
            value, down, up = _reach(row, task)
            axes.axhspan(value - down, value + up, color=_colour(colour), alpha=0.08, linewidth=0)
            dashes = _DASHES.get(row.setting.kind, (6, 4))
            axes.axhline(value, color=_colour(colour), linewidth=1.5, dashes=dashes)
        for number, members in enumerate(series.values()):
            _errorbars(axes, members, task, position, f"c{number % COLOURS}", "o-")
        _errorbars(axes, points, task, position, "control", "D")
        axes.set_ylabel(measure.metric + ("" if measure.higher_is_better else ", less is better"))
        _scale(axes, sorted({position(row.setting) for members in series.values() for row in members}), by_budget)
        if not by_budget:
            for row in [row for members in series.values() for row in members][:16]:
                spot = (position(row.setting), row.cells[task].score.value)
                name = f"T {row.setting.budget}" if row.setting.budget else "adaptive"
                axes.annotate(name, spot, (0, -14), textcoords="offset points", ha="center", color=_colour("soft"))

    words = "evaluations per token, T" if by_budget else "seconds per token"
    label = f"{title}: {measure.metric} against {words}"
    return Figure(title, label, _draw(label, paint), legend, _missing(rows))


def _errorbars(axes: Axes, rows: list[Row], task: str, position: Position, colour: str, form: str) -> None:
    if rows:
        values, down, up = zip(*(_reach(row, task) for row in rows), strict=True)
        look: dict[str, Any] = {"color": _colour(colour), "markeredgecolor": _colour("sheet"), "markersize": 6.5}
        across = [position(row.setting) for row in rows]
        axes.errorbar(across, values, [down, up], fmt=form, capsize=2.5, elinewidth=1.2, **look)


def _scale(axes: Axes, positions: list[float], by_budget: bool) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    axes.set_xlabel("evaluations per token, T" if by_budget else "seconds per token (log scale)")
    if by_budget:
        ticks: list[float] = []
        for value in positions:
            if not ticks or value > 1.25 * ticks[-1]:
                ticks.append(value)
        axes.set_xticks(ticks, [f"{value:.3g}" for value in ticks])
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")


def _lines(rows: list[Row], task: str, kinds: dict[str, str], marks: dict[str, str]) -> list[tuple[Row, str, str]]:
    """Rows of `kinds` with name and colour, one per model and kind: of several times of one evaluation the best, as a
    strict control."""
    by_model: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.setting.kind in kinds:
            by_model.setdefault((row.setting.kind, row.setting.model), []).append(row)
    if any(kind == "base" for kind, _ in by_model):
        by_model = {key: members for key, members in by_model.items() if key[0] != "l2d-base"}
    models = Counter(kind for kind, _ in by_model)
    lines = []
    for (kind, model), members in by_model.items():
        sign = 1 if members[0].cells[task].measure.higher_is_better else -1
        best = max(members, key=lambda row: sign * row.cells[task].measure.value)
        name = KINDS[kind]
        if kind == "one-evaluation":
            name = best.setting.label + (f" (best of {len(members)} times)" if len(members) > 1 else "")
        name += f", {best.setting.name}" if models[kind] > 1 else ""
        lines.append((best, name, marks.get(model, kinds[kind]) if kind == "one-evaluation" else kinds[kind]))
    return lines


def _missing(rows: list[Row]) -> str:
    """Which controls of L2D's curves are not among the rows of a panel; empty where none is missing."""
    kinds = {row.setting.kind for row in rows}
    if not kinds & {"l2d-lora", "l2d-full"}:
        return ""
    names = [CONTROL_NAMES[kind] for kind in CONTROLS if kind not in kinds]
    return f"Not measured here: {', '.join(names)}." if names else ""


# ---- differences -------------------------------------------------------------------------------------------------


def difference_figures(board: Board) -> list[Figure]:
    """Per task and decoding, the differences of each setting to its base and controls with 95 % intervals."""
    panels: dict[str, list[tuple[Row, str, Comparison]]] = {}
    lower = {}
    for row, cell, kind, comparison in board.comparisons():
        if comparison.paired is not None:
            title = f"{cell.task}, {cell.decoding}"
            panels.setdefault(title, []).append((row, kind, comparison))
            lower[title] = not cell.measure.higher_is_better
    return [_difference_panel(title, entries, lower[title]) for title, entries in panels.items()]


def _difference_panel(title: str, entries: list[tuple[Row, str, Comparison]], lower: bool) -> Figure:
    colours = _LINES | _CONTROL_LINES
    heights: dict[int, float] = {}  # by row, of its first line; rows are half a line apart

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=_colour("soft"), linewidth=1)
        for number, (row, kind, comparison) in enumerate(entries):
            level = number + 0.5 * len(heights | {row.number: 0.0})
            heights.setdefault(row.number, level)
            test, colour = comparison.paired, _colour(colours[kind])
            if test is not None:
                fill = _colour("sheet") if verdict(test) == "not told apart" else colour
                axes.plot(test.interval() or (test.value, test.value), [level] * 2, color=colour, linewidth=1.4)
                axes.plot([test.value], [level], "o", color=colour, markerfacecolor=fill, markersize=6)
        labels = {row.number: _label(row) for row, *_ in entries}
        axes.set_yticks(list(heights.values()), list(labels.values()))
        axes.set_ylim(level + 0.6, 0)
        axes.grid(axis="x")
        axes.set_xlabel(f"difference on the same documents{', less is better' * lower}")

    kinds = [kind for kind in ("base", *CONTROL_KINDS) if any(kind == other for _, other, _ in entries)]
    legend = [(colours[kind], f"against {KINDS[kind].removeprefix('control: ')}") for kind in kinds]
    label = f"{title}: differences to the base and the controls"
    height = 0.62 + 0.17 * len(entries) + 0.09 * len({row.number for row, *_ in entries})
    return Figure(title, label, _draw(label, paint, height), legend)


# ---- cost --------------------------------------------------------------------------------------------------------


def cost_figures(board: Board) -> list[Figure]:
    """Evaluations per token that the network made: histograms over documents, one chart of summaries for the rest."""
    rows = [row for row in board.rows if row.setting.cost.get("nfe_computed") and row.setting.kind != "l2d-base"]
    documents = {row.number: [cost for cell in row.cells.values() for cost in cell.costs.values()] for row in rows}
    figures = [_histogram(row, documents[row.number]) for row in rows if documents[row.number]]
    rest = [row for row in rows if not documents[row.number] and row.setting.cost["nfe_computed"].get("max")]
    for decoding in dict.fromkeys(row.setting.decoding for row in rest):
        figures.append(_ranges(decoding, [row for row in rest if row.setting.decoding == decoding]))
    return figures


def _histogram(row: Row, documents: list[dict[str, float]]) -> Figure:
    """Documents by their mean evaluations per token."""
    means = [cost["nfe_computed"] / max(cost["solved_tokens"], 1) for cost in documents]
    width = max(1, math.ceil((max(means) + 1) / 48))  # evaluations per bar
    bars = Counter(int(mean) // width * width for mean in means)

    def paint(axes: Axes) -> None:
        shares = [count / len(means) for count in bars.values()]
        axes.bar(list(bars), shares, width=0.92 * width, align="edge", color=_colour("c0"))
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.grid(axis="y")
        axes.set_xlabel("mean evaluations per token of a document")

    title = f"{row.setting.label}, {row.setting.decoding}"
    legend = [("c0", f"{len(means):,} documents")]
    label = f"{title}: histogram of evaluations per token"
    return Figure(title, label, _draw(label, paint), legend)


def _ranges(decoding: str, rows: list[Row]) -> Figure:
    costs = [row.setting.cost["nfe_computed"] for row in rows]

    def paint(axes: Axes) -> None:
        axes.set_xscale("log")
        for number, cost in enumerate(costs):
            median, p95, most, mean = (max(1, cost[key]) for key in ("median", "p95", "max", "mean"))
            axes.hlines([number, number], median, [most, p95], color=_colour("c0"), linewidth=[1.5, 4.5])
            axes.plot([median], [number], "o", color=_colour("c0"), markeredgecolor=_colour("sheet"))
            axes.plot([mean], [number], "D", color=_colour("control"), markeredgecolor=_colour("sheet"))
        axes.set_yticks(range(len(rows)), list(map(_label, rows)))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="x")
        axes.set_xlabel("evaluations per token (log scale)")

    legend = [("c0", "median, thick to p95, thin to the maximum"), ("control", "mean")]
    note = "These runs kept no costs of single documents, only mean, median, p95 and maximum per token."
    label = f"{decoding}: evaluations per token"
    return Figure(decoding, label, _draw(label, paint, 0.62 + 0.22 * len(rows)), legend, note)
