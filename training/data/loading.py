"""Data sets of a recipe, from a hub, files or folders.

- `load_examples`: training and evaluation examples
- `load_split`: one split, to measure on
- `Table`: rows, and what is known of their columns

CSV, TSV, JSON and JSON Lines are read by `files`, wherever they lie, so that no loader guesses types. Parquet and what
`datasets` saved have types: columns of text are used, others only where a recipe says how they are written.
"""

import dataclasses
import os
import re
from typing import Any

import datasets

from training.console import say
from training.data.examples import make_examples, plan_of, quietly
from training.data.files import columns_of, read_text_files, stream_text_files
from training.data.mixture import mix, mix_streams
from training.data.options import DataArguments, check_file, file_kind, named
from training.data.values import DataError, Unavailable

SHUFFLED = 10_000  # examples of a stream among which the next one is drawn
_CSV_DEFAULTS = {"header": "infer", "names": None, "column_names": None, "skiprows": None, "quotechar": '"',
                 "escapechar": None, "comment": None, "encoding": None, "quoting": 0, "dialect": None}  # fmt: skip


@dataclasses.dataclass
class Table:
    """Rows of one file, split or subset.

    Attributes:
        typed: columns have types; else a row is JSON text, see `files`.
        first: number of rows before these in the split.
    """

    rows: Any
    columns: list[str]
    typed: bool
    name: str
    first: int = 0
    subset: str | None = None


@quietly()
def load_examples(
    data: DataArguments, guidance_classes: list[str] | None, seed: int, processes: int | None = None
) -> tuple[Any, datasets.Dataset | None]:
    """Training and evaluation examples, see `examples`; with `streaming` the training examples are a stream.

    What was computed with the same settings before is read from the cache of `datasets`.

    Raises `ValueError` for data that are not there, are empty, or lack the columns.
    """
    entries = data.entries()
    parts = [
        _examples("dataset", part, part.train_split, guidance_classes, processes, data.streaming) for part, _ in entries
    ]
    train, line = parts[0], None
    if len(parts) > 1 or entries[0][1] is not None:
        names, weights = [str(part.dataset) for part, _ in entries], [weight for _, weight in entries]
        train, line = (mix_streams if data.streaming else mix)(parts, names, weights, seed)
    say(line)
    if data.streaming:
        return train.shuffle(seed=seed, buffer_size=SHUFFLED), _evaluation(data, guidance_classes, processes)
    if not data.eval_holdout:
        return train, _evaluation(data, guidance_classes, processes)
    usable = [row for row, reason in enumerate(train["left_out"][:]) if reason is None]
    if data.eval_holdout >= len(usable):
        raise ValueError(f"eval_holdout={data.eval_holdout} leaves nothing of {len(usable)} examples to train on.")
    rows = datasets.Dataset.from_dict({"row": usable}).train_test_split(test_size=data.eval_holdout, seed=seed)
    aside = sorted(rows["test"]["row"])
    return train.select(sorted(set(range(len(train))) - set(aside))), train.select(aside)


def _evaluation(data: DataArguments, classes: list[str] | None, processes: int | None) -> datasets.Dataset | None:
    if not data.has_eval:
        return None
    if data.eval_dataset:
        split = data.eval_split or ("train" if file_kind(data.eval_dataset) else "test")
        part = dataclasses.replace(data, dataset=data.eval_dataset, streaming=False)
        return _examples("eval_dataset", part, split, classes, processes, False)
    split = str(data.eval_split)
    return datasets.concatenate_datasets(
        [_examples("dataset", part, split, classes, processes, False) for part, _ in data.entries()]
    )


@quietly()
def load_split(argument: str, data: DataArguments) -> datasets.Dataset:
    """The examples of `data.dataset`, split `data.train_split`, without classes.

    Raises `ValueError`, which calls the data set `argument`, for data that are not there, are empty or lack columns.
    """
    return _examples(argument, data, data.train_split, None, None, False)


def _examples(
    argument: str, data: DataArguments, split: str, classes: list[str] | None, processes: int | None, streaming: bool
) -> Any:
    """The examples of one data set, all its subsets together."""
    source = named(argument, data.dataset if isinstance(data.dataset, str) else None)
    tables = _read(argument, source, data.dataset_config, split, streaming)
    everywhere = list(dict.fromkeys(column for table in tables for column in table.columns))
    parts, unused = [], []
    for table in tables:
        if not streaming and len(table.rows) == 0:
            continue
        plan, others = plan_of(table.columns, everywhere, data, classes, table.typed)
        plan = dataclasses.replace(plan, source=table.name, first=table.first, subset=table.subset)
        parts.append(make_examples(table.rows, plan, processes))
        unused += others
    if not parts or (not streaming and not sum(map(len, parts))):
        raise ValueError(f"{argument}={source!r}, split {split!r}, is empty: there is nothing to train on.")
    if not streaming:
        reasons = [reason or "" for part in parts for reason in part.unique("left_out")]
        for name in data.exclude or ():
            if not any(reason.startswith(f"excluded by {name}: ") for reason in reasons):
                say(f"{argument}={source}: exclude leaves out no example by {name}")
    if unused := list(dict.fromkeys(unused)):
        say(f"{argument}={source}: not used are the columns {', '.join(unused)}")
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


# ---- reading -----------------------------------------------------------------------------------------------------


def _read(argument: str, source: str, configs: list[str] | None, split: str, streaming: bool) -> list[Table]:
    tables = []
    try:
        for config in [*configs] if configs else [None]:
            for piece in split.split("+"):
                table = _read_piece(argument, source, config, piece.strip(), streaming)
                tables.append(dataclasses.replace(table, subset=config))
    except DataError:
        raise
    except (OSError, datasets.exceptions.DatasetsError, KeyError, ValueError, RuntimeError) as error:
        if str(error).startswith(argument):
            raise  # says it all
        kind = ValueError if os.path.exists(source) or file_kind(source) else Unavailable
        reason = str(error.__cause__ or error).rstrip(".")
        raise kind(f"{argument}={source!r} cannot be read (split {split!r}): {reason}; check its format.") from error
    return tables


def _read_piece(argument: str, source: str, config: str | None, piece: str, streaming: bool) -> Table:
    """One split, or a slice of it such as `train[:100]`."""
    name = piece.split("[")[0]
    table = _read_split(argument, source, config, name, streaming)
    if name == piece:
        return table
    if streaming:
        raise ValueError(
            f"{argument}: a slice such as {piece!r} needs all rows, and streaming reads them later: keep one."
        )
    (part,) = datasets.ReadInstruction.from_spec(piece).to_absolute({name: len(table.rows)})
    start, end = part.from_ or 0, len(table.rows) if part.to is None else part.to
    return dataclasses.replace(table, rows=table.rows.select(range(start, end)), first=start)


def _read_split(argument: str, source: str, config: str | None, split: str, streaming: bool) -> Table:
    if (kind := file_kind(source)) and not os.path.isdir(source):
        check_file(argument, source)
        if split != "train":
            raise ValueError(f"a file has no split {split!r}, only ['train']")
        if kind == "parquet":
            rows = datasets.load_dataset("parquet", data_files={"train": source}, split="train", streaming=streaming)
            return _typed(rows, source)
        return _text([source], [source], kind, "\t" if re.search(r"\.tsv\b", source.lower()) else ",", streaming)
    if any(os.path.isfile(os.path.join(source, name)) for name in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(source)
        if isinstance(saved, datasets.Dataset):
            if split != "train":
                raise ValueError(f"{argument}={source!r} has no split {split!r}: choose train.")
            return _typed(saved.to_iterable_dataset() if streaming else saved, source)
        if split not in saved:
            raise ValueError(f"{argument}={source!r} has no split {split!r}: choose one of {', '.join(saved)}.")
        return _typed(saved[split].to_iterable_dataset() if streaming else saved[split], source)
    builder = datasets.load_dataset_builder(source, config)
    files = getattr(builder.config, "data_files", None)
    if builder.name in ("csv", "json") and files:
        return _text_files(argument, source, builder, split, streaming)
    return _typed(datasets.load_dataset(source, config, split=split, streaming=streaming), source)


def _typed(rows: Any, name: str) -> Table:
    return Table(rows, list(rows.column_names or next(iter(rows))), True, name)


def _text(paths: list[str], names: list[str], kind: str, delimiter: str, streaming: bool) -> Table:
    rows = (stream_text_files if streaming else read_text_files)(paths, names, kind, delimiter)
    return Table(rows, columns_of(rows), False, names[0])


def _text_files(argument: str, source: str, builder: Any, split: str, streaming: bool) -> Table:
    """CSV or JSON files of a folder or hub repository, which its patterns or its README assign to a split."""
    config, files = builder.config, builder.config.data_files
    if split not in files:
        raise ValueError(f"{argument}={source!r} has no split {split!r}: choose one of {', '.join(map(str, files))}.")
    if builder.name == "csv":
        other = [name for name, value in _CSV_DEFAULTS.items() if getattr(config, name, value) != value]
    else:
        other = [name for name in ("field",) if getattr(config, name, None)]
    if other:
        raise ValueError(
            f"{argument}={source!r}: its README sets {other[0]}, which is not followed: give a file instead."
        )
    urls = [str(file) for file in files[split]]
    paths = datasets.DownloadManager().download(urls)
    root = os.path.join(os.path.abspath(source), "")
    names = [url.removeprefix(root) if os.path.isdir(source) else url.split("/", 3)[-1] for url in urls]
    delimiter = str(getattr(config, "delimiter", None) or getattr(config, "sep", ","))
    tab = builder.name == "csv" and all(re.search(r"\.tsv\b", url.lower()) for url in urls)
    return _text(paths, names, builder.name, "\t" if tab else delimiter, streaming)
