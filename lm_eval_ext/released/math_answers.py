r"""MATH: the answer in a text, and when two answers are equal, as the release decides it.

- `extract`: the last `\boxed{...}`, cleaned, else the last number as a float, else `None`
- `equal`: equal texts, equal numbers, or a number that rounds to a fraction

Some answers make the release raise; so do these functions, with the same exceptions, which `RAISED` lists.
"""

import re

RAISED = (IndexError, ValueError, OverflowError)
"""What `extract` and `equal` raise where the release aborts: a root or fraction without argument, nan, infinity."""

_NUMBER = re.compile(r"\d*\.?\d+")  # no sign, no thousands comma; \d is any Unicode digit
_FRACTION = re.compile(r"\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}")
_DELETED = (
    *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", "")),
    *(("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")),
)


def extract(text: str) -> str | float | None:
    r"""The answer in `text`, `None` if there is none. Raises `IndexError` for a `\sqrt` or `\frac` at the end."""
    piece = _last_box(text)
    if piece is not None:
        return _clean(piece[len("\\boxed{") : -1]) if piece.startswith("\\boxed{") else None
    numbers = _NUMBER.findall(text)
    return float(numbers[-1]) if numbers else None


def equal(answer: str | float | None, reference: str | float | None) -> bool:
    """Whether `answer` counts as `reference`. Raises for nan or infinity against a fraction."""
    if answer is None or reference is None:
        return False
    if answer == reference:
        return True
    answer, reference = _number(answer), _number(reference)
    if isinstance(answer, str) == isinstance(reference, str):
        return not isinstance(answer, str) and answer == reference
    number, text = (reference, answer) if isinstance(answer, str) else (answer, reference)
    fraction = _FRACTION.fullmatch(str(text))
    return fraction is not None and round(float(number) * int(fraction[2])) == int(fraction[1])


def _number(value: str | float) -> str | float:
    try:
        return float(value)  # underscores between digits included
    except ValueError:
        return value


def _last_box(text: str) -> str | None:
    """From the last marker to the brace that closes the first opened one; `None` if nothing closes."""
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return None
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if text[end] == "}" and depth == 0:
            return text[start : end + 1]
    return None


def _clean(text: str) -> str:
    for old, new in _DELETED:
        text = text.replace(old, new)
    text = text.partition("\\text{ ")[0]  # units
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # a variable's name
        text = sides[1]
    text = _brace_fractions(_brace_roots(text).replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else _slash_to_fraction(text)
    head, *rest = text.split("_")
    if rest:
        rest[0] = rest[0].replace("{", "").replace("}", "")
        text = "_".join([head, *rest])
    return text if "(" in text else text.replace(",", "")


def _brace_roots(text: str) -> str:
    r"""`\sqrt3` -> `\sqrt{3}`."""
    head, *roots = text.split("\\sqrt")
    return head + "".join(f"\\sqrt{root if root[0] == '{' else f'{{{root[0]}}}{root[1:]}'}" for root in roots)


def _brace_fractions(text: str) -> str:
    r"""`\frac12` -> `\frac{1}{2}`; the text as it is if an argument without braces is too short."""
    braced, *fractions = text.split("\\frac")
    for fraction in fractions:
        if fraction[0] != "{":
            if len(fraction) < 2:
                return text
            below = fraction[1:] if fraction[1] == "{" else f"{{{fraction[1]}}}{fraction[2:]}"
            fraction = f"{{{fraction[0]}}}{below}"
        braced += f"\\frac{fraction}"
    return braced


def _slash_to_fraction(text: str) -> str:
    r"""`1/2` -> `\frac{1}{2}`, for two whole numbers written plainly."""
    try:
        above, below = map(int, text.split("/"))
    except ValueError:
        return text
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
