"""Text benchmarks: the answer in a completion, and its comparison with the reference.

- `judge`: a completion's `Verdict`
"""

import dataclasses
import functools
import re
from collections.abc import Callable

from lm_eval_ext.released import math_answers
from lm_eval_ext.released.benchmarks import BENCHMARKS, Row


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`answer` and `reference` as extracted, `None` where nothing counts as an answer; whether the answer is right."""

    answer: str | float | None
    reference: str | float | None
    correct: bool


def judge(name: str, row: Row, completion: str) -> Verdict:
    """Extract and compare, as the release does for the benchmark `name`.

    Raises `math_answers.RAISED` for a completion of MATH on which the release aborts.
    """
    benchmark = BENCHMARKS[name]
    extract: Callable[[str], str | float | None]
    if name == "gsm8k":
        extract = _marked_number
    elif name == "math":
        extract = math_answers.extract
    elif benchmark.letters is not None:
        extract = functools.partial(_letter, letters=benchmark.letters(row))
    else:
        raise ValueError(f"benchmark={name!r} is judged by running programs, see `programs`.")
    answer, reference = extract(completion), extract(benchmark.reference(row))
    compare = math_answers.equal if name == "math" else _equal
    return Verdict(answer, reference, compare(answer, reference))


def _equal(answer: str | float | None, reference: str | float | None) -> bool:
    return answer is not None and answer == reference


def _marked_number(text: str) -> str | None:
    """GSM8K: the number after the first `#### `, commas deleted."""
    match = re.search(r"#### (-?[0-9.,]+)", text)
    return None if match is None else match[1].replace(",", "")


def _letter(text: str, letters: str) -> str | None:
    """The first of `letters` that no ASCII letter or digit follows; nothing is required before it."""
    match = re.search(rf"[{letters}](?![A-Za-z0-9])", text)
    return None if match is None else match[0]
