"""Data sets to token ids and labels, the same for every training method.

- `load_examples`: hub name, file or folder -> training and evaluation examples with named columns
- `load_split`: the same for one split, to measure on
- `load_tokenizer`: the base's tokenizer, ready for training
- `encode`: examples -> `input_ids`, `labels` (-100 wherever nothing is to be learned), optional `guidance_class`

Three kinds of examples: `prompt` and `completion` (texts or lists of messages), where the completion and the
end-of-sequence token are targets, `messages`, where the assistant's turns are, and plain `text`, where every token but
the first is. Labels are aligned with `input_ids`; the shift by one happens in the loss.
"""

import contextlib
import json
import os
import re
import string
import sys
from collections.abc import Iterator
from typing import Any

import datasets
import transformers
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import get_training_chat_template

from training.config import FILE_TYPES, DataArguments, L2DTrainingConfig, ModelArguments, check_file, mapping, named
from training.data.mixture import as_turns, class_name, join, leave_out, unroll

IGNORED = -100  # label of a token that is no target
_TARGETS = ("prompt", "completion", "messages", "text")  # what `columns` can make
_PAIR, _CONVERSATION, _PLAIN = frozenset(("prompt", "completion")), frozenset(("messages",)), frozenset(("text",))
_KINDS = (_PAIR, _CONVERSATION, _PLAIN)
_KEPT = (*_TARGETS, "tools", "guidance_class")


class Unavailable(ValueError):
    """Something that has to be downloaded, and cannot be from here."""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
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


# ---- reading -----------------------------------------------------------------------------------------------------


@_quietly()
def load_examples(
    data: DataArguments, guidance_classes: list[str] | None, seed: int, processes: int | None = None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training and evaluation examples: `prompt` and `completion`, `messages` or `text` (and `guidance_class`).

    What was computed with the same settings before is read from the cache of `datasets`.

    Raises `ValueError` for data that are not there, are empty, or lack the columns.
    """
    train = _read("dataset", data.dataset, data, data.train_split, processes)
    evaluation = None
    if data.eval_holdout:
        if data.eval_holdout >= len(train):
            raise ValueError(f"eval_holdout={data.eval_holdout} leaves nothing of {len(train)} examples to train on.")
        parts = train.train_test_split(test_size=data.eval_holdout, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    elif data.has_eval:
        split = data.eval_split or ("train" if data.eval_dataset and _is_file(data.eval_dataset) else "test")
        name = "eval_dataset" if data.eval_dataset else "dataset"
        evaluation = _read(name, data.eval_dataset or data.dataset, data, split, processes)
    parts = [part and _name_columns(part, data, guidance_classes, processes) for part in (train, evaluation)]
    if data.unroll:
        parts = [part and unroll(part, processes) for part in parts]
    return parts[0], parts[1]


def load_split(argument: str, data: DataArguments) -> datasets.Dataset:
    """The examples of `data.dataset`, split `data.train_split`, with named columns and without classes.

    Raises `ValueError`, which calls the data set `argument`, for data that are not there, are empty or lack columns.
    """
    part = _name_columns(_read(argument, data.dataset, data, data.train_split, None), data, None, None)
    return unroll(part, None) if data.unroll else part


def _is_file(source: str) -> bool:
    return os.path.splitext(source)[1] in FILE_TYPES


def _read(
    argument: str, source: str | None, data: DataArguments, split: str, processes: int | None
) -> datasets.Dataset:
    source = named(argument, source)
    configs: list[str | None] = [*data.dataset_config] if data.dataset_config else [None]
    try:
        parts = [_read_one(argument, source, config, split) for config in configs]
    except (OSError, datasets.exceptions.DatasetsError, KeyError, ValueError, RuntimeError) as error:
        if str(error).startswith(argument):
            raise  # says it all
        kind = ValueError if os.path.exists(source) or _is_file(source) else Unavailable
        reason = str(error.__cause__ or error).rstrip(".")
        raise kind(f"{argument}={source!r} cannot be read (split {split!r}): {reason}; check its format.") from error
    needed = {*(data.exclude or {}), *(data.guidance_column or [])}
    dataset = join(parts, configs, needed)
    if excluded := mapping("exclude", data.exclude):
        dataset = leave_out(dataset, excluded, processes)
    if len(dataset) == 0:
        raise ValueError(f"{argument}={source!r}, split {split!r}, is empty: there is nothing to train on.")
    return dataset


def _read_one(argument: str, source: str, config: str | None, split: str) -> datasets.Dataset:
    if _is_file(source):
        check_file(argument, source)
        kind = FILE_TYPES[os.path.splitext(source)[1]]
        return datasets.load_dataset(kind, data_files={"train": source}, split=split)
    if not any(os.path.isfile(os.path.join(source, name)) for name in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(source, config, split=split)
    saved = datasets.load_from_disk(source)
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"{argument}={source!r} has no split {split!r}: choose one of {', '.join(saved)}.")
    return saved[split]


def _name_columns(
    dataset: datasets.Dataset, data: DataArguments, guidance_classes: list[str] | None, processes: int | None
) -> datasets.Dataset:
    """Build `prompt` and `completion`, `messages` or `text`, and `guidance_class`, and drop the other columns."""
    available = dataset.column_names
    columns = _asked_columns(data, available)
    for column in data.guidance_column or []:
        if column not in available:
            raise ValueError(f"guidance_column={column!r} is not in the data: {', '.join(available)}.")
    used = _used_columns(available, columns, data.unroll)
    if columns or guidance_classes:
        dataset = dataset.map(
            _named,
            fn_kwargs={
                "columns": columns,
                "classes": guidance_classes,
                "sources": data.guidance_column,
                "translate": data.guidance_map,
                "constant": data.guidance_class,
            },
            num_proc=processes,
            desc="Naming columns",
        )
    unused = {*_TARGETS} - used
    unused |= set() if guidance_classes else {"guidance_class"}  # a column of that name is the data's own
    return dataset.select_columns([name for name in _KEPT if name in dataset.column_names and name not in unused])


def _asked_columns(data: DataArguments, available: list[str]) -> dict[str, Any]:
    """What `columns` makes of which columns; ShareGPT's `conversations` become `messages` unasked."""
    columns = dict(mapping("columns", data.columns) or {})
    for target, source in columns.items():
        if target not in _TARGETS:
            raise ValueError(f"columns names {target!r}: only {', '.join(_TARGETS)} can be made of columns.")
        if source == "":
            raise ValueError(
                f"columns makes {target} of nothing: name a column; texts without prompts go by columns: "
                "{text: COLUMN}, and every token of them is trained on."
            )
        for name in _fields(source):
            if name not in available:
                raise ValueError(f"columns refers to {name!r}, which is not in the data: {', '.join(available)}.")
    if len(kinds := [kind for kind in _KINDS if kind & columns.keys()]) > 1:
        first, second = (" or ".join(name for name in _TARGETS if name in kind) for kind in kinds[:2])
        raise ValueError(f"columns makes both {first} and {second}, of which one is used: keep one.")
    if "messages" not in available and "conversations" in available and not columns:
        columns["messages"] = "conversations"
    return columns


def _used_columns(available: list[str], columns: dict[str, Any], unroll: bool) -> frozenset[str]:
    """Which of the kinds of examples is trained on: what `columns` makes, else the first that is there."""
    known = {*available, *columns}
    asked = [kind for kind in _KINDS if kind & columns.keys()]
    if unroll and "messages" in known and _PLAIN not in asked:
        return _CONVERSATION
    whole = [kind for kind in asked or _KINDS if kind <= known]
    if not whole:
        raise ValueError(
            f"the data have the columns {', '.join(available)}: set columns, so that prompt and completion, messages, "
            "or text, can be made of them, for example columns: {prompt: question, completion: answer}."
        )
    return whole[0]


def _fields(source: Any) -> list[str]:
    """Columns that an entry of `columns` is made of: itself, or those in its braces."""
    if not isinstance(source, str):
        raise ValueError(f"columns: {source!r} must be a column's name or a text with columns in braces.")
    if "{" not in source:
        return [source]
    try:
        return [name for _, name, _, _ in string.Formatter().parse(source) if name is not None]
    except ValueError as error:
        raise ValueError(f"columns: {source!r} is no text with columns in braces ({error}): close them.") from error


def _named(example: dict[str, Any], columns: dict, classes, sources, translate, constant) -> dict[str, Any]:
    named = {
        target: source.format_map(example) if "{" in source else example[source] for target, source in columns.items()
    }
    if classes:
        value = class_name(example, sources, translate) if sources else constant
        if value is not None and value not in classes:
            raise ValueError(
                f"guidance_column={sources} holds {value!r}, which is not among guidance_classes={classes}: "
                "add it, or set guidance_map."
            )
        named["guidance_class"] = len(classes) if value is None else classes.index(value)
    return named


# ---- tokens and labels -------------------------------------------------------------------------------------------


def load_tokenizer(model: ModelArguments, training: L2DTrainingConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or the recipe's, with an end-of-sequence and a padding token and the recipe's template.

    Raises `ValueError` if it cannot be found or has no end-of-sequence token.
    """
    base = model.tokenizer or named("base", model.base)
    name = "tokenizer" if model.tokenizer else "base"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base,
            revision=None if model.tokenizer else model.base_revision,
            trust_remote_code=training.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        kind = ValueError if os.path.isdir(base) else Unavailable
        raise kind(f"{name}={base!r} has no tokenizer that can be loaded: {error}") from error
    if training.eos_token is not None:
        if training.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={training.eos_token!r} is not in the vocabulary of {name}={base!r}.")
        tokenizer.eos_token = training.eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name}={base!r} has no end-of-sequence token: set eos_token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if training.chat_template_path is not None:
        with open(training.chat_template_path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    if training.chat_template_date is not None:
        if not isinstance(tokenizer.chat_template, str) or "date_string" not in tokenizer.chat_template:
            raise ValueError("chat_template_date is set, and the chat template uses no date_string: leave it out.")
        # In the template itself, so that the date is the same wherever the saved tokenizer is used.
        fixed = json.dumps(training.chat_template_date)
        tokenizer.chat_template = f"{{%- set date_string = {fixed} -%}}{tokenizer.chat_template}"
    return tokenizer


@_quietly()
def encode(
    examples: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, training: L2DTrainingConfig, limit: int, name: str
) -> tuple[datasets.Dataset, str]:
    """Token ids and labels of all examples, and one line that says how many tokens there are and what was left out.

    Args:
        limit: longest allowed example in tokens; `training.too_long` says what happens to longer ones.
        name: of the split, for messages.

    Raises `ValueError` if an example is too long, or if no example with a response remains.
    """
    plain = "text" in examples.column_names
    chat = not plain and ("messages" in examples.column_names or isinstance(examples[0]["prompt"], list))
    mark = chat and "messages" in examples.column_names and training.assistant_only_loss is not False
    _check_loss(training, plain, "messages" in examples.column_names)
    every_turn = chat and training.assistant_only_loss is False and training.completion_only_loss is None
    encoded = examples.map(
        _encode_example,
        fn_kwargs={
            "tokenizer": tokenizer,
            "template": _chat_template(tokenizer, mark) if chat else None,
            "mark_assistant": mark,
            "whole": training.completion_only_loss is False or every_turn,
        },
        remove_columns=[column for column in examples.column_names if column != "guidance_class"],
        num_proc=training.dataset_num_proc,
        desc=f"Tokenizing {name} examples",
    )
    encoded, too_long = _limit_length(encoded, training, limit, name)
    keep = [row for row, count in enumerate(encoded["targets"]) if count]
    if not keep and too_long == len(examples):
        raise ValueError(
            f"every {name} example is longer than max_length={limit}, and no response remains with "
            f"too_long={training.too_long}: raise max_length."
        )
    if not keep:
        raise ValueError(
            f"no {name} example has a response to train on: check that completions, assistant turns or texts are not "
            "empty."
        )
    without = len(encoded) - len(keep)
    encoded = encoded.select(keep) if without else encoded
    summary = _summary(encoded, name, without, too_long, training, limit)
    summary += "; plain text, of which every token but an example's first is a target" if plain else ""
    return encoded.remove_columns(["length", "targets", "split"]), summary


def _check_loss(training: L2DTrainingConfig, plain: bool, conversations: bool) -> None:
    """Raise `ValueError` for a choice of targets that these examples do not offer."""
    found = "conversations (messages)" if conversations else "plain texts" if plain else "prompts and completions"
    if training.assistant_only_loss and not conversations:
        remedy = "leave it out" if plain else "leave it out, only completions are trained on"
        raise ValueError(f"assistant_only_loss=True is for conversations (messages), and these are {found}: {remedy}.")
    if training.completion_only_loss is not None and (conversations or plain):
        remedy = "use assistant_only_loss, or leave it out" if conversations else "leave it out"
        raise ValueError(
            f"completion_only_loss={training.completion_only_loss} is for prompts and completions, and these are "
            f"{found}: {remedy}."
        )


def _chat_template(tokenizer: PreTrainedTokenizerBase, mark_assistant: bool) -> str | None:
    """The template to render conversations with; `None` is the tokenizer's own."""
    if tokenizer.chat_template is None:
        raise ValueError("the data are conversations, and the tokenizer has no chat template: set chat_template_path.")
    if not mark_assistant or re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            "the base's chat template does not mark the assistant's turns: set chat_template_path to a template with "
            "{% generation %} around them, or assistant_only_loss: false to train on all turns."
        ) from error


def _encode_example(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None, mark_assistant: bool, whole: bool
) -> dict[str, Any]:
    """`input_ids`, `labels` and their counts for one example; without a response all labels are -100."""
    if "text" in example:
        text = _text(example["text"])
        if not isinstance(text, str):
            raise ValueError(f"text must be texts, and an example holds {text!r:.80}: set columns to another column.")
        tokens = _ended(tokenizer, text)
        return _counted(tokens, tokens if text else [IGNORED] * len(tokens)) | {"split": False}
    if "messages" in example:
        tokens, labels = _encode_conversation(example, tokenizer, template, mark_assistant)
        return _counted(tokens, labels) | {"split": False}
    tokens, labels, split = _encode_pair(example, tokenizer, template, whole)
    return _counted(tokens, labels) | {"split": split}


def _counted(tokens: list[int], labels: list[int]) -> dict[str, Any]:
    targets = sum(label != IGNORED for label in labels[1:])
    return {"input_ids": tokens, "labels": labels, "length": len(tokens), "targets": targets}


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text and the end-of-sequence token, which is there once."""
    tokens = tokenizer(text)["input_ids"]
    return tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]


def _encode_pair(example, tokenizer, template: str | None, whole: bool) -> tuple[list[int], list[int], bool]:
    """Token ids, labels, and whether the prompt ends inside a token."""
    prompt, completion = _text(example["prompt"]), _text(example["completion"])
    if type(prompt) is not type(completion):
        raise ValueError(
            f"prompt and completion must both be texts or both be lists of messages, and in one example they are "
            f"{prompt!r:.60} and {completion!r:.60}: see columns."
        )
    if isinstance(prompt, str):
        tokens = _ended(tokenizer, prompt + completion)
        prompt_tokens = tokenizer(prompt)["input_ids"]
        empty = not completion
    else:
        prompt, completion = as_turns(prompt), as_turns(completion)
        tokens = _render(tokenizer, [*prompt, *completion], template, example)["input_ids"]
        prompt_tokens = _render(tokenizer, prompt, template, example, add_generation_prompt=True)["input_ids"]
        empty = not any(turn.get("content") or turn.get("tool_calls") for turn in completion)
        tokens = _to_last_end(tokens, tokenizer.eos_token_id, len(prompt_tokens))
    # Tokens may merge across the boundary: the response begins where the prompt alone is tokenized differently.
    start = 0
    while start < min(len(prompt_tokens), len(tokens)) and prompt_tokens[start] == tokens[start]:
        start += 1
    split = start < len(prompt_tokens)
    start = 0 if whole else start
    labels = [IGNORED] * len(tokens) if empty else [IGNORED] * start + tokens[start:]
    return tokens, labels, split


def _to_last_end(tokens: list[int], end: int, start: int) -> list[int]:
    """Without what a template puts after the response's end-of-sequence token: nobody generates it."""
    ends = [place for place in range(start, len(tokens)) if tokens[place] == end]
    return tokens[: ends[-1] + 1] if ends else tokens


def _text(value: Any) -> Any:
    """Texts and lists of messages as they are, numbers as text, nothing as empty."""
    return value if isinstance(value, (str, list)) else "" if value is None else str(value)


def _encode_conversation(example, tokenizer, template, mark_assistant: bool) -> tuple[list[int], list[int]]:
    turns = as_turns(example["messages"])
    if not any(turn["role"] == "assistant" and (turn.get("content") or turn.get("tool_calls")) for turn in turns):
        return [tokenizer.eos_token_id], [IGNORED]
    rendered = _render(tokenizer, turns, template, example, return_assistant_tokens_mask=mark_assistant)
    tokens = rendered["input_ids"]
    mask = rendered["assistant_masks"] if mark_assistant else [1] * len(tokens)
    return tokens, [token if on else IGNORED for token, on in zip(tokens, mask, strict=True)]


def _render(tokenizer, turns: list[dict[str, Any]], template: str | None, example: dict[str, Any], **options: Any):
    tools = example.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"tools={tools!r:.60} of an example is not JSON ({error}): correct the column.") from error
    try:
        return tokenizer.apply_chat_template(
            turns, tools=tools, chat_template=template, tokenize=True, return_dict=True, **options
        )
    except (TemplateError, TypeError, KeyError) as error:  # a role that it does not know, contents that are no texts
        raise ValueError(
            f"the chat template cannot render the messages {turns!r:.100} ({error}): leave such examples out, or set "
            "chat_template_path."
        ) from error


def _limit_length(
    encoded: datasets.Dataset, training: L2DTrainingConfig, limit: int, name: str
) -> tuple[datasets.Dataset, int]:
    """Apply `too_long`; also returns how many examples were too long."""
    lengths = encoded["length"]
    count = sum(length > limit for length in lengths)
    if not count:
        return encoded, 0
    if training.too_long == "error":
        first = next(row for row, length in enumerate(lengths) if length > limit)
        raise ValueError(
            f"{name} example {first} has {lengths[first]} tokens, more than max_length={limit} (so have {count} in "
            "all): set too_long to drop or truncate, or raise max_length as far as the base allows."
        )
    if training.too_long == "drop":
        return encoded.select([row for row, length in enumerate(lengths) if length <= limit]), count
    return encoded.map(_truncated, fn_kwargs={"limit": limit}, desc=f"Truncating {name} examples"), count


def _truncated(example: dict[str, Any], limit: int) -> dict[str, Any]:
    return _counted(example["input_ids"][:limit], example["labels"][:limit])


def _summary(encoded: datasets.Dataset, name: str, without: int, too_long: int, training, limit: int) -> str:
    tokens, targets = sum(encoded["length"]), sum(encoded["targets"])
    line = f"{name}: {len(encoded):,} examples, {tokens:,} tokens, {targets:,} of them targets ({targets / tokens:.0%})"
    if too_long:
        done = "dropped" if training.too_long == "drop" else "cut"
        line += f"; {done} {too_long:,} longer than {limit:,} tokens"
    if split := sum(encoded["split"]):
        line += f"; {split:,} prompts end inside a token (begin completions, not end prompts, with a space)"
    return line + (f"; left out {without:,} without a response" if without else "")
