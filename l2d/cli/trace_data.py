"""What a trace holds.

- `TraceData`: a prompt's answer with its `TokenTrace`s, each with its `Candidate`s

Legend: N generated tokens, E velocity evaluations (the output is read at evaluation E).
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token that was likely at some evaluation; `probabilities` (E + 1,) of the network's own distribution."""

    token: int
    text: str
    probabilities: list[float]


@dataclasses.dataclass(frozen=True)
class TokenTrace:
    """One generated token.

    chosen (E,): token chosen at each velocity evaluation; changes: numbers of the evaluations whose choice differs
    from the one before; base_token: what the base would say here (argmax); asked, computed, rounds: its cost.
    """

    position: int
    token: int
    text: str
    chosen: list[int]
    chosen_texts: list[str]
    changes: list[int]
    base_token: int
    base_text: str
    candidates: list[Candidate]
    nfe_requested: int
    nfe_computed: int
    passes: int


@dataclasses.dataclass(frozen=True)
class TraceData:
    """A prompt's answer; `times` (E + 1,) of the evaluations, the last one gives the output."""

    model: str
    sampler: dict[str, Any]
    decoding: dict[str, Any]
    prompt: str
    prompt_tokens: list[int]
    answer: str
    times: list[float]
    tokens: list[TokenTrace]
