"""GSM8K as the study takes it: a user's question, and the assistant's worked solution.

* `write_data`: `train.jsonl`, `validation.jsonl` (the last rows of the training split, which no training sees) and
  `test.jsonl`, in the data set's own order, with `targets.json`
* `targets_per_example`: supervised tokens of an average training row, from that file
* `read_part`: the rows of a part as tokens
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoConfig, AutoTokenizer

from training.budget_metrics import padded
from training.compare_budgets.rows import encode_split
from training.data.options import DataArguments

Row = dict[str, Any]
CONFIGURATION = "main"  # of the data set on the hub and of its copies
LONGEST = 1024  # tokens of an example


def read_split(argument: str, source: str, configuration: str, split: str) -> datasets.Dataset:
    """A split of a folder or of a data set on the hub, of its `configuration` where it has that.

    Raises `ValueError`, which calls the data `argument`.
    """
    try:
        names = datasets.get_dataset_config_names(source)
        return datasets.load_dataset(source, configuration if configuration in names else None, split=split)
    except (OSError, ValueError) as error:  # the hub is not there, or the split is not
        raise ValueError(f"{argument}={source!r} has no split {split!r} that can be read: {error}") from error


def chat_rows(source: str, split: str) -> list[Row]:
    """The rows of a split as conversations of two turns. Raises `ValueError` where the data are not there."""
    rows = read_split("data", source, CONFIGURATION, split)
    if missing := {"question", "answer"} - set(rows.column_names):
        raise ValueError(f"data={source!r} has no column {min(missing)!r}: give GSM8K, or rows like its own.")
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]


def write_data(source: str, base: Path, out: Path, held_out: int) -> None:
    """Writes the rows into `out`, where they are not there yet, with `held_out` rows of the training split for
    validation.

    Raises `ValueError` where the data are not there, or too few.
    """
    counted = out / "targets.json"
    if counted.exists():
        return
    train, test = chat_rows(source, "train"), chat_rows(source, "test")
    if held_out >= len(train):
        raise ValueError(f"held_out={held_out} leaves nothing of {len(train)} training rows: lower it.")
    parts = {"train": train[:-held_out], "validation": train[-held_out:], "test": test}
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    encoded = _encoded(out / "train.jsonl", base)
    targets = sum(sum(label != -100 for label in labels[1:]) for labels in encoded["labels"])
    counts = {"examples": len(encoded), "targets": targets}
    draft = out / ".targets.json"
    draft.write_text(json.dumps(counts) + "\n", encoding="utf-8")
    os.replace(draft, counted)  # the last file: with it, all are there


def targets_per_example(out: Path) -> float:
    """Supervised tokens of an average training row."""
    counts = json.loads((out / "targets.json").read_text(encoding="utf-8"))
    return counts["targets"] / counts["examples"]


def read_part(file: Path, base: Path, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and targets (E, S) of the first `count` rows of a file, as `base`'s tokenizer has them."""
    encoded = _encoded(file, base, count)
    return padded(list(encoded), _tokenizer(base).pad_token_id, torch.device("cpu"))


def _encoded(file: Path, base: Path, count: int | None = None) -> datasets.Dataset:
    longest = getattr(AutoConfig.from_pretrained(base).get_text_config(), "max_position_embeddings", None)
    data = DataArguments(dataset=str(file))
    return encode_split(data, _tokenizer(base), min(longest or sys.maxsize, LONGEST), count)[0]


def _tokenizer(base: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
