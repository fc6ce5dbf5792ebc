"""From examples to token ids and labels, the same for every training method.

- `tokenize`: every example -> `input_ids`, `labels` (-100 wherever nothing is to be learned), and why it is left out
- `target_texts`, `runs_of`: the text of an example and of its targets

Three kinds of examples: `prompt` and `completion` (texts or lists of messages), where the completion and the
end-of-sequence token are targets, `messages`, where the assistant's turns are, and plain `text`, where every token but
the first is. Labels are aligned with `input_ids`; the shift by one happens in the loss.
"""

import dataclasses
import itertools
import json
import unicodedata
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from training.config import L2DTrainingConfig
from training.data.conversations import answers
from training.data.examples import as_examples, quietly
from training.data.rendering import Rendered, render, render_pair
from training.data.tokenizer import Base
from training.data.values import DataError

IGNORED = -100  # label of a token that is no target
_VERSION = 1  # of what is cached: raise it when examples are tokenized otherwise
_EMPTY = "no response"


# ---- tokens and labels -------------------------------------------------------------------------------------------


def tokenize(
    examples: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    training: L2DTrainingConfig,
    limit: int,
    name: str,
    base: Base | None = None,
) -> Any:
    """Token ids and labels of every example, in order, with `left_out`: the reason, or `None`.

    Args:
        examples: of `load_examples`, or with columns `prompt` and `completion`, `messages` or `text`.
        limit: longest allowed example in tokens; `training.too_long` says what happens to longer ones.
        name: of the split, for messages.

    Raises `ValueError`, for a stream only while it is read, if an example cannot be trained on as it stands.
    """
    base = base or Base()
    if base.rows is not None and tokenizer.pad_token_id >= base.rows:
        raise ValueError(
            f"the padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, and the base's embedding "
            f"has {base.rows} rows: give the tokenizer a padding token that it knows, or resize the base's embedding."
        )
    if "example" not in (examples.column_names or ()):
        with quietly():
            examples = as_examples(examples, name, training.dataset_num_proc)
    options = {
        "tokenizer": tokenizer,
        "settings": _Settings(
            training.assistant_only_loss,
            training.completion_only_loss,
            training.too_long,
            limit,
            training.count_end_token,
            base,
            name,
            _VERSION,
        ),
    }
    classes = [column for column in examples.column_names if column == "guidance_class"]
    features = datasets.Features({**_TOKENS, **{column: datasets.Value("int64") for column in classes}})
    more: dict[str, Any] = {}
    if isinstance(examples, datasets.Dataset):
        more = {"num_proc": training.dataset_num_proc, "desc": f"Tokenizing {name} examples"}
    with quietly():
        return examples.map(_tokenized, fn_kwargs=options, remove_columns=["example"], features=features, **more)


_TOKENS = {
    "source": datasets.Value("string"),
    "number": datasets.Value("int64"),
    "left_out": datasets.Value("string"),
    "input_ids": datasets.List(datasets.Value("int32")),
    "labels": datasets.List(datasets.Value("int64")),
    "length": datasets.Value("int64"),
    "targets": datasets.Value("int64"),
    "notes": datasets.List(datasets.Value("string")),
}


@dataclasses.dataclass(frozen=True)
class _Settings:
    assistant_only: bool | None
    completion_only: bool | None
    too_long: str
    limit: int
    count_end: bool
    base: Base
    name: str
    version: int


def _tokenized(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, settings: _Settings) -> dict[str, Any]:
    """One example's tokens; without a response all labels are -100."""
    if row["left_out"] is not None:
        return {"input_ids": [], "labels": [], "length": 0, "targets": 0, "notes": []}
    example = json.loads(row["example"])
    try:
        _check_loss(settings, example)
        tokens, labels, notes = _tokens(example, tokenizer, settings)
        _check_rows(tokens, tokenizer, settings.base.rows)
    except ValueError as error:
        raise DataError(f"{row['source']}, example {row['number']}: {str(error).rstrip('.')}.") from error
    length, reason = len(tokens), None
    if not settings.count_end:
        length = _length_without_end(labels, {tokenizer.eos_token_id, *settings.base.ends})
    if length > settings.limit:
        if settings.too_long == "error":
            raise DataError(
                f"{settings.name} data: {row['source']}, example {row['number']} has {length} tokens, more than "
                f"max_length={settings.limit}: set too_long to drop or truncate, or raise max_length as far as the "
                "base allows."
            )
        if settings.too_long == "drop":
            reason = f"longer than max_length={settings.limit}: {length} tokens"
        tokens, labels = (tokens, labels) if reason else (tokens[: settings.limit], labels[: settings.limit])
        notes = [*notes, "cut"]
    targets = sum(label != IGNORED for label in labels[1:])
    if not targets:
        reason = reason or (_EMPTY if length <= settings.limit else f"no response within max_length={settings.limit}")
    if reason is not None:
        labels, targets = [IGNORED] * len(labels), 0
    notes += ["skipped"] * example.get("skipped", 0)
    counts = {"length": length, "targets": targets}
    return {"input_ids": tokens, "labels": labels, "left_out": reason, "notes": notes, **counts}


def _length_without_end(labels: list[int], ends: set[int]) -> int:
    """Tokens up to the last target that is not an end-of-sequence token."""
    return max(
        (position + 1 for position, label in enumerate(labels) if label != IGNORED and label not in ends), default=0
    )


def _check_loss(settings: _Settings, example: dict[str, Any]) -> None:
    """Raise `ValueError` for a choice of targets that this kind of example does not offer."""
    conversation, plain = "messages" in example, "text" in example
    kind = "a conversation (messages)" if conversation else "a plain text" if plain else "a prompt and a completion"
    if settings.assistant_only and not conversation:
        remedy = "leave it out" if plain else "leave it out, only completions are trained on"
        raise ValueError(f"assistant_only_loss=True is for conversations (messages), and this is {kind}: {remedy}")
    if settings.completion_only is not None and (conversation or plain):
        remedy = "use assistant_only_loss, or leave it out" if conversation else "leave it out"
        raise ValueError(
            f"completion_only_loss={settings.completion_only} is for prompts and completions, "
            f"and this is {kind}: {remedy}"
        )


def _check_rows(tokens: list[int], tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    if rows is not None and (most := max(tokens, default=0)) >= rows:
        raise ValueError(
            f"holds the token {tokenizer.convert_ids_to_tokens(most)!r} with the id {most}, and the base's embedding "
            f"has {rows} rows: resize the base's embedding and train it, or use its own tokenizer"
        )


def _tokens(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, settings: _Settings
) -> tuple[list[int], list[int], list[str]]:
    """Token ids, labels and notes of one example."""
    if "text" in example:
        tokens = _ended(tokenizer, example["text"])
        labels = tokens if example["text"] else [IGNORED] * len(tokens)
        _check_decoded(tokenizer, example["text"], labels[1:] if labels[0] == tokenizer.bos_token_id else labels)
        return tokens, labels, ["plain"]
    if "messages" in example:
        every_turn = settings.assistant_only is False
        if not example["messages"] or not (every_turn or any(map(answers, example["messages"]))):
            return _untrained(tokenizer, example["messages"], example)
        return _of_spans(tokenizer, render(tokenizer, example["messages"], example, every_turn), settings)
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        return _of_texts(tokenizer, prompt, completion, settings.completion_only is False)
    whole = settings.completion_only is False or (settings.completion_only is None and settings.assistant_only is False)
    if not any(turn["content"] or turn.get("tool_calls") for turn in completion):
        return _untrained(tokenizer, [*prompt, *completion], example)
    tokens, labels, notes = _of_spans(tokenizer, render_pair(tokenizer, prompt, completion, example, whole), settings)
    others = not whole and any(turn["role"] != "assistant" for turn in completion)
    return tokens, labels, [*notes, "others"] if others else notes


def _untrained(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], example: dict[str, Any]
) -> tuple[list[int], list[int], list[str]]:
    """Tokens of a conversation without a response, to be shown; none where its template cannot write it."""
    try:
        text = render(tokenizer, turns, example, every_turn=True).text if turns else ""
    except ValueError:
        text = ""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens, [IGNORED] * len(tokens), ["chat"]


def _of_texts(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, whole: bool
) -> tuple[list[int], list[int], list[str]]:
    tokens, before = _ended(tokenizer, prompt + completion), tokenizer(prompt)["input_ids"]
    start = _common(before, tokens)
    inside = start < len(before)
    if inside and completion:
        # A token would hold the end of the prompt and more. A model that is given the prompt never sees such a token.
        apart = [*before, *tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if _decode(tokenizer, apart) == _decode(tokenizer, tokens):
            tokens, start = apart, len(before)
    if not completion:
        return tokens, [IGNORED] * len(tokens), []
    labels = [IGNORED] * (0 if whole else start) + tokens[0 if whole else start :]
    _check_decoded(tokenizer, completion, labels)
    return tokens, labels, ["inside"] if inside else []


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _common(one: list[int], other: list[int]) -> int:
    return next(
        (n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text and the end-of-sequence token, which is there once."""
    tokens = tokenizer(text)["input_ids"]
    return tokens if tokens and tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]


def _of_spans(
    tokenizer: PreTrainedTokenizerBase, rendered: Rendered, settings: _Settings
) -> tuple[list[int], list[int], list[str]]:
    """Tokens of a rendered conversation; targets are those that share a character with a trained range."""
    if not tokenizer.is_fast:
        raise ValueError("conversations need a fast tokenizer, which knows where its tokens stand in the text")
    tokens, offsets = _apart(tokenizer, rendered.text, {position for span in rendered.spans for position in span})
    labels = [IGNORED] * len(tokens)
    for start, end in rendered.spans:
        for position, (first, last) in enumerate(offsets):
            if first < end and last > start:
                labels[position] = tokens[position]
    for start, end in rendered.spans:
        _check_decoded(tokenizer, rendered.text[start:end], labels)
    ends = {tokenizer.eos_token_id, *settings.base.ends}
    notes = {
        "chat": True,
        "trimmed": rendered.trimmed,
        "silent": rendered.silent > 0,
        "inside": rendered.inside,
        "ended": any(label in ends for label in labels),
    }
    noted = [note for note, on in notes.items() if on]
    noted += [f"unused {key}" for key in rendered.unused]
    if not notes["ended"]:
        noted += [f"last {tokenizer.convert_ids_to_tokens(label)}" for label in labels if label != IGNORED][-1:]
    return tokens, labels, noted


def _apart(tokenizer: PreTrainedTokenizerBase, text: str, cuts: set[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text and where they stand; none reaches over a cut, if the tokenizer can say the same without it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if not any(first < cut < last for first, last in offsets for cut in cuts):
        return tokens, offsets
    places = sorted({0, len(text), *cuts})
    pieces: list[int] = []
    ranges: list[tuple[int, int]] = []
    for start, end in itertools.pairwise(places):
        piece = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        pieces += piece["input_ids"]
        ranges += [(first + start, last + start) for first, last in piece["offset_mapping"]]
    same = _decode(tokenizer, pieces) == _decode(tokenizer, tokens)
    return (pieces, ranges) if same else (tokens, offsets)


def _check_decoded(tokenizer: PreTrainedTokenizerBase, text: str, labels: list[int]) -> None:
    """Raise `ValueError` if the tokens that are trained on do not say `text`, which tokenizers may normalise."""
    decoded = _decode(tokenizer, [label for label in labels if label != IGNORED])
    if text not in decoded and _squeezed(text) not in _squeezed(decoded):
        raise ValueError(
            f"the tokenizer cannot write {text!r:.60}, which it decodes as {decoded!r:.60}: leave the example out, or "
            "use a base whose tokenizer knows its characters"
        )


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def target_texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The decoded text of a tokenized example, and that of every run of trained tokens, special tokens included."""
    return _decode(tokenizer, row["input_ids"]), [text for text, trained in runs_of(row, tokenizer) if trained]


def runs_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The decoded text of every run of tokens that are trained on, or are not, and whether they are."""
    ids, marked = row["input_ids"], [position > 0 and label != IGNORED for position, label in enumerate(row["labels"])]
    runs, start, before = [], 0, ""
    for position in range(1, len(ids) + 1):
        if position == len(ids) or marked[position] != marked[start]:
            # As it stands after what comes before: decoders strip a first space.
            until = _decode(tokenizer, ids[:position])
            alone = _decode(tokenizer, ids[start:position])
            runs.append((until[len(before) :] if until.startswith(before) else alone, marked[start]))
            start, before = position, until
    return runs
