"""Values of a data file, and the texts that are trained on: nothing is guessed and nothing is changed.

- `DataError`: names file, example and column; `Unavailable`
- `Number`, `parse_json`: JSON whose numbers stay as they are written
- `text_of`, `fill`: a column's value, or a template of columns, as text
- `plain`: lists and objects for a chat template
- `matches`: whether a value is one that a recipe names
"""

import json
import re
import string
from decimal import Decimal
from typing import Any, NoReturn

_FORMATTER = string.Formatter()


class DataError(ValueError):
    """An example that cannot be trained on as it stands; the message names file, example and column."""


class Unavailable(ValueError):
    """Something that has to be downloaded, and cannot be from here."""


class Number(str):
    """A number of a JSON file, with the characters that it has there; a format (`{price:.2f}`) sees its value."""

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        return format(int(self) if re.fullmatch(r"-?\d+", self) else Decimal(self), spec)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return content


def _no_number(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a JSON number")


DECODER = json.JSONDecoder(
    parse_int=Number, parse_float=Number, parse_constant=_no_number, object_pairs_hook=_object
)  # fmt: skip


def parse_json(text: str) -> Any:
    """The value of a JSON text, with every number as a `Number`. Raises `ValueError`."""
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def checked(text: str) -> str:
    """`text`, which must be Unicode that can be encoded. Raises `ValueError` for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise ValueError(f"holds half of a surrogate pair, U+{ord(lone):04X}, which is not a character") from error
    return text


def text_of(value: Any, typed: bool) -> str:
    """A column's value as text: texts unchanged, JSON numbers and booleans as they are written, null as nothing.

    Args:
        typed: the value is of a typed table (Parquet, a hub's data set, `datasets.Dataset`) and not of a text file.

    Raises `ValueError` for what is not text there.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return checked(str(value))
    if isinstance(value, bool) and not typed:
        return "true" if value else "false"
    kind = type(value).__name__
    if isinstance(value, (list, dict)):
        raise ValueError(f"holds {value!r:.60} (a {kind}), which is not text: name a column of texts")
    raise ValueError(
        f"holds {value!r:.60} ({kind}), which is not text: say how it is written, with a format in columns such as "
        "{COLUMN:d}, {COLUMN:.2f}, {COLUMN:%Y-%m-%d} or {COLUMN!s}, or store it as text"
    )


def fields(template: str) -> list[str]:
    """The columns in the braces of a template. Raises `ValueError` if they are not closed."""
    return [name for _, name, _, _ in _FORMATTER.parse(template) if name is not None]


def fill(template: str, row: dict[str, Any], typed: bool) -> str:
    """`template` with the row's values; empty if it names columns and all of them are null or empty.

    Raises `ValueError` that begins with the column.
    """
    parts, values = [], []
    for literal, name, spec, conversion in _FORMATTER.parse(template):
        parts.append(literal)
        if name is None:
            continue
        value = row.get(name)
        try:
            if value is not None and (spec or conversion):
                value = checked(format(_FORMATTER.convert_field(value, conversion), spec or ""))
            values.append(text_of(value, typed))
        except (ValueError, TypeError) as error:
            raise ValueError(f"column {name!r}: {error}") from error
        parts.append(values[-1])
    return "".join(parts) if not values or any(values) else ""


def plain(value: Any, typed: bool) -> Any:
    """`value` with Python's numbers, as templates need it; of typed tables without the nulls that only fill a column.

    Raises `ValueError` for a number that would be written otherwise than in the file, and for what JSON cannot hold.
    """
    if isinstance(value, Number):
        number = int(value) if re.fullmatch(r"-?\d{1,4000}", value) else float(value)
        if repr(number) != value:
            raise ValueError(f"the number {value} would be written as {number!r}: write it so, or as a text")
        return number
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if not (typed and inner is None)}
        return {checked(name): plain(inner, typed) for name, inner in kept.items()}
    if isinstance(value, list):
        return [plain(inner, typed) for inner in value]
    if isinstance(value, str):
        return checked(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(f"holds {value!r:.60} ({type(value).__name__}), which JSON cannot hold: store it as text")


def key_of(value: Any) -> str | None:
    """How values of a recipe and of a column are compared: as text, booleans as JSON writes them; null is `None`."""
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


def matches(value: Any, named: list[Any]) -> bool:
    """Whether a column's value is among those that a recipe names; numbers are equal by value, texts by characters."""
    for other in named:
        if key_of(value) == key_of(other):
            return True
        number = isinstance(other, (int, float)) and not isinstance(other, bool)
        if number and isinstance(value, Number) and Decimal(value) == Decimal(str(other)):
            return True
        if isinstance(other, bool) and isinstance(value, str) and value == str(other):  # True in a CSV file
            return True
    return False
