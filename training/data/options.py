"""What a recipe may say of its data.

- `DataArguments`: where the examples come from and which columns hold what
- `file_kind`, `check_file`: data files by their names
- `one_of`, `at_least`, `named`, `mapping`: single values
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

FILE_KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_COMPRESSED = (".gz", ".bz2", ".xz")
_OF_AN_ENTRY = {
    "dataset": "dataset", "dataset_config": "dataset_config", "split": "train_split", "columns": "columns",
    "exclude": "exclude", "unroll": "unroll", "guidance_column": "guidance_column", "guidance_map": "guidance_map",
    "guidance_class": "guidance_class",
}  # key of one of several data sets -> option that it replaces  # fmt: skip


@dataclass
class DataArguments:
    """Where the examples come from and which columns hold what."""

    dataset: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={"help": "Hub name, or a local .json, .jsonl, .parquet, .csv or .tsv file, or a folder (save_to_disk "
                  "too); or several, each a mapping of dataset and, where they differ, dataset_config, split, columns, "
                  "exclude, unroll, guidance_* and weight, the data set's share of the examples."},
    )  # fmt: skip
    dataset_config: list[str] | None = field(
        default=None, metadata={"help": "Configuration (subset) of the data set; several are concatenated."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[:1000] work."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training data while training, without reading all before; needs max_steps."},
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluation data; default: the same data set."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: no evaluation."})
    eval_holdout: int | None = field(
        default=None, metadata={"help": "Number of training examples to set aside for evaluation instead."}
    )
    columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What prompt and completion (or messages, or text) are made of: a column's name, or a text with "
            "columns in braces, e.g. {prompt: 'Question: {question}\\nAnswer:', completion: ' {answer}'}; a format "
            "says how values that are not text are written, e.g. {price:.2f}."
        },
    )
    exclude: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Rows to leave out: values by column, e.g. {category: [editing, planning]}."}
    )
    unroll: bool = field(
        default=False,
        metadata={"help": "Make an example of every assistant turn, with the conversation before it as its prompt."},
    )
    expected_examples: list[int] | None = field(
        default=None, metadata={"help": "Numbers of training and evaluation examples that should result; printed."}
    )
    guidance_column: list[str] | None = field(
        default=None,
        metadata={"help": "Column that holds each example's class; of several, the first one that guidance_map knows. "
                  "The column subset holds the name in dataset_config."},
    )  # fmt: skip
    guidance_map: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Class for each value of guidance_column; values left out have no class."}
    )
    guidance_class: str | None = field(default=None, metadata={"help": "One class for all examples."})

    def __post_init__(self) -> None:
        if isinstance(self.dataset, str) and self.dataset.startswith("["):
            try:
                self.dataset = json.loads(self.dataset)
            except json.JSONDecodeError as error:
                raise ValueError(f"dataset={self.dataset!r:.60} is not a JSON list ({error}): correct it.") from error
        self.columns = mapping("columns", self.columns)
        self.guidance_map = mapping("guidance_map", self.guidance_map)
        self.exclude = mapping("exclude", self.exclude)
        for name in ("guidance_column", "dataset_config"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.expected_examples is not None and len(self.expected_examples) > 2:
            raise ValueError(f"expected_examples={self.expected_examples} must be one or two numbers.")
        if self.eval_holdout is not None:
            at_least("eval_holdout", self.eval_holdout, 1)
        if self.eval_holdout is not None and (self.eval_dataset or self.eval_split):
            raise ValueError(
                "eval_holdout sets training examples aside, and eval_dataset or eval_split name other ones: keep one."
            )
        if self.streaming and self.eval_holdout is not None:
            raise ValueError("eval_holdout needs all examples, and streaming reads them later: name eval_dataset.")
        if self.guidance_class is not None and self.guidance_column is not None:
            raise ValueError("guidance_class and guidance_column both give the examples' class: keep one of them.")
        if self.guidance_map is not None and self.guidance_column is None and not isinstance(self.dataset, list):
            raise ValueError("guidance_map maps the values of guidance_column, which is not set: set it.")
        self.entries()

    @property
    def has_eval(self) -> bool:
        """Whether any evaluation data are named."""
        return bool(self.eval_dataset or self.eval_split or self.eval_holdout)

    def entries(self) -> list[tuple["DataArguments", float | None]]:
        """The data sets one by one, with the settings and the weight of each. Raises `ValueError`."""
        if not isinstance(self.dataset, list):
            return [(self, None)]
        parts = []
        for number, entry in enumerate(self.dataset, 1):
            where = f"dataset, entry {number}"
            if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str):
                raise ValueError(f"{where}: {entry!r:.60} must be a mapping with the key dataset.")
            for key in entry:
                if key not in (*_OF_AN_ENTRY, "weight"):
                    known = ", ".join((*_OF_AN_ENTRY, "weight"))
                    raise ValueError(f"{where} has the key {key!r}, which is not known: choose one of {known}.")
            changes = {_OF_AN_ENTRY[key]: value for key, value in entry.items() if key != "weight"}
            if "guidance_class" in changes and "guidance_column" not in changes:
                changes |= {"guidance_column": None, "guidance_map": None}
            try:
                part = dataclasses.replace(self, **{"expected_examples": None, **changes})
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            parts.append((part, _weight(where, entry.get("weight"))))
        if not parts or len({weight is None for _, weight in parts}) > 1:
            raise ValueError("dataset must be a list of data sets of which all or none have a weight.")
        return parts


def _weight(where: str, weight: Any) -> float | None:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 < weight < float("inf")):
        raise ValueError(f"{where}: weight={weight!r} must be a number above 0.")
    return weight


def file_kind(source: str) -> str | None:
    """The kind of data file that a name stands for, compressed or not; `None` for other names."""
    stem, ending = os.path.splitext(source)
    return FILE_KINDS.get((os.path.splitext(stem)[1] if ending.lower() in _COMPRESSED else ending).lower())


def check_file(name: str, source: Any) -> None:
    """Raise `ValueError` if `source` names a data file that is not there or empty."""
    if not isinstance(source, str) or file_kind(source) is None or os.path.isdir(source):
        return
    if not os.path.isfile(source):
        raise ValueError(f"{name}={source!r} does not exist: give a file, a folder or a hub name.")
    if os.path.getsize(source) == 0:
        raise ValueError(f"{name}={source!r} is empty: there is nothing to train on.")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(allowed)}.")


def at_least(name: str, value: Any, low: int) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}.")


def named(name: str, value: str | None) -> str:
    """`value`, which must be given; raises `ValueError` if it is not."""
    if value is None:
        raise ValueError(f"{name} is not set: give a folder, a file or a hub name.")
    return value


def mapping(name: str, value: Any) -> dict[str, Any] | None:
    """A dictionary from a recipe, or from JSON on the command line; `ValueError` for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must be a mapping: YAML in a recipe, JSON on the command line.")
    return value
