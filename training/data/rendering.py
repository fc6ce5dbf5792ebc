"""Conversations as a chat template writes them, and where in this text the trained turns are.

- `render`: a conversation and the places of its trained turns
- `render_pair`: a prompt and a completion that are lists of turns

What a template leaves out or prints otherwise is refused: `render` compares every turn with the text. Where a template
has no `{% generation %}` marks, a turn's position follows from what the template writes without it.
"""

import dataclasses
import functools
import json
import os
import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from training.data.conversations import REASONING, answers, find_turn
from training.data.values import parse_json, plain

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHORT = 24  # characters that may stand in a text by chance
_PROBE = "l2dprobe"  # stands for an answer; templates change letters least
_OURS = ("messages", "conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message",
         "return_assistant_tokens_mask", "return_dict", "return_tensors", "padding", "truncation",
         "max_length")  # fmt: skip


@dataclasses.dataclass
class Rendered:
    """A text, the character ranges that are trained on, and what is to be told of it."""

    text: str
    spans: list[tuple[int, int]]
    trimmed: bool = False  # white space at the ends of an answer is gone
    silent: int = 0  # turns of the assistant that say nothing, and are not trained on
    inside: bool = False  # the prompt ends inside of what is written after it
    unused: tuple[str, ...] = ()  # keys of turns that the template does not use


@dataclasses.dataclass(frozen=True)
class _Template:
    """A chat template with what it is given: tools, and further variables."""

    source: str
    specials: tuple[tuple[str, Any], ...]
    tools: Any
    options: dict[str, Any]
    ends: tuple[str, ...]  # texts of the tokenizer's special tokens

    def write(self, turns: list[dict[str, Any]], spans: bool = False, **more: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text of some turns and, with `spans`, where in it the assistant speaks.

        Raises `ValueError` for turns that the template cannot render.
        """
        if _wants_parts(self.source, self.specials):
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            (text,), marks = render_jinja_template(
                [turns],
                tools=self.tools,
                chat_template=self.source,
                return_assistant_tokens_mask=spans,
                **{**dict(self.specials), **self.options, **more},
            )
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                f"the chat template cannot render the messages {turns!r:.100} ({error}): leave such examples out, or "
                "set chat_template_path"
            ) from error
        return text, [tuple(mark) for mark in marks[0]] if spans else []


def _template(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> _Template:
    if tokenizer.chat_template is None:
        raise ValueError("the data are conversations, and the tokenizer has no chat template: set chat_template_path")
    tools, options = example.get("tools") or None, example.get("chat_template_kwargs") or {}
    source = tokenizer.get_chat_template(None, tools)
    if clash := sorted(set(options) & {*_OURS, "tools"}):
        raise ValueError(f"chat_template_kwargs has {clash[0]!r}, which is settled here: leave it out")
    for name in options:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise ValueError(f"chat_template_kwargs has {name!r}, which the chat template does not use: leave it out")
    ends = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())}
    return _Template(source, tuple(tokenizer.special_tokens_map.items()), tools, options, tuple(sorted(ends)))


@functools.lru_cache(maxsize=16)
def _wants_parts(source: str, specials: tuple[tuple[str, Any], ...]) -> bool:
    """Whether the template writes contents that are lists of parts, and not those that are texts."""

    def writes(content: Any) -> bool:
        try:
            turns = [{"role": "user", "content": content}]
            (text,), _ = render_jinja_template([turns], chat_template=source, **dict(specials))
        except Exception:  # of any kind: templates are programs
            return False
        return _PROBE in text and "'text'" not in text and '"text"' not in text

    return not writes(_PROBE) and writes([{"type": "text", "text": _PROBE}])


def render(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], example: dict[str, Any], every_turn: bool
) -> Rendered:
    """The conversation and the ranges of the assistant's turns, or with `every_turn` of all of it.

    Raises `ValueError` where something that is trained on, or stands before it, is not in the text.
    """
    template = _template(tokenizer, example)
    turns, text, marks = _written(template, turns, bool(_MARK.search(template.source)) and not every_turn)
    trained = [position for position, turn in enumerate(turns) if every_turn or answers(turn)]
    silent = sum(turn["role"] == "assistant" and not answers(turn) for turn in turns)
    _check_context(template, turns, text, trained)
    if every_turn:
        spans = [(0, len(text))]
    elif _MARK.search(template.source):
        spans = _marked(turns, marks)
    else:
        spans = [_place(template, turns, text, position) for position in trained]
    _check_trained(template, turns, text, spans, trained)
    own = len(spans) == len(trained)
    trimmed = any(
        turns[position]["content"] not in (text[slice(*spans[n])] if own else text)
        for n, position in enumerate(trained)
    )
    return Rendered(text, spans, trimmed, 0 if every_turn else silent, unused=_unused(template, turns))


def render_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    example: dict[str, Any],
    whole: bool,
) -> Rendered:
    """The conversation with the range after the prompt, or all of it. Raises `ValueError` as `render` does."""
    template = _template(tokenizer, example)
    turns, text, _ = _written(template, [*prompt, *completion], False)
    if prompt:
        before = template.write(turns[: len(prompt)], add_generation_prompt=True)[0]
    else:
        before = text[: _start(template, turns, text, 0) or 0]
    start, end = len(os.path.commonprefix([before, text])), _without_tail(template, text, len(text))
    spans = [(0 if whole else start, end)]
    trained = [position for position in range(len(turns)) if whole or position >= len(prompt)]
    _check_context(template, turns, text, trained)
    _check_trained(template, turns, text, spans, trained)
    trimmed = any(turns[position]["content"] not in text for position in trained)
    return Rendered(text[:end], spans, trimmed, 0, start < len(before), _unused(template, turns))


def _unused(template: _Template, turns: list[dict[str, Any]]) -> tuple[str, ...]:
    keys = {key for turn in turns for key in turn} - {"role", "content", "tool_calls", *REASONING}
    return tuple(key for key in sorted(keys) if not re.search(rf"\b{re.escape(key)}\b", template.source))


def _written(
    template: _Template, turns: list[dict[str, Any]], spans: bool
) -> tuple[list[dict[str, Any]], str, list[tuple[int, int]]]:
    """The conversation; arguments that are texts of JSON become objects where the template would quote them again."""
    text, marks = template.write(turns, spans)
    quoted = [
        call
        for turn in turns
        for call in turn.get("tool_calls", ())
        if isinstance(arguments := _function(call).get("arguments"), str) and arguments not in text
    ]
    if not quoted:
        return turns, text, marks
    turns = json.loads(json.dumps(turns))
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            arguments = _function(call).get("arguments")
            if isinstance(arguments, str):
                try:
                    _function(call)["arguments"] = plain(parse_json(arguments), False)
                except ValueError as error:
                    raise ValueError(f"arguments of a tool call, {arguments!r:.60}, are not JSON ({error})") from error
    return turns, *template.write(turns, spans)


def _function(call: dict[str, Any]) -> dict[str, Any]:
    return call.get("function") or call


def _marked(turns: list[dict[str, Any]], marks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges that the template marks, without those of turns that say nothing."""
    own = [turn for turn in turns if turn["role"] == "assistant"]
    if all(answers(turn) for turn in own):
        return marks
    if len(marks) != len(own):
        raise ValueError("a turn of the assistant says nothing, and the chat template does not mark it: leave it out")
    return [mark for mark, turn in zip(marks, own, strict=True) if answers(turn)]


def _check_context(template: _Template, turns: list[dict[str, Any]], text: str, trained: list[int]) -> None:
    """Turns that are not trained on, and tools, stand in the text. Raises `ValueError`."""
    for position, turn in enumerate(turns):
        if position in trained or not turn["content"]:
            continue
        missing = find_turn(turn, text, history=True)
        if missing is None and len(turn["content"]) < _SHORT and not _writes(template, turns, position):
            missing = turn["content"]
        if missing is not None:
            raise ValueError(_left_out("a turn's text", missing, position, "leave it out"))
    for tool in template.tools or ():
        name = _function(tool).get("name") if isinstance(tool, dict) else None
        if name is not None and str(name) not in text:
            raise ValueError(f"the chat template leaves out the tool {name!r}: remove tools, or set chat_template_path")


def _writes(template: _Template, turns: list[dict[str, Any]], position: int) -> bool:
    """Whether another content of the turn would be written: a short one may stand elsewhere by chance."""
    try:
        return (
            _PROBE
            in template.write([*turns[:position], {**turns[position], "content": _PROBE}, *turns[position + 1 :]])[0]
        )
    except ValueError:  # the template wants a content of this kind
        return True


def _check_trained(
    template: _Template, turns: list[dict[str, Any]], text: str, spans: list[tuple[int, int]], trained: list[int]
) -> None:
    """What is trained on stands in the trained part of the text, beside its special tokens. Raises `ValueError`."""
    parts = [text[start:end] for start, end in spans]
    own = len(spans) == len(trained)
    for number, position in enumerate(trained):
        part = parts[number] if own else "".join(parts)
        for end in template.ends:
            part = part if end in str(turns[position]) else part.replace(end, "")
        missing = find_turn(turns[position], part, history=False)
        if missing is not None:
            remedy = "set unroll: true" if position + 1 < len(turns) else "leave it out"
            raise ValueError(_left_out("what is to be trained on", missing, position, remedy))


def _left_out(what: str, missing: str, position: int, remedy: str) -> str:
    return (
        f"the chat template leaves out {what}, {missing!r:.60} of turn {position + 1}: {remedy}, or set "
        "chat_template_path to a template that writes it"
    )


# ---- where a turn is, without marks --------------------------------------------------------------------------------


def _place(template: _Template, turns: list[dict[str, Any]], text: str, position: int) -> tuple[int, int]:
    """The range of a turn, from what the generation prompt ends with to the end of the turn. Raises `ValueError`."""
    start = _start(template, turns, text, position)
    until, _ = template.write(turns[: position + 1])
    if text.startswith(until) and start is not None:
        return start, _without_tail(template, text, len(until))
    # The template writes a turn otherwise when others follow: look where an answer of another text would stand.
    other = [*turns[:position], {"role": "assistant", "content": _PROBE}, *turns[position + 1 :]]
    before, _, after = template.write(other)[0].partition(_PROBE)
    tail = template.write(other[: position + 1])[0].partition(_PROBE)[2]
    opening = _opening(template, text)
    if start is None and opening and opening in before:
        start = before.rindex(opening) + len(opening)
    if start is None or not text.endswith(after) or not after.startswith(tail) or start > len(text) - len(after):
        raise ValueError(
            f"the chat template does not mark the assistant's turns, and turn {position + 1} cannot be found in what "
            "it writes: set chat_template_path to a template with {% generation %} around them, or unroll: true"
        )
    return start, _without_tail(template, text, len(text) - len(after) + len(tail))


def _start(template: _Template, turns: list[dict[str, Any]], text: str, position: int) -> int | None:
    if position == 0:
        return None if (opening := _opening(template, text)) is None else text.index(opening) + len(opening)
    before, _ = template.write(turns[:position], add_generation_prompt=True)
    if text.startswith(before):
        return len(before)
    plainly, _ = template.write(turns[:position])
    opening = before[len(os.path.commonprefix([before, plainly])) :]
    return len(plainly) + len(opening) if opening and text.startswith(plainly + opening) else None


def _opening(template: _Template, text: str) -> str | None:
    """What a generation prompt adds to a conversation, where it stands in `text`."""
    turns = [{"role": "user", "content": _PROBE}]
    opened, plainly = template.write(turns, add_generation_prompt=True)[0], template.write(turns)[0]
    opening = opened[len(plainly) :] if opened.startswith(plainly) else ""
    return opening if opening and opening in text else None


def _without_tail(template: _Template, text: str, end: int) -> int:
    """`end` before white space that follows a special token: nobody generates it."""
    kept = text[:end].rstrip()
    return len(kept) if kept.endswith(template.ends) else end
