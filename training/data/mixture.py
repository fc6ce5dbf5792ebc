"""From the subsets of a chat data set to one set of examples.

- `join`: subsets to one table that says where each row came from
- `leave_out`: rows of excluded categories
- `as_turns`: the turns of a conversation, checked
- `unroll`: one example per assistant turn, with the whole conversation before it as its prompt
- `class_name`: the guidance class of a row, from its subset or its category
"""

from typing import Any

import datasets

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
SUBSET = "subset"  # column that holds the configuration a row was read from


def join(parts: list[datasets.Dataset], names: list[str | None], needed: set[str]) -> datasets.Dataset:
    """One table of all parts; columns that some lack are empty there if they are `needed`, and dropped otherwise.

    Args:
        names: configuration of each part, which goes into the column `subset`.
    """
    if len(parts) == 1 and SUBSET not in needed:
        return parts[0]
    kept = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    kept += sorted(name for name in needed - set(kept) if any(name in part.column_names for part in parts))
    joined = []
    for part, name in zip(parts, names, strict=True):
        part = part.select_columns([column for column in kept if column in part.column_names and column != SUBSET])
        joined.append(part.add_column(SUBSET, [name] * len(part)))
    return datasets.concatenate_datasets(joined) if len(joined) > 1 else joined[0]


def leave_out(dataset: datasets.Dataset, exclude: dict[str, Any], processes: int | None) -> datasets.Dataset:
    """Drop the rows whose column holds one of the excluded values. Raises `ValueError` for unknown columns."""
    for column in exclude:
        if column not in dataset.column_names:
            raise ValueError(
                f"exclude names {column!r}, which is not in the data: choose from {', '.join(dataset.column_names)}."
            )
    wanted = {column: {str(v) for v in (value if isinstance(value, list) else [value])}
              for column, value in exclude.items()}  # fmt: skip
    return dataset.filter(
        _is_wanted, fn_kwargs={"exclude": wanted}, num_proc=processes, desc="Leaving out excluded rows"
    )


def _is_wanted(example: dict[str, Any], exclude: dict[str, set[str]]) -> bool:
    return not any(str(example[column]) in values for column, values in exclude.items())


def unroll(dataset: datasets.Dataset, processes: int | None) -> datasets.Dataset:
    """`messages` to `prompt` and `completion`, once per assistant turn that says something.

    Raises `ValueError` if there are no conversations.
    """
    if "messages" not in dataset.column_names:
        raise ValueError("unroll makes an example of every assistant turn, which these data have not: leave it out.")
    return dataset.map(
        _unrolled,
        batched=True,
        remove_columns=["messages"],
        num_proc=processes,
        desc="Unrolling conversations",
    )


def _unrolled(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    others = [name for name in batch if name != "messages"]
    rows: dict[str, list[Any]] = {name: [] for name in ["prompt", "completion", *others]}
    for number, found in enumerate(batch["messages"]):
        messages = as_turns(found)
        for place, turn in enumerate(messages):
            if turn["role"] != "assistant" or place == 0 or not turn["content"]:
                continue
            rows["prompt"].append(messages[:place])
            rows["completion"].append([turn])
            for name in others:
                rows[name].append(batch[name][number])
    return rows


def as_turns(messages: Any) -> list[dict[str, Any]]:
    """The turns of a conversation with role and content, none for nothing.

    ShareGPT's names become those that chat templates know. Raises `ValueError` for what is no list of turns.
    """
    turns = [] if messages is None else messages
    named = isinstance(turns, list) and all(
        isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
        for turn in turns
    )
    if not named:
        raise ValueError(
            f"messages must be lists of turns with role and content, and an example holds {messages!r:.80}: correct "
            "them, or set columns."
        )
    return [_from_sharegpt(turn) if turn.get("from") else turn for turn in turns]


def _from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {**others, "role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}


def class_name(example: dict[str, Any], columns: list[str], translate: dict[str, str] | None) -> str | None:
    """The class of an example: that of the first column whose value has one; without a map the value itself."""
    for column in columns:
        value = example[column]
        if translate is None and value is not None:
            return value
        if translate is not None and value in translate:
            return translate[value]
    return None
