"""Small edits of the source that a test must notice. `python -m tests.mutations` tries all of them.

- `Mutation`: one edit, and the tests of which one must fail
- `mutated`: the text of its file after the edit

The lists are in `sampling`, `network`, `training`, `evaluation` and `bases`.
"""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutation:
    """`old` in `file` becomes `new`; then one of `tests` (pytest ids, with spaces between them) must fail.

    name: the area, a colon, and what is wrong after the edit.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


def mutated(mutation: Mutation, root: Path) -> str:
    """The file's text after the edit. Raises `ValueError` unless `old` occurs exactly once in it and `new` differs."""
    text = (root / mutation.file).read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        raise ValueError(f"mutation {mutation.name!r}: its old text occurs {count} times in {mutation.file}, not once.")
    return text.replace(mutation.old, mutation.new)
