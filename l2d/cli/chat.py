"""Talk to a checkpoint: streaming, with budget, guidance and seed changeable on the way.

- `Chat`: the conversation; `answer` gives the next reply through `generate`, as the evaluation would
- `Streamer`: writes tokens as they come, tinted by compute if asked to
- `command`: what `/budget 31` and its like do
- `run`: `python -m l2d chat DIR [--budget T ...]`
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from l2d.cli.session import Session, add_sampler_arguments, check_text, decoding_options, sampler_from, session_from
from l2d.cli.terminal import Waiting, harmless, shade
from l2d.sampler_config import REMOVED

HELP = """/budget T          evaluations per token; 1 is the base
/guidance G [NAME] guidance scale and class; 1 is none
/seed N            of all noise
/temperature X     of the output tokens; 0 is greedy
/tint              answers tinted by compute, as they come: on or off
/new               forget the conversation
/settings          what holds now
/help, /quit"""


USUAL_LENGTH = 256
"""Most tokens of an answer where nothing else is asked for."""
TINT = "the brighter a token, the more evaluations it took, up to three times those requested"
"""What the colours of an answer mean."""


@dataclasses.dataclass
class Reply:
    """One answer: its text, the texts of its tokens, their cost, what was left out of the conversation, if anything
    was, and whether it ended only because it reached the most tokens of an answer."""

    text: str
    pieces: list[str]
    nfe_requested: list[int]
    nfe_computed: list[int]
    passes: list[int]
    left_out: str = ""
    cut: bool = False


def effort(requested: int, computed: int) -> float:
    """From 0, where a token took no more evaluations than were requested, to 1, where it took three times as many."""
    return min(1.0, max(0.0, (computed / max(1, requested) - 1) / 2))


class Streamer:
    """Writes tokens as they come; passed to `generate`.

    Args:
        session: decodes; write: takes text; hidden: tokens that are not shown.
        tint: on a background that tells what the token cost; that of a character of several tokens is of the last one.
    """

    def __init__(self, session: Session, write: Callable[[str], Any], hidden: list[int], tint: bool = False):
        self.session, self.write, self.hidden, self.tint = session, write, hidden, tint
        self.tokens: list[int] = []
        self.seen = self.written = 0
        self.prompt = True
        self.record: Any = None

    def follow(self, record: Any) -> None:
        """Take the `DecodeRecord` that grows with the answer."""
        self.record = record

    def put(self, tokens: Any) -> None:
        """Take the next token of the only row, and write what is certain of the text so far.

        What comes first is the prompt (transformers' convention): it is not shown.
        """
        if self.prompt:
            self.prompt = False
            return
        self.seen += 1
        self.tokens += [token for token in tokens.flatten().tolist() if token not in self.hidden]
        text = self.session.tokenizer.decode(self.tokens, skip_special_tokens=False)
        if not text.endswith("\ufffd"):  # the rest of a character is still to come
            self._write(text)

    def end(self) -> None:
        """Write what is left."""
        self._write(self.session.tokenizer.decode(self.tokens, skip_special_tokens=False))

    def _write(self, text: str) -> None:
        new, self.written = text[self.written :], len(text)
        if not new:
            return
        if not (self.tint and self.record):
            self.write(harmless(new))
            return
        requested, computed = (
            counts[0][self.seen - 1] for counts in (self.record.nfe_requested, self.record.nfe_computed)
        )
        self.write(shade(new, effort(requested, computed), colour=True))


class Chat:
    """A conversation with a model.

    Attributes:
        messages: roles and contents so far.
        sampler: settings that differ from the checkpoint's own; temperature, max_new_tokens: of the answers.
        plain: no chat template: the prompt is what the user wrote, and nothing is remembered.
    """

    def __init__(
        self,
        session: Session,
        sampler: dict[str, Any] | None = None,
        temperature: float = 0.0,
        max_new_tokens: int | None = None,
        system: str | None = None,
        plain: bool = False,
    ):
        self.session, self.plain = session, plain
        self.sampler = dict(sampler or {})
        self.temperature, self.max_new_tokens = temperature, session.answer_length(max_new_tokens, USUAL_LENGTH)
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self.start)
        self.tint = False
        self._check(self.sampler, temperature)
        if not plain and session.tokenizer.chat_template is None:
            raise ValueError("the tokenizer of this checkpoint has no chat template: use --plain.")

    def _check(self, sampler: dict[str, Any], temperature: float) -> None:
        self.session.model.sampler(sampler)
        decoding_options(temperature, self.max_new_tokens)

    def change(self, temperature: float | None = None, **sampler: Any) -> None:
        """Change settings from the next answer on; impossible ones raise `ValueError` and change nothing."""
        merged = {**self.sampler, **sampler}
        warmth = self.temperature if temperature is None else temperature
        self._check(merged, warmth)
        self.sampler, self.temperature = merged, warmth

    def reset(self) -> None:
        """Forget the conversation, not the settings."""
        self.messages = list(self.start)

    def prompt(self, text: str) -> list[int]:
        """Tokens of the conversation with `text` as the user's next words; see `fit`."""
        return self.fit(text)[0]

    def fit(self, text: str) -> tuple[list[int], str]:
        """Tokens of the conversation that leave room to answer, and a sentence about what was left out for that.

        The oldest turns go first, whole, and the system message stays. A prompt that is too long without them loses its
        beginning, as in the evaluation.
        """
        room, turns, dropped = self.session.longest - self.max_new_tokens, self.messages[len(self.start) :], 0
        ids = self._tokens(turns, text)
        while len(ids) > room and turns:
            turns, dropped = turns[2:], dropped + 1
            ids = self._tokens(turns, text)
        left_out = f"The first {dropped} turns no longer fit and were left out. " if dropped else ""
        if len(ids) > room:
            kept = "the system message included, " if self.start and not self.plain else ""
            left_out += f"The prompt of {len(ids)} tokens, {kept}was cut to its last {room}. "
        return ids[-room:], left_out.strip()

    def _tokens(self, turns: list[dict[str, str]], text: str) -> list[int]:
        if not self.plain:
            text = self.session.conversation_text([*self.start, *turns, {"role": "user", "content": text}])
        return self.session.encode(text)

    def answer(
        self,
        text: str,
        write: Callable[[str], Any] = lambda piece: None,
        colour: bool = False,
        wait: Callable[[str], Any] = lambda words: None,
    ) -> Reply:
        """Answer the user's `text`, streaming through `write`; the conversation grows by both.

        `colour`: `write` takes escape sequences, so that the answer may be tinted. `wait` gets words about what goes on
        before the first token.
        Noise is keyed by the prompt's tokens, as in the evaluation: the same words get the same answer.
        """
        import torch

        model, end = self.session.model, self.session.end_tokens()
        ids, left_out = self.fit(text)
        wait(f"reading {len(ids):,} tokens ...")
        sequences, record = model.generate(
            torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=model.device),
            sampler=model.sampler(self.sampler),
            return_record=True,
            streamer=Streamer(self.session, write, end, self.tint and colour),
            **self.session.ending(),
            **decoding_options(self.temperature, self.max_new_tokens),
        )
        new = sequences[0, len(ids) :].tolist()
        tokens = [token for token in new if token not in end]
        cut = len(new) == self.max_new_tokens == len(tokens)
        pieces = self.session.pieces(tokens)
        said = self.session.tokenizer.decode(tokens, skip_special_tokens=False)
        if not self.plain:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        return Reply(said, pieces, record.nfe_requested[0], record.nfe_computed[0], record.passes[0], left_out, cut)

    def settings(self) -> str:
        """What holds now, in one line."""
        sampler = self.session.model.sampler(self.sampler)
        parts = [f"T = {sampler.budget}, {sampler.solver}", f"seed {sampler.seed}", f"temperature {self.temperature:g}"]
        if sampler.guided or sampler.guidance_class is not None:
            parts.append(f"guidance {sampler.guidance_scale:g} towards {sampler.guidance_class}")
        return ", ".join(parts)


def command(chat: Chat, line: str) -> str | None:
    """Do what a line that begins with / says; returns what to tell the user, `None` to quit. Raises `ValueError`."""
    name, *values = line[1:].split() or [""]
    if name in ("quit", "exit", "q"):
        return None
    if name == "new":
        chat.reset()
        return "The conversation starts anew."
    if name == "tint":
        chat.tint = not chat.tint
        return f"Tint is on: {TINT}." if chat.tint else "Tint is off."
    changes = ("budget", "seed", "temperature")
    if name in changes and len(values) == 1:
        chat.change(**{name: _number(name, values[0], float if name == "temperature" else int)})
    elif name == "guidance" and len(values) in (1, 2):
        wanted: dict[str, Any] = {"guidance_scale": _number(name, values[0], float)}
        if len(values) == 2:
            wanted["guidance_class"] = values[1]
        chat.change(**wanted)
    elif name == "help":
        return HELP
    elif name in (*changes, "guidance"):
        raise ValueError(f"/{name} takes {'one or two values' if name == 'guidance' else 'one value'}.\n{HELP}")
    elif name in REMOVED:
        raise ValueError(REMOVED[name])
    elif name != "settings":
        raise ValueError(f"/{name} is not known.\n{HELP}")
    return chat.settings()


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"/{name} {text} must be a number: write for example /{name} 1.") from error


def summary(reply: Reply) -> str:
    """What the answer cost, in one line."""
    count = max(1, len(reply.nfe_computed))
    return (
        f"{len(reply.nfe_computed)} tokens, {sum(reply.nfe_computed) / count:.1f} evaluations and "
        f"{sum(reply.passes) / count:.2f} passes each"
    )


# ---- command line ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m l2d chat`."""
    add_sampler_arguments(parser)
    parser.add_argument("--system", help="system message")
    parser.add_argument("--plain", action="store_true", help="no chat template: continue what is typed")
    parser.add_argument("--tint", action="store_true", help="answers tinted by compute, and what they cost")


def run(given: argparse.Namespace) -> None:
    """Chat on the terminal until /quit or the end of the input. Raises `ValueError`."""
    check_text("system", given.system)
    session = session_from(given, template=not given.plain)
    sampler = sampler_from(given)
    chat = Chat(session, sampler, given.temperature, given.max_new_tokens, given.system, given.plain)
    chat.tint = given.tint
    colour = sys.stdout.isatty()
    print(f"{chat.settings()}. /help lists what may be changed.")
    if chat.tint and colour:
        print(f"Tint is on: {TINT}.")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines may be edited and called back; pasted lines stay together
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 cost a turn, not the conversation
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.startswith("/"):
            try:
                told = command(chat, line)
            except ValueError as error:
                told = str(error)
            if told is None:
                return
            print(told)
        elif line.strip():
            _turn(chat, line, colour)


def _turn(chat: Chat, line: str, colour: bool) -> None:
    try:
        with Waiting(sys.stdout) as waiting:

            def write(piece: str) -> None:
                waiting.end()
                print(piece, end="", flush=True)

            reply = chat.answer(line, write, colour, waiting.say)
    except KeyboardInterrupt:
        print("\n(stopped; this turn is forgotten)")
        return
    except ValueError as error:
        print(error)
        return
    print()
    if reply.left_out:
        print(f"({reply.left_out})")
    if reply.cut:
        print(f"(stopped after {chat.max_new_tokens} tokens: --max-new-tokens allows for more)")
    if chat.tint:
        print(summary(reply))
