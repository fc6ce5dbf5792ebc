"""Figures as inline SVG, drawn with the page's own colours so that they follow light, dark and print.

- `curve_figures`: accuracy against budget or seconds per token, one panel per task and decoding; the base, finetuning
  and the controls are horizontal lines beside the budget curves
- `difference_figures`: differences to the base with 95 % intervals, one panel per task
- `cost_figures`: evaluations per token: histograms where the runs recorded them, else mean, median, p95 and maximum

Every function returns `Figure`s; colours and fonts are classes of `page.css`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from html import escape
from typing import Any

from lm_eval_ext.leaderboard.board import Board, Cell, Row
from lm_eval_ext.leaderboard.methods import CONTROL_NAMES, CONTROLS, KINDS, Setting

WIDTH, HEIGHT = 520, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 128, 14, 42
COLOURS = 8
LINES = {"base": "base", "l2d-base": "base (T = 1)", "lora-ft": "LoRA ft", "full-ft": "full ft"}
CONTROL_LINES = {"one-evaluation": "one eval", "noise-free": "noise-free"}
"""Controls that are lines beside the budget curves; against time they are points."""
Place = Callable[[Setting], Any]
"""Where a setting stands on the axis; `None` where it is not known, and the setting is then left out."""
_CURVES = ("l2d-lora", "l2d-full", "l2d-base")
_LABEL = 16  # pixels between names at the right


@dataclasses.dataclass(frozen=True)
class Figure:
    """An SVG with its title and, by class of its mark, the names in its legend."""

    title: str
    svg: str
    legend: list[tuple[str, str]]
    note: str = ""


def curve_figures(board: Board, horizontal: str) -> list[Figure]:
    """Panels of accuracy against `horizontal`, "budget" or "seconds" (per token, of the whole call)."""
    figures = []
    place = _budget if horizontal == "budget" else lambda setting: setting.seconds_per_token
    for task in board.tasks:
        measured = [row for row in board.rows if task in row.cells]
        for decoding in dict.fromkeys(row.cells[task].decoding for row in measured):
            cells = [(row, row.cells[task]) for row in measured]
            rows = [row for row, cell in cells if cell.decoding == decoding and cell.comparable]
            if figure := _curve_panel(f"{task}, {decoding}", task, rows, place, horizontal):
                figures.append(figure)
    return figures


def _budget(setting: Setting) -> float | None:
    if setting.budget is not None:
        return setting.budget * (1 if setting.budget == 1 else setting.votes or 1)
    return (setting.cost.get("nfe_requested") or {}).get("mean")


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
    return named


def _curve_panel(title: str, task: str, rows: list[Row], place: Place, horizontal: str) -> Figure | None:
    series = _series([row for row in rows if row.setting.kind in _CURVES and place(row.setting)])
    level = LINES | (CONTROL_LINES if horizontal == "budget" else {})
    controls = [row for row in rows if row.setting.kind in CONTROL_LINES and row.setting.kind not in level]
    controls = [row for row in controls if place(row.setting)]
    if not series and not controls:
        return None
    lines = _lines(rows, task, level)
    points = [row for members in series.values() for row in members] + controls
    across = _log_axis([place(row.setting) for row in points])
    up = _Axis(*_limits([row.cells[task] for row in points + [line.row for line in lines]]), HEIGHT - _BOTTOM, _TOP)
    words = "evaluations per token, T" if horizontal == "budget" else "seconds per token (log scale)"
    ticks = sorted({place(row.setting) for row in points}) if horizontal == "budget" else _decades(across)
    parts = _frame(across, up, ticks, words)
    marks: dict[str, str] = {}  # by model, the colour of its first curve
    for number, members in enumerate(series.values()):
        marks.setdefault(members[-1].setting.model, f"c{number % COLOURS}")
    parts += _levels(lines, task, up, marks if len(marks) > 1 else {})
    legend = []
    named: list[tuple[float, float]] = []  # where budgets stand beside points
    for number, (name, members) in enumerate(series.items()):
        mark = f"c{number % COLOURS}"
        members = sorted(members, key=lambda row: _budget(row.setting) or 0)
        parts += _line(members, task, across, up, place, mark)
        if horizontal != "budget":
            parts += _budget_names(members, task, across, up, place, named)
        legend.append((mark, name))
    for row in controls:
        parts += _control(row, task, across(place(row.setting)), up)
    legend += [(f"line {_mark(line.row, marks if len(marks) > 1 else {})}", line.name) for line in lines]
    if controls:
        legend.append(("control", "controls: one evaluation, noise-free path"))
    return Figure(title, _svg(parts, f"{title}: accuracy against {words}"), legend, _missing(rows))


@dataclasses.dataclass(frozen=True)
class _Level:
    """A row that is drawn as a horizontal line, with its name in the legend and, shorter, beside the line."""

    row: Row
    name: str
    short: str


def _lines(rows: list[Row], task: str, kinds: dict[str, str]) -> list[_Level]:
    """Rows of `kinds`, one per model and kind: of several times of one evaluation the best, as a strict control."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.setting.kind in kinds:
            found.setdefault((row.setting.kind, row.setting.model), []).append(row)
    if any(kind == "base" for kind, _ in found):
        found = {key: members for key, members in found.items() if key[0] != "l2d-base"}
    models = Counter(kind for kind, _ in found)
    levels = []
    for (kind, _), members in found.items():
        best = max(members, key=lambda row: _quality(row.cells[task]))
        setting, name = best.setting, KINDS[kind]
        if kind == "one-evaluation":
            name = setting.label + (f" (best of {len(members)} times)" if len(members) > 1 else "")
        if models[kind] > 1:
            name += f", {setting.name}"
        levels.append(_Level(best, name, kinds[kind]))
    return levels


def _quality(cell: Cell) -> float:
    """The score, turned round where less is better."""
    return cell.measure.value if cell.measure.higher_is_better else -cell.measure.value


def _mark(row: Row, marks: dict[str, str]) -> str:
    """Classes of a line: its kind and, where there are several curves, the colour of the one that it belongs to."""
    kind = row.setting.kind.replace("l2d-base", "base")
    return f"{kind} {marks.get(row.setting.model, '')}".strip() if kind == "one-evaluation" else kind


def _missing(rows: list[Row]) -> str:
    """Which controls of L2D's curves are not among the rows of a panel; empty where none is missing."""
    kinds = {row.setting.kind for row in rows}
    if not kinds & {"l2d-lora", "l2d-full"}:
        return ""
    names = [CONTROL_NAMES[kind] for kind in CONTROLS if kind not in kinds]
    return f"Not measured here: {', '.join(names)}." if names else ""


class _Axis:
    """Linear scale from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


class _LogAxis(_Axis):
    """Logarithmic scale from values to pixels."""

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def _log_axis(values: list[float], start: float = _LEFT + 12, end: float = WIDTH - _RIGHT - 12) -> _LogAxis:
    low, high = min(values), max(values)
    return _LogAxis(low, high, start, end) if high > low else _LogAxis(low / 2, high * 2, start, end)


def _decades(axis: _Axis) -> list[float]:
    """1, 2 and 5 times powers of ten within the axis; at least two of them."""
    ticks = [m * 10.0**e for e in range(-9, 6) for m in (1, 2, 5) if axis.low <= m * 10.0**e <= axis.high]
    return ticks if len(ticks) > 1 else [axis.low, axis.high]


def _round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, first + 8) if n * step <= high + step * 1e-6]


def _limits(cells: list[Cell]) -> tuple[float, float]:
    spread = [(cell.measure.value, cell.measure.stderr or 0.0) for cell in cells]
    low, high = min(v - e for v, e in spread), max(v + e for v, e in spread)
    if 0 <= min(v for v, _ in spread) and max(v for v, _ in spread) <= 1:
        low, high = max(0.0, math.floor(low * 10) / 10), min(1.0, math.ceil(high * 10) / 10)
        return (low, high) if high > low else (max(0.0, low - 0.1), min(1.0, high + 0.1))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _frame(across: _Axis, up: _Axis, ticks: list[float], words: str) -> list[str]:
    parts = []
    for value in _round_ticks(up.low, up.high):
        y = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{value:.3g}</text>')
    previous = -99.0
    for value in ticks:
        if across(value) - previous >= 26:
            previous = across(value)
            text = f"{value:.0f}" if value >= 1 and abs(value - round(value)) < 0.05 else f"{value:.2g}"
            parts.append(f'<text class="tick mid" x="{previous:.1f}" y="{HEIGHT - _BOTTOM + 18}">{text}</text>')
    parts.append(f'<text class="axis mid" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}">{words}</text>')
    return parts


def _levels(lines: list[_Level], task: str, up: _Axis, marks: dict[str, str]) -> list[str]:
    parts = []
    lines = sorted(lines, key=lambda line: line.row.cells[task].measure.value)
    heights = _apart([up(line.row.cells[task].measure.value) for line in lines])
    for line, height in zip(lines, heights, strict=True):
        measure = line.row.cells[task].measure
        y, mark = up(measure.value), _mark(line.row, marks)
        if measure.stderr:
            top, bottom = (
                up(min(up.high, measure.value + measure.stderr)),
                up(max(up.low, measure.value - measure.stderr)),
            )
            band = f'y="{top:.1f}" width="{WIDTH - _RIGHT - _LEFT}" height="{max(0.0, bottom - top):.1f}"'
            parts.append(f'<rect class="band {mark}" x="{_LEFT}" {band}/>')
        parts.append(
            f'<line class="level {mark}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}">'
            f"<title>{_tip(line.row, task)}</title></line>"
        )
        parts.append(
            f'<text class="name {mark}" x="{WIDTH - _RIGHT + 6}" y="{height + 4:.1f}">'
            f"{line.short} {measure.value:.3f}</text>"
        )
    return parts


def _apart(heights: list[float]) -> list[float]:
    """Falling pixel heights moved so that names at them do not cover each other, within the panel if they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - _LABEL) if placed else height)
    ceiling: float = _TOP
    for place in reversed(range(len(placed))):  # from the highest line downwards
        placed[place] = max(placed[place], ceiling)
        ceiling = placed[place] + _LABEL
    return placed


def _line(members: list[Row], task: str, across: _Axis, up: _Axis, place: Place, mark: str) -> list[str]:
    spots = [(across(place(row.setting)), up(row.cells[task].measure.value), row) for row in members]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
    parts = [f'<polyline class="curve {mark}" points="{path}"/>']
    for x, y, row in spots:
        parts += _bar(row.cells[task], x, up, mark)
        parts.append(
            f'<circle class="dot {mark}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{_tip(row, task)}</title></circle>'
        )
    return parts


def _budget_names(
    members: list[Row], task: str, across: _Axis, up: _Axis, place: Place, named: list[tuple[float, float]]
) -> list[str]:
    """Budgets below the points of a curve, where none of `named` is near; adds their places to it."""
    parts: list[str] = []
    for row in members:
        x, y = across(place(row.setting)), up(row.cells[task].measure.value)
        if any(abs(x - taken) < 30 and abs(y - other) < 14 for taken, other in named):
            continue  # it would cover another one; the point's tooltip tells
        named.append((x, y))
        name = f"T {row.setting.budget}" if row.setting.budget else "adaptive"
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{y + 18:.1f}">{name}</text>')
    return parts


def _bar(cell: Cell, x: float, up: _Axis, mark: str) -> list[str]:
    error = cell.measure.stderr
    if not error:
        return []
    low, high = up(max(up.low, cell.measure.value - error)), up(min(up.high, cell.measure.value + error))
    caps = f"M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6M{x:.1f} {low:.1f}V{high:.1f}"
    return [f'<path class="error {mark}" d="{caps}"/>']


def _control(row: Row, task: str, x: float, up: _Axis) -> list[str]:
    y = up(row.cells[task].measure.value)
    tip = f"<title>{_tip(row, task)}</title>"
    shape = f'<path class="dot control" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z">{tip}</path>'
    return [*_bar(row.cells[task], x, up, "control"), shape]


def _tip(row: Row, task: str) -> str:
    measure = row.cells[task].measure
    error = "" if measure.stderr is None else f" ± {measure.stderr:.4f}"
    return escape(f"{row.setting.label}, {row.setting.decoding}: {measure.value:.4f}{error}")


def _short_label(row: Row) -> str:
    """Number and label of a row; the number tells rows apart whose labels are equal or cut off."""
    label = f"#{row.number} {row.setting.label.removeprefix('control: ')}"
    return label if len(label) <= 32 else label[:31] + "…"


def _svg(parts: list[str], label: str, height: float = HEIGHT, width: float = WIDTH) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'


# ---- differences -------------------------------------------------------------------------------------------------


def difference_figures(board: Board) -> list[Figure]:
    """Per task and decoding, each setting's difference to its base with a 95 % interval."""
    figures = []
    for task in board.tasks:
        paired = [row for row in board.rows if task in row.cells and row.cells[task].paired is not None]
        for decoding in dict.fromkeys(row.cells[task].decoding for row in paired):
            rows = [row for row in paired if row.cells[task].decoding == decoding]
            if rows:
                figures.append(_difference_panel(f"{task}, {decoding}", task, rows))
    return figures


def _difference_panel(title: str, task: str, rows: list[Row]) -> Figure:
    left, line = 218, 24
    height = line * len(rows) + 44
    found = [pair for row in rows if (pair := row.cells[task].paired) is not None]
    reach = max([abs(p.difference) + 1.96 * (p.stderr or 0) for p in found] + [1e-3]) * 1.05
    across = _Axis(-reach, reach, left, WIDTH - 70)
    parts = []
    for value in _round_ticks(-reach, reach):
        x = across(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - 34}"/>')
        text = f"{value:+.3g}" if value else "0"
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{height - 18}">{text}</text>')
    parts.append(f'<line class="zero" x1="{across(0):.1f}" x2="{across(0):.1f}" y1="8" y2="{height - 34}"/>')
    for place, (row, pair) in enumerate(zip(rows, found, strict=True)):
        y = 20 + place * line
        sure = pair.p_value is not None and pair.p_value < 0.05
        gained = (pair.difference > 0) == row.cells[task].measure.higher_is_better
        mark = "same" if not sure else "better" if gained else "worse"
        label = _short_label(row)
        parts.append(f'<text class="label end" x="{left - 10}" y="{y + 4}">{escape(label)}</text>')
        if pair.stderr:
            low, high = (across(pair.difference + side * 1.96 * pair.stderr) for side in (-1, 1))
            parts.append(
                f'<path class="error {mark}" d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 3}v6M{high:.1f} {y - 3}v6"/>'
            )
        tip = f"<title>{pair.wins} better, {pair.losses} worse, {pair.ties} equal</title>"
        parts.append(f'<circle class="dot {mark}" cx="{across(pair.difference):.1f}" cy="{y}" r="4.5">{tip}</circle>')
        parts.append(f'<text class="name {mark} end" x="{WIDTH - 6}" y="{y + 4}">{pair.difference:+.3f}</text>')
    legend = [("better", "better (p < .05)"), ("worse", "worse (p < .05)"), ("same", "not told apart")]
    return Figure(title, _svg(parts, f"{title}: difference to the base", height), legend)


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
    total, most = len(means), max(1, math.ceil(max(means)))
    width = max(1, math.ceil((most + 1) / 48))  # evaluations per bar
    bars = Counter(int(mean) // width for mean in means)
    tallest = max(bars.values())
    across = _Axis(0, most // width + 1, _LEFT, WIDTH - 12)
    up = _Axis(0, tallest / total, HEIGHT - _BOTTOM, _TOP)
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        value = share * tallest / total
        y = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{value:.0%}</text>')
    for place, count in sorted(bars.items()):
        x, wide = across(place), across(1) - across(0)
        y = up(count / total)
        tip = f"<title>{place * width} to {(place + 1) * width} evaluations: {count:,} documents</title>"
        parts.append(
            f'<rect class="bar c0" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(1, wide - 1):.1f}" '
            f'height="{HEIGHT - _BOTTOM - y:.1f}">{tip}</rect>'
        )
    for value in range(0, most + 1, max(1, math.ceil(most / 8))):
        x = across(value / width)
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 18}">{value}</text>')
    parts.append(
        f'<text class="axis mid" x="{WIDTH / 2}" y="{HEIGHT - 6}">mean evaluations per token of a document</text>'
    )
    title = f"{row.setting.label}, {row.setting.decoding}"
    return Figure(title, _svg(parts, f"{title}: histogram of evaluations per token"), [("c0", f"{total:,} documents")])


def _ranges(decoding: str, rows: list[Row]) -> Figure:
    left, line = 218, 24
    height = line * len(rows) + 44
    values = [row.setting.cost["nfe_computed"] for row in rows]
    across = _LogAxis(1, max(2, *(value["max"] for value in values)), left, WIDTH - 50)
    parts = []
    for tick in _decades(across):
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{height - 34}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{height - 18}">{tick:g}</text>')
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        y = 20 + place * line
        median, p95, most, mean = (across(max(1, value[key])) for key in ("median", "p95", "max", "mean"))
        label = _short_label(row)
        parts.append(f'<text class="label end" x="{left - 10}" y="{y + 4}">{escape(label)}</text>')
        parts.append(f'<path class="thin c0" d="M{median:.1f} {y}H{most:.1f}"/>')
        parts.append(f'<path class="thick c0" d="M{median:.1f} {y}H{p95:.1f}"/>')
        parts.append(
            f'<circle class="dot c0" cx="{median:.1f}" cy="{y}" r="3.5"><title>median {value["median"]}</title>'
            "</circle>"
        )
        diamond = f"M{mean:.1f} {y - 5}l5 5l-5 5l-5 -5z"
        parts.append(f'<path class="dot control" d="{diamond}"><title>mean {value["mean"]:.2f}</title></path>')
        parts.append(f'<text class="tick" x="{most + 6:.1f}" y="{y + 4}">{value["max"]}</text>')
    legend = [("c0", "median, thick to p95, thin to the maximum"), ("control", "mean")]
    note = "These runs kept no costs of single documents, only mean, median, p95 and maximum per token."
    return Figure(decoding, _svg(parts, f"{decoding}: evaluations per token", height), legend, note)
