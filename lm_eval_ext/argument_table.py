"""All model args in one table: what `--model_args help=true` and `python -m lm_eval_ext args` print.

- `rows`: name, allowed values, default, meaning, and whether a task may set it with `gen_kwargs`
- `help_text`, `markdown`: the table for a terminal and for a document
"""

import textwrap
from collections.abc import Iterator

from lm_eval_ext.arguments import ARGUMENTS, SAMPLER_ARGUMENTS, SEARCH


def rows() -> Iterator[tuple[str, str, str, str, bool]]:
    """Name, allowed values, default, meaning, and whether it may come with `gen_kwargs`, of all model args."""
    for name, one in ARGUMENTS.items():
        default = one.default_words or (str(one.default) if isinstance(one.default, str) else str(one.default).lower())
        yield name, one.kind.allowed, default, one.help, name in SAMPLER_ARGUMENTS or name == SEARCH


def help_text() -> str:
    """The table for a terminal of 100 columns."""
    lines = ["Model args of --model l2d (those with * also per task, through gen_kwargs):", ""]
    for name, allowed, default, meaning, per_task in rows():
        lines.append(f"{name}{'*' if per_task else ''}  [{allowed}; default {default}]")
        lines += textwrap.wrap(meaning, 96, initial_indent="    ", subsequent_indent="    ")
    lines += ["", "A checkpoint's own sampler settings replace these defaults."]
    return "\n".join(lines)


def markdown() -> str:
    """The table for a document."""
    lines = ["| argument | allowed | default | meaning | per task |", "| --- | --- | --- | --- | --- |"]
    for name, allowed, default, meaning, per_task in rows():
        lines.append(f"| `{name}` | {allowed} | {default} | {meaning} | {'yes' if per_task else ''} |")
    return "\n".join(lines)
