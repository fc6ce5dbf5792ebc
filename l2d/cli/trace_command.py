"""`python -m l2d trace DIR --prompt ... [--out trace.html]`: a trace in the terminal, and as a page.

- `terminal_text`: the compact form
- `add_arguments`, `run`: the command
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from l2d.cli.files import write_files
from l2d.cli.parser import check_folder
from l2d.cli.session import add_sampler_arguments, check_text, open_from, sampler_from, session_from
from l2d.cli.terminal import Waiting, fitted, harmless, shade, visible, width
from l2d.cli.trace import Trace, refuse_untraceable, trace_prompt
from l2d.cli.trace_page import html_page

_COLUMNS = 5, 20
"""Least and most columns of a token."""


def terminal_text(trace: Trace, colour: bool = False) -> str:
    """The answer tinted by passes, then one line per token: cost, first choice, and each change of it with its time."""
    most = max((token.passes for token in trace.tokens), default=1)
    answer = "".join(shade(token.text, (token.passes - 1) / max(1, most - 1), colour) for token in trace.tokens)
    lines = [
        visible(trace.prompt) if not colour else harmless(trace.prompt),
        answer,
        "",
    ]
    names = [repr(visible(token.text)) for token in trace.tokens]
    least, most = _COLUMNS
    columns = min(most, max(least, *map(width, names), 0))
    lines.append(f"{'token':<{columns}}  passes  evaluations  choice")
    for name, token in zip(names, trace.tokens, strict=True):
        path = [repr(visible(text)) for text in token.chosen_texts[:1] or ["the base"]]
        path += [f"{visible(token.chosen_texts[n])!r} at t = {trace.times[n]:.2f}" for n in token.changes]
        lines.append(f"{fitted(name, columns)}  {token.passes:>6}  {token.nfe_computed:>11}  {' -> '.join(path)}")
    changed = sum(bool(token.changes) for token in trace.tokens)
    differing = sum(token.token != token.base_token for token in trace.tokens)
    nfe_computed = sum(token.nfe_computed for token in trace.tokens) / max(1, len(trace.tokens))
    lines.append(
        f"{len(trace.tokens)} tokens, {nfe_computed:.1f} evaluations each; the choice changed on the way in {changed} "
        f"of them, {differing} differ from what the base would say next."
    )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m l2d trace`."""
    add_sampler_arguments(parser)
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from the standard input")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    parser.add_argument("--out", type=Path, help="page to write, with the data as .json beside it")


def run(given: argparse.Namespace) -> None:
    """Trace one prompt and show it. Raises `ValueError`."""
    checkpoint = open_from(given)
    refuse_untraceable(checkpoint.sampler(**sampler_from(given)))
    if given.out is not None:
        check_folder("out", given.out.parent)
    prompt = sys.stdin.buffer.read().decode(errors="surrogateescape") if given.prompt == "-" else given.prompt
    check_text("prompt", prompt)
    session = session_from(given, given.chat, checkpoint)
    if given.chat:
        prompt = session.conversation_text([{"role": "user", "content": prompt}])
    options = sampler_from(given), given.temperature, given.max_new_tokens
    with Waiting(sys.stderr) as waiting:
        trace = trace_prompt(session, prompt, *options, wait=waiting.say)
    print(terminal_text(trace, colour=sys.stdout.isatty()))
    if given.out is not None:
        page = given.out if given.out.suffix == ".html" else given.out.with_name(given.out.name + ".html")
        data = json.dumps(dataclasses.asdict(trace), ensure_ascii=False, indent=1) + "\n"
        write_files(page.parent, {page.name: html_page(trace), page.with_suffix(".json").name: data}, "--out")
        print(f"{page} and {page.with_suffix('.json')}")
