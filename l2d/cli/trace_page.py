"""A trace as one page that needs nothing else.

- `html_page`: the answer with tokens shaded by evaluations, and each token's candidates over time as inline SVG

The page's frame is `trace.html`; everything that comes from a model or a prompt is escaped here.
"""

from html import escape
from pathlib import Path

from l2d.cli.terminal import visible
from l2d.cli.trace import TokenTrace, Trace

WIDTH, HEIGHT = 760, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 14, 74
_LEVELS = 6  # shades of compute


def html_page(trace: Trace) -> str:
    """The page of a trace."""
    most = max((token.nfe_computed for token in trace.tokens), default=0)
    least = min((token.nfe_computed for token in trace.tokens), default=0)
    settings = {"checkpoint": trace.model, **trace.sampler, **trace.decoding}
    count = max(1, len(trace.tokens))
    facts = [
        ("tokens", str(len(trace.tokens))),
        ("budget T", str(trace.sampler["budget"])),
        ("evaluations / token", f"{sum(t.nfe_computed for t in trace.tokens) / count:.1f}"),
        ("passes / token", f"{sum(t.passes for t in trace.tokens) / count:.2f}"),
        ("changed on the way", str(sum(bool(t.changes) for t in trace.tokens))),
        ("differ from the base", str(sum(t.token != t.base_token for t in trace.tokens))),
    ]
    first = next((n for n, token in enumerate(trace.tokens) if token.changes), 0)
    parts = {
        "FACTS": "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts),
        "PROMPT": escape(trace.prompt),
        "ANSWER": "".join(_token(n, token, least, most) for n, token in enumerate(trace.tokens)),
        "SCALE": "".join(f'<i class="shade{level}"></i>' for level in range(_LEVELS)),
        "LEAST": str(least),
        "MOST": str(most),
        "FIGURES": "".join(_figure(n, token, trace) for n, token in enumerate(trace.tokens)),
        "SETTINGS": "".join(
            f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd></div>"
            for name, value in settings.items()
        ),
        "FIRST": str(first),
    }
    pieces = (Path(__file__).parent / "trace.html").read_text(encoding="utf-8").split("@@")
    return "".join(piece if place % 2 == 0 else parts[piece] for place, piece in enumerate(pieces))


def _shown(text: str) -> str:
    return escape(visible(text)) or "∅"


def _token(number: int, token: TokenTrace, least: int, most: int) -> str:
    level = 0 if most == least else round((token.nfe_computed - least) / (most - least) * (_LEVELS - 1))
    marks = " changed" * bool(token.changes) + " other" * (token.token != token.base_token)
    words = f"{token.nfe_computed} evaluations, {token.passes} passes, {len(token.changes)} changes"
    text = escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in token.text))
    if not text.strip():
        text = f'<span class="blank">{_shown(token.text)}</span>' + "<br>" * token.text.count("\n")
    label = escape(f"token {number + 1}, {token.text.strip() or 'white space'}: {words}", quote=True)
    data = f'data-number="{number}" title="{words}" aria-label="{label}"'
    return f'<button class="token shade{level}{marks}" {data}>{text}</button>'


def _figure(number: int, token: TokenTrace, trace: Trace) -> str:
    said = "as the base" if token.token == token.base_token else f"the base says “{_shown(token.base_text)}”"
    numbers = {candidate.token: place for place, candidate in enumerate(token.candidates)}
    legend = "".join(
        f'<li><span class="swatch c{place}"></span><code>{_shown(candidate.text)}</code>'
        f"<small>{candidate.probabilities[0]:.2f} → {candidate.probabilities[-1]:.2f}</small></li>"
        for place, candidate in enumerate(token.candidates)
    )
    changes = [f"“{_shown(token.chosen_texts[n])}” at t = {trace.times[n]:.2f}" for n in token.changes]
    path = f"starts with “{_shown(token.chosen_texts[0])}”, " if token.chosen else ""
    path += "then " + ", then ".join(changes) if changes else "never changes" if token.chosen else "no trajectory"
    return (
        f'<figure id="token-{number}" tabindex="-1"><figcaption><b>Token {number + 1}</b> '
        f"<code>{_shown(token.text)}</code> <span>{said}; {path}.</span></figcaption>"
        f'{_chart(token, trace.times, numbers)}<ul class="legend">{legend}</ul>'
        f'<p class="note">{token.nfe_requested} evaluations requested, {token.nfe_computed} computed in '
        f"{token.passes} passes, the choice changed {len(token.changes)}×.</p></figure>"
    )


def _chart(token: TokenTrace, times: list[float], numbers: dict[int, int]) -> str:
    end = times[-1] or 1.0
    floor = HEIGHT - _BOTTOM
    peak = max(max(candidate.probabilities) for candidate in token.candidates)
    top = next(limit for limit in (0.1, 0.2, 0.4, 1.0) if peak <= limit or limit == 1.0)

    def across(time: float) -> float:
        return _LEFT + time / end * (WIDTH - _LEFT - _RIGHT)

    def up(probability: float) -> float:
        return floor - probability / top * (floor - _TOP)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = up(tick * top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 7}" y="{y + 4:.1f}">{tick * top:.2g}</text>')
        parts.append(f'<text class="tick mid" x="{across(tick * end):.1f}" y="{HEIGHT - 22}">{tick * end:.2g}</text>')
    parts.append(f'<text class="axis mid" x="{WIDTH / 2}" y="{HEIGHT - 5}">time t: noise to token</text>')
    for change in token.changes:
        x = across(times[change])
        parts.append(f'<line class="change" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor + 26}"/>')
    for number, candidate in reversed(list(enumerate(token.candidates))):
        spots = [(across(t), up(p), p, t) for t, p in zip(times, candidate.probabilities, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in spots)
        parts.append(f'<polyline class="c{number}" points="{line}"/>')
        for x, y, p, t in spots:
            tip = f"<title>{_shown(candidate.text)}: {p:.4f} at t = {t:.3f}</title>"
            parts.append(f'<circle class="c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{tip}</circle>')
    edges = [*[across(t) for t in times[: len(token.chosen)]], across(times[-1])]
    start = 0
    for n in [*token.changes, len(token.chosen)] if token.chosen else []:  # the strip of chosen tokens
        left, right = edges[start], edges[n]
        place = numbers.get(token.chosen[start])
        mark = "cnone" if place is None else f"c{place}"
        text = _shown(token.chosen_texts[start]) if right - left > 9 * min(len(token.chosen_texts[start]), 9) else ""
        parts.append(
            f'<rect class="{mark}" x="{left:.1f}" y="{floor + 9}" width="{max(2, right - left - 1.5):.1f}" '
            'height="20" rx="3"/>'
            f'<text class="chosen mid" x="{(left + right) / 2:.1f}" y="{floor + 23}">{text}</text>'
        )
        start = n
    label = escape(f"probabilities of {len(token.candidates)} candidates over time", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
