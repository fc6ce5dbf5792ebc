"""What the commands of the studies have in common.

- `chosen_methods`: of an option with commas
- `refused`: an error in one line
"""

import sys
from collections.abc import Iterable


def chosen_methods(names: str | None, known: Iterable[str]) -> list[str]:
    """The methods whose steps are run, in the order of `known`; all without `names`. Raises `ValueError`."""
    ordered = list(known)
    asked = ordered if names is None else names.split(",")
    if unknown := [name for name in asked if name not in ordered]:
        raise ValueError(f"methods={names!r} holds {unknown[0]!r}, which is none of {', '.join(ordered)}.")
    return [name for name in ordered if name in asked]


def refused(message: str) -> int:
    """Print `message` in one line on standard error; the exit status for it."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2
