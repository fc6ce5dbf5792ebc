"""Rows of CSV, TSV, JSON and JSON Lines files, as characters: what a loader would guess is never asked.

- `read_text_files`: a data set of the rows of some files, read once and then cached
- `stream_text_files`: the same without reading before
- `columns_of`: the names of their columns

A row is kept as its JSON text. Files may be compressed (gzip, bzip2, xz), must be UTF-8, and may begin with a
byte-order mark.
"""

import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

import datasets

from training.data.values import DECODER, DataError, parse_json

_VERSION = 1  # of what is cached: raise it when rows are read otherwise
_OPENERS: list[tuple[bytes, Any]] = [(b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)]
_FEATURES = datasets.Features({name: datasets.Value("string") for name in ("source", "row", "new_columns")})
_FEATURES["number"] = datasets.Value("int64")
_PEEKED = 1000  # rows of a stream whose columns are taken for those of all


def read_text_files(paths: list[str], names: list[str], kind: str, delimiter: str) -> datasets.Dataset:
    """The rows of all `paths`, in order, called `names` in messages. Raises `DataError`."""
    options = {**_arguments(paths, names, kind, delimiter), "version": _VERSION}
    if next(_rows(**options), None) is None:
        return datasets.Dataset.from_dict({name: [] for name in _FEATURES}, features=_FEATURES)
    try:
        return datasets.Dataset.from_generator(_rows, features=_FEATURES, gen_kwargs=options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def stream_text_files(paths: list[str], names: list[str], kind: str, delimiter: str) -> datasets.IterableDataset:
    """The same rows, read while they are used."""
    options = {**_arguments(paths, names, kind, delimiter), "version": _VERSION}
    return datasets.IterableDataset.from_generator(_rows, features=_FEATURES, gen_kwargs=options)


def _arguments(paths: list[str], names: list[str], kind: str, delimiter: str) -> dict[str, Any]:
    stats = [os.stat(path) for path in paths]
    files = tuple((p, n, s.st_size, s.st_mtime_ns) for p, n, s in zip(paths, names, stats, strict=True))
    return {"files": files, "kind": kind, "delimiter": delimiter}


def columns_of(rows: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """All columns that rows of a text file have, in the order in which they first appear."""
    if isinstance(rows, datasets.Dataset):
        new = rows.unique("new_columns")
    else:
        new = [row["new_columns"] for row in itertools.islice(rows, _PEEKED)]
    return list(dict.fromkeys(name for names in new if names for name in json.loads(names)))


def _rows(files: Any, kind: str, delimiter: str, version: int) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for path, name, *_ in files:
        with _open(path, name) as file:
            rows = _csv_rows(file, name, delimiter) if kind == "csv" else _json_rows(file, name)
            for number, (names, row) in enumerate(rows, 1):
                new = [column for column in names if column not in seen]
                seen.update(new)
                columns = json.dumps(new) if new else None
                yield {"source": name, "number": number, "row": row, "new_columns": columns}


def _open(path: str, name: str) -> IO[bytes]:
    with open(path, "rb") as file:
        start = file.read(6)
    if start.startswith(b"PK\x03\x04"):
        raise DataError(f"{name} is a zip archive: unpack it.")
    return next((opener for magic, opener in _OPENERS if start.startswith(magic)), open)(path, "rb")


def _lines(file: IO[bytes], name: str) -> Iterator[str]:
    """Lines that end with a line feed; a carriage return is a character like others."""
    try:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{name}, line {number}: is not UTF-8 ({error.reason}): save the file as UTF-8."
                ) from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{name}: its compressed content is damaged ({error}): copy or compress it again.") from error


def _csv_rows(file: IO[bytes], name: str, delimiter: str) -> Iterator[tuple[list[str], str]]:
    """Column names and the row as JSON, all cells texts."""
    csv.field_size_limit(sys.maxsize)
    reader, number = csv.reader(_lines(file, name), delimiter=delimiter, strict=True), 0
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = _header(cells, name)
                continue
            number += 1
            if len(cells) != len(header):
                raise DataError(
                    f"{name}, example {number} (line {reader.line_num}): has {len(cells)} cells, and the header names "
                    f"{len(header)} columns: correct it, with quotes around cells that hold {delimiter!r} or line ends."
                )
            yield header, json.dumps(dict(zip(header, cells, strict=True)), ensure_ascii=False)
    except csv.Error as error:
        raise DataError(
            f"{name}, example {number + 1} (line {reader.line_num}): cannot be read ({error}): put quotes around cells "
            "that hold quotes, commas or line ends, and double the quotes inside."
        ) from error


def _header(cells: list[str], name: str) -> list[str]:
    if twice := [cell for cell in cells if cells.count(cell) > 1]:
        raise DataError(f"{name}: its header names the column {twice[0]!r} twice: rename one of them.")
    return cells


def _json_rows(file: IO[bytes], name: str) -> Iterator[tuple[list[str], str]]:
    """Keys and text of every object: one a line, or in a list, or one after the other."""
    lines = _lines(file, name)
    number, line_number = 0, 0
    try:
        for line in lines:
            line_number += 1
            if not line.strip():
                continue
            if number == 0 and not _is_object(line):
                yield from _whole_json(line + "".join(lines), name)
                return
            number += 1
            yield _keys(parse_json(line), name, number), line.strip()
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{name}, example {number} (line {line_number}): cannot be read, it is not JSON ({error}): check its "
            "format."
        ) from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError as error:
        # A whole line that is damaged belongs to a file with one object a line; the first of several lines ends early.
        return line.lstrip().startswith("{") and error.pos < len(line.rstrip())
    except RecursionError:
        return True


def _whole_json(text: str, name: str) -> Iterator[tuple[list[str], str]]:
    """Objects of a list, or written one after the other over several lines."""
    position, number, listed = _skip(text, 0), 0, text.lstrip().startswith("[")
    position = _skip(text, position + 1) if listed else position
    while position < len(text) and not (listed and text[position] == "]"):
        number += 1
        try:
            value, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}, example {number}: cannot be read, it is not JSON ({error}): check its format."
            ) from error
        yield _keys(value, name, number), text[position:end]
        position = _skip(text, end)
        if listed and position < len(text) and text[position] == ",":
            position = _skip(text, position + 1)
        elif listed and text[position : position + 1] != "]":
            raise DataError(f"{name}, after example {number}: a comma or the end of the list is missing.")
    if listed and (position >= len(text) or text[position + 1 :].strip()):
        raise DataError(f"{name}: its list is not closed, or something follows it: it must be one list of objects.")


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _keys(value: Any, name: str, number: int) -> list[str]:
    if not isinstance(value, dict):
        raise DataError(f"{name}, example {number}: is {value!r:.40} and not an object with columns as its keys.")
    return list(value)
