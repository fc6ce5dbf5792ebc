"""A trace as one page that needs nothing else.

- `html_page`: the answer with tokens shaded by evaluations, and each token's candidates over time as inline SVG

The page is `trace.html`, a template that escapes everything that comes from a model or a prompt; here are its numbers.
"""

from pathlib import Path
from typing import Any

from l2d.cli.terminal import harmless, visible
from l2d.cli.trace_data import TokenTrace, TraceData

WIDTH, HEIGHT = 760, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 14, 74
_LEVELS = 6  # shades of compute


def html_page(trace: TraceData) -> str:
    """The page of a trace."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # late: bad input needs no page

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"shown": lambda text: visible(text) or "∅", "harmless": harmless}
    computed = [token.nfe_computed for token in trace.tokens]
    least, most = min(computed, default=0), max(computed, default=0)
    count = max(1, len(trace.tokens))
    return environment.get_template("trace.html").render(
        trace=trace,
        facts={
            "tokens": len(trace.tokens),
            "budget T": trace.sampler["budget"],
            "evaluations / token": f"{sum(computed) / count:.1f}",
            "passes / token": f"{sum(token.passes for token in trace.tokens) / count:.2f}",
            "changed on the way": sum(bool(token.changes) for token in trace.tokens),
            "differ from the base": sum(token.token != token.base_token for token in trace.tokens),
        },
        settings={"checkpoint": trace.model, **trace.sampler, **trace.decoding},
        least=least,
        most=most,
        levels=[round((one - least) / max(1, most - least) * (_LEVELS - 1)) for one in computed],
        shades=range(_LEVELS),
        charts=[_chart(token, trace.times) for token in trace.tokens],
        first=next((n for n, token in enumerate(trace.tokens) if token.changes), 0),
        size=(WIDTH, HEIGHT, _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM),
    )


def _chart(token: TokenTrace, times: list[float]) -> dict[str, Any]:
    """Where everything of a token's chart is: ticks, changes of the choice, a line per candidate, the strip below."""
    end, floor = times[-1] or 1.0, HEIGHT - _BOTTOM
    peak = max(max(candidate.probabilities) for candidate in token.candidates)
    top = next(limit for limit in (0.1, 0.2, 0.4, 1.0) if peak <= limit or limit == 1.0)
    across = [_LEFT + time / end * (WIDTH - _LEFT - _RIGHT) for time in times]

    def up(share: float) -> float:
        return floor - share * (floor - _TOP)

    numbers = {candidate.token: number for number, candidate in enumerate(token.candidates)}
    starts = [0, *token.changes] if token.chosen else []
    edges = [*across[: len(token.chosen)], across[-1]]
    strip = []
    for start, stop in zip(starts, [*token.changes, len(token.chosen)], strict=False):
        width, text = edges[stop] - edges[start], token.chosen_texts[start]
        strip.append(
            {
                "candidate": numbers.get(token.chosen[start], "none"),
                "x": edges[start],
                "width": max(2, width - 1.5),
                "middle": edges[start] + width / 2,
                "text": text if width > 9 * min(len(text), 9) else None,
            }
        )
    return {
        "ticks": [(up(t), t * top, _LEFT + t * (WIDTH - _LEFT - _RIGHT), t * end) for t in (0, 0.25, 0.5, 0.75, 1)],
        "changes": [across[change] for change in token.changes],
        "lines": [
            [(x, up(p / top), p, time) for x, p, time in zip(across, candidate.probabilities, times, strict=True)]
            for candidate in token.candidates
        ],
        "strip": strip,
    }
