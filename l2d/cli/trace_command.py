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
from l2d.cli.session import add_sampler_arguments, check_text, load_session, open_from, sampler_from
from l2d.cli.terminal import harmless, shade, visible
from l2d.cli.trace import Trace, refuse_untraceable, trace_prompt
from l2d.cli.trace_page import html_page


def terminal_text(trace: Trace, colour: bool = False) -> str:
    """The answer tinted by passes, then one line per token: cost, and the chosen token wherever it changed."""
    most = max((token.passes for token in trace.tokens), default=1)
    answer = "".join(shade(token.text, (token.passes - 1) / max(1, most - 1), colour) for token in trace.tokens)
    lines = [
        visible(trace.prompt) if not colour else harmless(trace.prompt),
        answer,
        "",
        "token       passes  computed  trajectory",
    ]
    for token in trace.tokens:
        steps = [*([0] if token.chosen else []), *token.changes]
        path = " -> ".join(f"{visible(token.chosen_texts[n])!r} at t = {trace.times[n]:.2f}" for n in steps)
        last = f"{visible(token.text)!r}"
        lines.append(f"{last:<10}  {token.passes:>6}  {token.nfe_computed:>8}  {path or 'the base'}")
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
    session = load_session(checkpoint, given.dtype, given.device, template=given.chat)
    if given.chat:
        prompt = session.conversation_text([{"role": "user", "content": prompt}])
    trace = trace_prompt(session, prompt, sampler_from(given), given.temperature, given.max_new_tokens)
    print(terminal_text(trace, colour=sys.stdout.isatty()))
    if given.out is not None:
        page = given.out if given.out.suffix == ".html" else given.out.with_name(given.out.name + ".html")
        data = json.dumps(dataclasses.asdict(trace), ensure_ascii=False, indent=1) + "\n"
        write_files(page.parent, {page.name: html_page(trace), page.with_suffix(".json").name: data}, "--out")
        print(f"{page} and {page.with_suffix('.json')}")
