"""Turns of conversations, as the file has them, in the one shape that chat templates know.

- `as_turns`: role, content (text), tool calls and reasoning of every turn, checked
- `answers`: whether a turn is one of the assistant's that says or calls something
- `unrolled`: one pair per assistant turn, with the whole conversation before it as its prompt
- `find_turn`: what of a turn must stand in a rendered conversation
"""

import json
from collections.abc import Iterator
from typing import Any

from training.data.values import parse_json, plain, text_of

_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
}  # ShareGPT's  # fmt: skip
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_IGNORED = ("weight", "train", "training", "loss", "prefix")  # keys of turns that other trainers follow
REASONING = ("reasoning_content", "reasoning", "thinking")


def as_turns(messages: Any, typed: bool = False) -> list[dict[str, Any]]:
    """The turns of a conversation, none for null; parts of text are joined, ShareGPT's speakers become roles.

    Args:
        typed: as for `text_of`.

    Raises `ValueError` for what is not a list of turns, or holds something else than text.
    """
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # as a cell of a CSV file, or a text column
        try:
            messages, typed = parse_json(messages), False
        except ValueError as error:
            raise ValueError(f"is not a JSON list of turns ({error})") from error
    turns = [] if messages is None else messages
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"must hold lists of turns with role and content, and holds {messages!r:.80}")
    return [_turn(turn, position, typed) for position, turn in enumerate(turns, 1)]


def _turn(turn: dict[str, Any], position: int, typed: bool) -> dict[str, Any]:
    turn = {name: value for name, value in turn.items() if value is not None or name in ("content", "value")}
    if "from" in turn:
        speaker = turn.pop("from")
        if speaker not in _SPEAKERS:
            known = ", ".join(_SPEAKERS)
            raise ValueError(
                f"turn {position} is from {speaker!r}, which is not known: rename the speaker to one of {known}"
            )
        turn = {**turn, "role": _SPEAKERS[speaker], "content": turn.pop("value", None)}
    calls = turn.get("tool_calls") or None
    if not isinstance(turn.get("role"), str) or ("content" not in turn and not calls):
        raise ValueError(f"must hold lists of turns with role and content, and turn {position} is {turn!r:.80}")
    for name in _IGNORED:
        if name in turn:
            raise ValueError(f"turn {position} has {name!r}, which would not be followed: leave the key out")
    others = {k: plain(v, typed) for k, v in turn.items() if k not in ("role", "content", "tool_calls", "value")}
    content = _content(turn.get("content"), position, typed)
    checked = {"role": turn["role"], "content": content, **others}
    if calls is not None:
        checked["tool_calls"] = [_call(call, position, typed) for call in _listed(calls, position)]
    return checked


def _content(value: Any, position: int, typed: bool) -> str:
    """Text, or parts of text joined."""
    if isinstance(value, list):
        return "".join(_part(part, position, typed) for part in value)
    try:
        return text_of(value, typed)
    except ValueError as error:
        raise ValueError(f"turn {position}: its content {error}") from error


def _part(part: Any, position: int, typed: bool) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    others = (
        [n for n, v in part.items() if v is not None and n not in ("type", "text")] if isinstance(part, dict) else []
    )
    if not isinstance(part, dict) or kind not in _TEXT_PARTS or not isinstance(part.get("text"), str) or others:
        raise ValueError(
            f"turn {position}: its content has the part {part!r:.60}, which is not text: only "
            "parts of type text are trained on"
        )
    return text_of(part["text"], typed)


def _listed(calls: Any, position: int) -> list[Any]:
    if not isinstance(calls, list):
        raise ValueError(f"turn {position}: tool_calls must be a list, and is {calls!r:.60}")
    return calls


def _call(call: Any, position: int, typed: bool) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"turn {position}: the tool call {call!r:.60} names no function: give name and arguments")
    return plain(call, typed)


def answers(turn: dict[str, Any]) -> bool:
    """Whether the assistant says or calls something in this turn."""
    return turn["role"] == "assistant" and bool(turn["content"] or turn.get("tool_calls"))


def unrolled(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """A prompt and a completion per answer of the assistant, and how many of its turns are skipped.

    Skipped are turns that say nothing, and one with which the conversation begins, which has no prompt.
    """
    pairs = [
        {"prompt": turns[:position], "completion": [turn]}
        for position, turn in enumerate(turns)
        if position > 0 and answers(turn)
    ]
    return pairs, sum(turn["role"] == "assistant" for turn in turns) - len(pairs)


# ---- what must stand in a rendered conversation ------------------------------------------------------------------


def find_turn(turn: dict[str, Any], text: str, history: bool) -> str | None:
    """What of a turn does not stand in `text`, `None` where all of it does.

    White space at the ends may be gone, and reasoning may stand apart from the answer.

    Args:
        history: the turn is not trained on, so that reasoning may be left out, as templates do.
    """
    content = turn["content"]
    if not _stands(content.strip(), text):
        parts = [part.replace("<think>", "").strip() for part in content.split("</think>")]
        parts = parts[-1:] if history and turn["role"] == "assistant" else parts
        for part in parts:
            if not _stands(part, text):
                return part
    if history:
        return None
    for name in REASONING:
        if isinstance(turn.get(name), str) and not _stands(turn[name].strip(), text):
            return turn[name]
    for call in turn.get("tool_calls", ()):
        function = call.get("function") or call
        for leaf in (function["name"], *_leaves(function.get("arguments"))):
            if not _stands(leaf, text):
                return str(leaf)
    return None


def _leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            yield name
            yield from _leaves(value)
    elif isinstance(arguments, list):
        for value in arguments:
            yield from _leaves(value)
    elif arguments is not None:
        yield arguments


def _stands(value: Any, text: str) -> bool:
    """Whether a value stands in `text`, as it is or as JSON or Python write it."""
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    return value in text or any(json.dumps(value, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
