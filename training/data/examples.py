"""From rows to examples: which columns make a prompt and a completion, a conversation or a text.

- `Plan`, `plan_of`: what a recipe makes of the columns that there are
- `make_examples`: rows -> one table of `source`, `number` (in the file, from 1), `example` (JSON), `left_out` (the
  reason, or null) and perhaps `guidance_class`
- `as_examples`: the same of a `datasets.Dataset` with columns that are named as here

An example is `{"prompt", "completion"}`, `{"messages"}` or `{"text"}`, perhaps with `tools` and
`chat_template_kwargs`. As JSON all of them fit one table, whatever their columns held.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import datasets
import transformers

from training.data.conversations import as_turns, unrolled
from training.data.options import DataArguments, mapping
from training.data.values import DataError, fields, fill, key_of, matches, parse_json, plain, text_of

TARGETS = ("prompt", "completion", "messages", "text")  # what `columns` can make
_PAIR, _CONVERSATION, _PLAIN = ("prompt", "completion"), ("messages",), ("text",)
_KINDS = (_PAIR, _CONVERSATION, _PLAIN)
_BESIDE = ("tools", "chat_template_kwargs")
_REFUSED = ("image", "images", "video", "videos", "audio", "audios")
_TOKENS = ("input_ids", "assistant_masks", "completion_mask")
SUBSET = "subset"  # column that holds the configuration a row was read from
_VERSION = 1  # of what is cached: raise it when examples are made otherwise


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The libraries log no errors, which we report in one line, and draw no bars where nobody watches."""
    libraries = (datasets.logging, transformers.logging)
    levels, bars = [library.get_verbosity() for library in libraries], not datasets.are_progress_bars_disabled()
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is made of a table's columns.

    Attributes:
        columns: column, or template of columns, of every part of an example.
        typed: rows have columns with types; else they are rows of a text file.
        source, first: of a typed table, its name and the number of rows before it.
    """

    columns: dict[str, str]
    typed: bool
    source: str = ""
    first: int = 0
    subset: str | None = None
    unroll: bool = False
    exclude: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    class_columns: tuple[str, ...] = ()
    class_map: dict[str | None, str] | None = None
    class_name: str | None = None
    class_number: bool = False  # the column guidance_class holds numbers already
    version: int = _VERSION

    @property
    def needed(self) -> list[str]:
        """The columns that are read."""
        named = [name for source in self.columns.values() for name in (fields(source) if "{" in source else [source])]
        more = (*_BESIDE, *self.exclude, *self.class_columns, *(["guidance_class"] if self.class_number else []))
        return list(dict.fromkeys([*named, *more]))


def plan_of(
    available: list[str], everywhere: list[str], data: DataArguments, classes: list[str] | None, typed: bool
) -> tuple[Plan, list[str]]:
    """The plan for a table, and the columns of it that nothing uses.

    Args:
        available: columns of this table; everywhere: of it and of the other subsets.

    Raises `ValueError` for columns that are not there.
    """
    columns = _columns(data, available)
    exclude = {
        name: value if isinstance(value, list) else [value]
        for name, value in (mapping("exclude", data.exclude) or {}).items()
    }
    for option, names in (("exclude", [*exclude]), ("guidance_column", data.guidance_column or [])):
        for name in names:
            if name not in (*everywhere, SUBSET):
                raise ValueError(
                    f"{option}={name!r} is not a column of the dataset: choose from {', '.join(everywhere)}."
                )
    for name in available:
        if name in _TOKENS:
            raise ValueError(
                f"the dataset has the column {name!r}, and its texts are tokenized here: remove the column."
            )
        if typed and name in _REFUSED:
            raise ValueError(f"the dataset has the column {name!r}, and only text is trained on: remove the column.")
    plan = Plan(
        columns=columns,
        typed=typed,
        unroll=data.unroll,
        exclude=exclude,
        classes=tuple(classes) if classes else None,
        class_columns=tuple(data.guidance_column or ()) if classes else (),
        class_map=_class_map(data),
        class_name=data.guidance_class,
    )
    return plan, [name for name in available if name not in plan.needed]


def _class_map(data: DataArguments) -> dict[str | None, str] | None:
    named = mapping("guidance_map", data.guidance_map)
    return None if named is None else {key_of(value): name for value, name in named.items()}


def _columns(data: DataArguments, available: list[str]) -> dict[str, str]:
    """The columns of the kind of examples that is trained on: what `columns` makes, else the first that is there."""
    columns = dict(mapping("columns", data.columns) or {})
    for target, source in columns.items():
        _check_column(target, source, available)
    named_kinds = [kind for kind in _KINDS if set(kind) & columns.keys()]
    if len(named_kinds) > 1:
        first, second = (" or ".join(name for name in TARGETS if name in kind) for kind in named_kinds[:2])
        raise ValueError(f"columns makes both {first} and {second}, of which one is used: keep one.")
    if not columns and "messages" not in available and "conversations" in available:
        columns["messages"] = "conversations"  # ShareGPT's
    known = {name: name for name in available if name in TARGETS} | columns
    kinds = (
        [_CONVERSATION] if data.unroll and "messages" in known and _PLAIN not in named_kinds else named_kinds or _KINDS
    )
    whole = [kind for kind in kinds if known.keys() >= set(kind)]
    if not whole:
        raise ValueError(
            f"the dataset has the columns {', '.join(available)}: set columns, so that prompt and completion, "
            "messages, or text, can be made of them, for example columns: {prompt: question, completion: answer}."
        )
    if data.unroll and whole[0] != _CONVERSATION:
        raise ValueError(
            "unroll makes an example of every assistant turn, and the dataset has no messages: leave it out."
        )
    return {name: known[name] for name in whole[0]}


def _check_column(target: str, source: Any, available: list[str]) -> None:
    if target not in TARGETS:
        raise ValueError(f"columns names {target!r}: only {', '.join(TARGETS)} can be made of columns.")
    if source == "":
        raise ValueError(
            f"columns makes {target} of nothing: name a column; texts without prompts go by columns: "
            "{text: COLUMN}, and every token of them is trained on."
        )
    if not isinstance(source, str):
        raise ValueError(f"columns: {source!r} must be a column's name or a text with columns in braces.")
    try:
        names = fields(source) if "{" in source and source not in available else [source]
    except ValueError as error:
        raise ValueError(f"columns: {source!r} is no text with columns in braces ({error}): close them.") from error
    for name in names:
        if name not in available:
            raise ValueError(f"columns refers to {name!r}, and the dataset has the columns {', '.join(available)}.")


# ---- rows --------------------------------------------------------------------------------------------------------


def make_examples(rows: Any, plan: Plan, processes: int | None) -> Any:
    """The examples of a table, or of a stream of rows. Raises `DataError`, for a stream while it is read."""
    classes = ["guidance_class"] if plan.classes or plan.class_number else []
    names = {"source": "string", "number": "int64", "example": "string", "left_out": "string"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in names.items()})
    features.update({name: datasets.Value("int64") for name in classes})
    more: dict[str, Any] = {}
    if isinstance(rows, datasets.Dataset):
        more = {"num_proc": processes, "desc": "Making examples"}
    if plan.typed and rows.column_names is not None:
        rows = rows.select_columns([name for name in plan.needed if name in rows.column_names])
    return rows.map(
        _examples, with_indices=True, batched=True, batch_size=256, fn_kwargs={"plan": plan},
        remove_columns=rows.column_names or list(next(iter(rows))), features=features, **more,
    )  # fmt: skip


def as_examples(rows: Any, name: str, processes: int | None) -> Any:
    """The examples of a data set whose columns are named as here. Raises `ValueError`."""
    columns = rows.column_names or list(next(iter(rows)))
    plan, _ = plan_of(columns, columns, DataArguments(), None, typed=True)
    feature = (rows.features or {}).get("guidance_class")
    number = getattr(feature, "dtype", "").startswith("int")
    return make_examples(rows, dataclasses.replace(plan, source=f"{name} data", class_number=number), processes)


def _examples(batch: dict[str, list[Any]], indices: list[int], plan: Plan) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {"source": [], "number": [], "example": [], "left_out": []}
    if plan.classes or plan.class_number:
        table["guidance_class"] = []
    for position, index in enumerate(indices):
        if plan.typed:
            row = {name: values[position] for name, values in batch.items()}
            source, number = plan.source, plan.first + index + 1
        else:
            row, source, number = (
                parse_json(batch["row"][position]),
                batch["source"][position],
                batch["number"][position],
            )
        if plan.subset is not None:
            row[SUBSET] = plan.subset
        try:
            reason = _excluded(row, plan.exclude)
            examples, reason = ([{}], reason) if reason else _of_row(row, plan)
            class_number = _class_of(row, plan) if "guidance_class" in table else None
        except ValueError as error:
            raise DataError(f"{source}, example {number}, {str(error).rstrip('.')}.") from error
        for example in examples:
            table["source"].append(source)
            table["number"].append(number)
            table["example"].append(json.dumps(example))
            table["left_out"].append(reason)
            if "guidance_class" in table:
                table["guidance_class"].append(class_number)
    return table


def _excluded(row: dict[str, Any], exclude: dict[str, list[Any]]) -> str | None:
    named = (name for name, values in exclude.items() if matches(row.get(name), values))
    name = next(named, None)
    return None if name is None else f"excluded by {name}: {row.get(name)}"


def _of_row(row: dict[str, Any], plan: Plan) -> tuple[list[dict[str, Any]], str | None]:
    """The examples of a row, and why there is nothing to train on, if there is not."""
    example = {target: _value(row, target, source, plan.typed) for target, source in plan.columns.items()}
    prompt, completion = example.get("prompt"), example.get("completion")
    if type(prompt) is not type(completion):
        if isinstance(prompt, list) and not completion:
            example["completion"] = []
        else:
            raise ValueError(
                f"columns prompt and completion: they must both be texts or both be lists of messages, and are "
                f"{prompt!r:.60} and {completion!r:.60}: see columns"
            )
    for name in _BESIDE:
        if (value := _beside(row, name, plan.typed)) is not None:
            example[name] = value
    for name in _REFUSED:
        if row.get(name):
            raise ValueError(
                f"column {name!r}: holds {row[name]!r:.40}, and only text is trained on: remove the column"
            )
    if not plan.unroll:
        return [example], None
    pairs, skipped = unrolled(example.pop("messages"))
    if not pairs:
        return [example], "no response"
    pairs[0]["skipped"] = skipped
    return [{**example, **pair} for pair in pairs], None


def _value(row: dict[str, Any], target: str, source: str, typed: bool) -> Any:
    """Text or turns of one part of an example. Raises `ValueError` that begins with the column."""
    if "{" in source and source not in row:
        return fill(source, row, typed)
    value = row.get(source)
    try:
        turns = target == "messages" or (target in _PAIR and isinstance(value, list))
        return as_turns(value, typed) if turns else text_of(value, typed)
    except ValueError as error:
        raise ValueError(f"column {source!r}: {error}") from error


def _beside(row: dict[str, Any], name: str, typed: bool) -> Any:
    """`tools` or `chat_template_kwargs` of a row, which may be JSON texts; `None` for nothing."""
    value = row.get(name)
    if isinstance(value, str) and value:
        try:
            value, typed = parse_json(value), False
        except ValueError as error:
            raise ValueError(f"column {name!r}: {value!r:.60} is not JSON ({error}): correct it") from error
    if not value:
        return None
    try:
        value = plain(value, typed)
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from error
    if not isinstance(value, list if name == "tools" else dict):
        raise ValueError(f"column {name!r}: {value!r:.60} must be a {'list' if name == 'tools' else 'mapping'}")
    return value


def _class_of(row: dict[str, Any], plan: Plan) -> int:
    """The number of a row's class: of the first column whose value has one; that after the last for none."""
    if plan.class_number:
        return row["guidance_class"]
    classes, name = plan.classes or (), plan.class_name
    for column in plan.class_columns:
        value = row.get(column)
        if plan.class_map is None and value is not None:
            name = key_of(value)
            break
        if plan.class_map is not None and key_of(value) in plan.class_map:
            name = plan.class_map[key_of(value)]
            break
    if name is not None and name not in classes:
        raise ValueError(
            f"column {', '.join(plan.class_columns)}: {name!r} is not among guidance_classes={list(classes)}: add it, "
            "or set guidance_map"
        )
    return len(classes) if name is None else classes.index(name)
