"""Data sets as trainers take them: the examples that are trained on, and what is said of the others.

- `encode`: examples -> `input_ids` and `labels`, with a summary
- `keep`: the same of examples that are tokenized
- `ready`: a data set from Python, tokenized or not; `stream`: of which nothing is read before
- `for_encoded_data`: settings under which a trainer does not prepare them once more
"""

import copy
from collections import Counter
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from training.config import L2DTrainingConfig
from training.console import say
from training.data.tokenizer import Base
from training.data.tokenizing import tokenize

_FOR_TRAINERS = ("input_ids", "labels", "guidance_class")


def encode(
    examples: Any,
    tokenizer: PreTrainedTokenizerBase,
    training: L2DTrainingConfig,
    limit: int,
    name: str,
    base: Base | None = None,
) -> tuple[datasets.Dataset, str]:
    """Token ids and labels of the examples, and what was counted; see `tokenize` and `keep`."""
    return keep(tokenize(examples, tokenizer, training, limit, name, base), training, limit, name)


def keep(
    tokenized: datasets.Dataset, training: L2DTrainingConfig, limit: int, name: str
) -> tuple[datasets.Dataset, str]:
    """The examples that are trained on, and a line that says how many tokens they have and what was left out.

    Raises `ValueError` if none remains.
    """
    reasons = tokenized["left_out"][:]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    counts = Counter(str(reason).split(":")[0] for reason in reasons if reason is not None)
    long = sum(count for reason, count in counts.items() if reason.startswith("longer than"))
    if not kept and long + counts.get(f"no response within max_length={limit}", 0) == len(reasons):
        raise ValueError(
            f"every {name} example is longer than max_length={limit}, and no response remains with "
            f"too_long={training.too_long}: raise max_length."
        )
    if not kept:
        raise ValueError(
            f"no {name} example has a response to train on ({_listed(counts)}): check that completions, assistant "
            "turns or texts are not empty."
        )
    chosen = tokenized.select(kept) if len(kept) < len(reasons) else tokenized
    notes = Counter(note for noted in chosen["notes"] for note in noted)
    tokens = sum(min(length, limit) for length in chosen["length"])
    targets = sum(chosen["targets"])
    line = f"{name}: {len(kept):,} examples, {tokens:,} tokens, {targets:,} of them targets ({targets / tokens:.0%})"
    line += "".join(f"; {note}" for note in _told(notes, limit))
    line += f"; left out {sum(counts.values()):,} ({_listed(counts)})" if counts else ""
    others = [column for column in chosen.column_names if column not in _FOR_TRAINERS]
    return chosen.remove_columns(others), line


def _listed(counts: Counter) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))


def _told(notes: Counter, limit: int) -> list[str]:
    told = {
        "cut": f"cut {{:,}} longer than {limit:,} tokens",
        "inside": "{:,} prompts end inside what would be one token (begin completions, not end prompts, with a space)",
        "trimmed": "{:,} examples lose white space at the ends of answers to the chat template",
        "silent": "{:,} examples have turns of the assistant that say nothing, which are not trained on",
        "others": "{:,} completions hold turns that are not the assistant's, which are targets too (use messages)",
        "skipped": "{:,} turns of the assistant are skipped by unroll: they say nothing, or begin a conversation",
        "plain": "plain text, of which every token but an example's first is a target",
    }
    lines = [sentence.format(notes[note]) for note, sentence in told.items() if notes[note]]
    if unused := sorted(note.removeprefix("unused ") for note in notes if note.startswith("unused ")):
        lines.append(f"the chat template does not use what turns have as {', '.join(unused)}")
    if notes["chat"] and not notes["ended"]:
        last = Counter({note: count for note, count in notes.items() if note.startswith("last ")}).most_common(1)
        token = last[0][0].removeprefix("last ") if last else ""
        lines.append(
            "warning: no target holds an end-of-sequence token that generation stops at, so that the model would not "
            f"stop: set eos_token to what ends a turn (these end with {token!r}), or set chat_template_path"
        )
    return lines


def ready(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    training: L2DTrainingConfig,
    limit: int,
    base: Base,
    name: str,
    formatting: Any = None,
) -> Any:
    """A data set for a trainer: what has `input_ids` as it is, what has not encoded; also several by name.

    Args:
        formatting: TRL's `formatting_func`, which makes a text of a row.

    Raises `ValueError`, for a stream while it is read.
    """
    if isinstance(data, dict):
        return {
            key: ready(part, tokenizer, training, limit, base, f"{name} {key}", formatting)
            for key, part in data.items()
        }
    skip = (training.dataset_kwargs or {}).get("skip_prepare_dataset", False)
    if data is None or skip or not isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return data
    columns = data.column_names or list(next(iter(data)))
    if "input_ids" in columns:
        return _within(data, training, name)
    if formatting is not None:
        data = data.map(lambda row: {"text": formatting(row)}, remove_columns=columns)
    elif training.dataset_text_field in columns and "text" not in columns:
        data = data.rename_column(training.dataset_text_field, "text")
    if isinstance(data, datasets.IterableDataset):
        return stream(data, tokenizer, training, limit, name, base)
    encoded, summary = encode(data, tokenizer, training, limit, name, base)
    say(summary)
    return encoded


def stream(
    examples: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    training: L2DTrainingConfig,
    limit: int,
    name: str,
    base: Base | None = None,
) -> datasets.IterableDataset:
    """The examples of a stream that are trained on, encoded while they are read; `ValueError`s come then."""
    encoded = tokenize(examples, tokenizer, training, limit, name, base).filter(_kept)
    return encoded.remove_columns([column for column in encoded.column_names if column not in _FOR_TRAINERS])


def _kept(row: dict[str, Any]) -> bool:
    return row["left_out"] is None


def _within(data: Any, training: L2DTrainingConfig, name: str) -> Any:
    """Examples that were tokenized elsewhere, with `max_length` and `too_long` followed."""
    limit = training.max_length
    if limit is None or training.packing or not isinstance(data, datasets.Dataset):
        return data
    long = [row for row, ids in enumerate(data["input_ids"]) if len(ids) > limit]
    if not long:
        return data
    if training.too_long == "error":
        raise ValueError(
            f"{name} example {long[0] + 1} has more than max_length={limit} tokens: set too_long to drop or truncate."
        )
    if training.too_long == "drop":
        return data.select(sorted(set(range(len(data))) - set(long)))
    lists = [column for column in ("input_ids", "labels", "attention_mask") if column in data.column_names]
    return data.map(lambda row: {column: row[column][:limit] for column in lists})


def for_encoded_data(training: L2DTrainingConfig, limit: int) -> L2DTrainingConfig:
    """A copy of the settings for a trainer whose examples are encoded, and not to be prepared or cut once more."""
    training = copy.copy(training)
    training.assistant_only_loss, training.chat_template_path = False, None
    training.max_length = limit if training.packing else None
    training.eval_packing = False if training.packing else None
    return training
