"""How much compute a run spent, in all and per request.

- `Source`, `sources`: what the harness's requests belong to, with repeats counted and its padding marked
- `RequestCost`: one line of a compute file
- `RunRecord`: evaluations requested and computed, and passes, per generated or scored token; what tasks set themselves
- `RunInfo`: the part of the results file that tells of this package, with the costs of all requests attached
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.utils import handle_non_serializable, hash_string

QUANTITIES = ("nfe_requested", "nfe_computed", "passes")
Rows = Iterable[list[int]]


@dataclasses.dataclass(frozen=True)
class Source:
    """One request as the harness handed it over.

    Attributes:
        instance: the request; the harness hands in the same object once per repeat.
        repeat: which repeat of the instance this is, from 0.
        padding: one of the copies by which the harness makes the lists of several processes equally long.
    """

    instance: Instance
    repeat: int
    padding: bool


def sources(instances: list[Instance]) -> list[Source]:
    """`Source` of each request, in their order."""
    seen: Counter[int] = Counter()
    listed = []
    for instance in instances:
        repeat = seen[id(instance)]
        seen[id(instance)] += 1
        listed.append(Source(instance, repeat, instance.repeats is not None and repeat >= instance.repeats))
    return listed


@dataclasses.dataclass
class RequestCost:
    """What one request cost: a line of `compute_<task>_<time>.jsonl`.

    `doc_hash` and `prompt_hash` are those of the harness's samples file. `request` numbers the requests of a document
    (its choices), `repeat` its repeats. `solved_tokens` counts the tokens that were decided or scored, those of
    rejected candidates of a token search included; `nfe_requested`, `nfe_computed` and `passes` are sums over them.
    `seconds` is the request's share of its batch's time, by solved tokens.
    """

    task: str | None
    doc_id: int | None
    doc_hash: str
    prompt_hash: str
    request: int
    repeat: int
    kind: str
    generated_tokens: int
    scored_tokens: int
    solved_tokens: int
    nfe_requested: int
    nfe_computed: int
    passes: int
    seconds: float

    def line(self) -> str:
        """JSON, with the means per solved token beside the sums."""
        tokens = max(self.solved_tokens, 1)
        means = {f"{name}_per_token": getattr(self, name) / tokens for name in QUANTITIES}
        return json.dumps(dataclasses.asdict(self) | means)


class RunInfo(dict):
    """What `get_model_info` reports under `l2d`: plain values, and as an attribute the costs of all requests."""

    requests: list[RequestCost]


class RunRecord:
    """Counts per token: evaluations that the budget or the solver asks for (`nfe_requested`), evaluations that were
    computed (`nfe_computed`), and `passes` (batched passes through the diffusion path, one after the other).

    Values are kept as a histogram, so that mean, maximum and quantiles are exact and records of several processes add.
    `task_samplers` are, by task, the settings that answered its generation requests as far as they are not those of the
    model args: one entry, empty where nothing differs, for each set of generation kwargs.
    """

    def __init__(self) -> None:
        self.generated_tokens = 0
        self.scored_tokens = 0
        self.capped_tokens = 0
        self.seconds = 0.0
        self.peak_memory_bytes = 0
        self.counts: dict[str, Counter[int]] = {name: Counter() for name in QUANTITIES}
        self.requests: list[RequestCost] = []
        self.task_samplers: dict[str, list[dict[str, Any]]] = {}

    def add_sampler(self, task: str, changes: dict[str, Any]) -> None:
        """Note that requests of `task` were answered with `changes` to the model args' settings."""
        known = self.task_samplers.setdefault(task, [])
        if changes not in known:
            known.append(changes)

    def add(self, nfe_requested: Rows, nfe_computed: Rows, passes: Rows, generated: bool) -> None:
        """Add some tokens, generated or scored: one value of each quantity per token, in one list per row."""
        before = self.tokens
        for name, rows in zip(QUANTITIES, (nfe_requested, nfe_computed, passes), strict=True):
            for row in rows:
                self.counts[name].update(row)
        if generated:
            self.generated_tokens += self.tokens - before
        else:
            self.scored_tokens += self.tokens - before

    def add_batch(
        self,
        batch: list[Source],
        nfe_requested: list[list[int]],
        nfe_computed: list[list[int]],
        passes: list[list[int]],
        seconds: float,
        answers: list[int] | None = None,
    ) -> None:
        """Add a batch of requests: one row of values per request, one value per token; the harness's padding is left
        out. `answers`: tokens of each answer where texts were generated, `None` where continuations were scored."""
        total = max(1, sum(map(len, nfe_requested)))
        for number, source in enumerate(batch):
            if source.padding:
                continue
            values = nfe_requested[number], nfe_computed[number], passes[number]
            self.add([values[0]], [values[1]], [values[2]], generated=answers is not None)
            if answers is not None:  # the candidates that a token search rejects are solved, not generated
                self.generated_tokens += answers[number] - len(values[0])
            share = seconds * len(nfe_requested[number]) / total
            self.seconds += share
            self.requests.append(_cost(source, values, share, None if answers is None else answers[number]))

    def merge(self, other: "RunRecord") -> None:
        """Add the tokens of `other`, another process's. Seconds add up: tokens per second are per process."""
        for name in ("generated_tokens", "scored_tokens", "capped_tokens", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)
        for name in QUANTITIES:
            self.counts[name].update(other.counts[name])
        self.requests += other.requests
        for task, known in other.task_samplers.items():
            for changes in known:
                self.add_sampler(task, changes)

    @property
    def tokens(self) -> int:
        """Tokens recorded so far."""
        return self.counts["nfe_requested"].total()

    def summary(self) -> dict[str, Any]:
        """Totals as plain values: token counts, and mean, median, 95th percentile and maximum of each quantity; and
        `task_samplers`."""
        names = ("generated_tokens", "scored_tokens", "capped_tokens", "seconds", "peak_memory_bytes")
        totals = {name: getattr(self, name) for name in names}
        totals |= {"solved_tokens": self.tokens, "task_samplers": self.task_samplers}
        answered = self.generated_tokens + self.scored_tokens
        totals["tokens_per_second"] = answered / self.seconds if self.seconds else None
        return totals | {f"{name}_per_token": _statistics(self.counts[name]) for name in QUANTITIES}


def _cost(source: Source, values: tuple[list[int], ...], seconds: float, answer: int | None) -> RequestCost:
    instance, tokens = source.instance, len(values[0])
    document = json.dumps(instance.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return RequestCost(
        task=instance.task_name,
        doc_id=instance.doc_id,
        doc_hash=hash_string(document),
        prompt_hash=hash_string(instance.args[0]),
        request=instance.idx,
        repeat=source.repeat,
        kind=instance.request_type,
        generated_tokens=answer or 0,
        scored_tokens=tokens if answer is None else 0,
        solved_tokens=tokens,
        **{name: sum(row) for name, row in zip(QUANTITIES, values, strict=True)},
        seconds=seconds,
    )


def _statistics(counts: Counter[int]) -> dict[str, float] | None:
    total = counts.total()
    if not total:
        return None
    mean = sum(value * count for value, count in counts.items()) / total
    return {
        "mean": mean,
        "median": _quantile(counts, 0.5),
        "p95": _quantile(counts, 0.95),
        "max": max(counts),
    }


def _quantile(counts: Counter[int], share: float) -> int:
    """Smallest value that at least `share` of the tokens do not exceed."""
    needed, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            break
    return value
