"""Search over generated tokens, ranked by the model's own likelihood, at any budget.

- `Candidate`: a generated text with its log-likelihood and its cost
- `TokenLikelihood`: a logits processor of `generate` that adds up the log-likelihood of what is chosen
- `best`: the candidate with the highest mean log-likelihood per token
- `beam_search`: the usual beam search; every beam of a request has the same noise

The likelihood of a token is the one before temperature and filters, under the noise with which it is decided, and
so the one that `score` gives. The mean per token keeps short answers from winning by being short.
"""

import dataclasses
from collections.abc import Callable

import torch
from transformers import DynamicCache, LogitsProcessor

from l2d import L2DForCausalLM
from l2d.sampler_config import SamplerConfig
from l2d.sampling.noise import RequestNoise
from l2d.sampling.solve import solve_next


@dataclasses.dataclass
class Candidate:
    """Generated tokens, the sum of their log-likelihoods, and what deciding them cost: one value per solved token, and
    the number of solves that ran into `max_evaluations`."""

    tokens: list[int]
    likelihood: float = 0.0
    nfe_requested: list[int] = dataclasses.field(default_factory=list)
    nfe_computed: list[int] = dataclasses.field(default_factory=list)
    passes: list[int] = dataclasses.field(default_factory=list)
    capped: int = 0

    @property
    def mean_likelihood(self) -> float:
        """Mean log-likelihood per token."""
        return self.likelihood / max(1, len(self.tokens))

    def add_cost(self, other: "Candidate") -> None:
        """Add what another candidate of the same request cost."""
        self.nfe_requested += other.nfe_requested
        self.nfe_computed += other.nfe_computed
        self.passes += other.passes
        self.capped += other.capped


def best(candidates: list[Candidate]) -> Candidate:
    """The candidate with the highest mean log-likelihood, the first of equals; it carries the cost of all."""
    chosen = dataclasses.replace(max(candidates, key=lambda candidate: candidate.mean_likelihood))
    chosen.nfe_requested, chosen.nfe_computed, chosen.passes, chosen.capped = [], [], [], 0
    for candidate in candidates:
        chosen.add_cost(candidate)
    return chosen


class TokenLikelihood(LogitsProcessor):
    """Keeps the log-likelihood of every generated token, without keeping logits of more than one step."""

    def __init__(self) -> None:
        self._last: tuple[int, torch.Tensor] | None = None  # length before the token, log-probabilities (B, V)
        self._logprobs: dict[int, torch.Tensor] = {}  # position of a token -> its log-likelihood (B,)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return `scores` (B, V) unchanged; `input_ids` (B, S) ends with the tokens chosen in the step before."""
        self._settle(input_ids)
        self._last = input_ids.shape[1], torch.log_softmax(scores.float(), dim=-1)
        return scores

    def _settle(self, input_ids: torch.Tensor) -> None:
        if self._last is not None and self._last[0] == input_ids.shape[1] - 1:
            self._logprobs[self._last[0]] = self._last[1].gather(-1, input_ids[:, -1:]).squeeze(-1)

    def sums(self, sequences: torch.Tensor, lengths: list[int]) -> list[float]:
        """Sum of each row's first `lengths` values, given the finished `sequences` (B, S)."""
        self._settle(sequences)
        positions = [position for position in sorted(self._logprobs) if position < sequences.shape[1]]
        steps = torch.stack([self._logprobs[position] for position in positions], dim=1).double().tolist()  # (B, steps)
        return [sum(row[:length]) for row, length in zip(steps, lengths, strict=True)]


@dataclasses.dataclass
class _Beam:
    tokens: list[int]
    likelihood: float = 0.0


@dataclasses.dataclass
class _Search:
    """One request's beams, the texts that are finished, and the cost so far."""

    noise: RequestNoise
    cost: Candidate
    live: list[_Beam] = dataclasses.field(default_factory=lambda: [_Beam([])])
    finished: list[Candidate] = dataclasses.field(default_factory=list)

    def result(self) -> Candidate:
        winner = max(self.finished, key=lambda candidate: candidate.mean_likelihood)
        return dataclasses.replace(self.cost, tokens=winner.tokens, likelihood=winner.likelihood)


@torch.no_grad()
def beam_search(
    model: L2DForCausalLM,
    prompts: list[list[int]],
    keys: list[bytes],
    sampler: SamplerConfig,
    width: int,
    max_tokens: int,
    ends: list[int],
    stopped: Callable[[list[int]], bool],
    pad: int,
) -> list[Candidate]:
    """Best of `width` finished beams for each prompt.

    A beam is finished when its last token is one of `ends` or `stopped` says so of its tokens; a request when it has
    `width` finished beams, or at `max_tokens`. Width 1 is greedy decoding. Costs are those of all beams.
    """
    searches = [_Search(RequestNoise(sampler.seed, key), Candidate([])) for key in keys]
    device, longest = model.device, max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions, lengths = (mask.cumsum(1) - 1).clamp(min=0), mask.sum(1)
    cache, rows = DynamicCache(), [(search, 0) for search in searches]
    for step in range(max_tokens):
        state = model.paths.main_path(ids, mask, positions, cache).last()
        logprobs = _token_logprobs(model, state, sampler, lengths, [search for search, _ in rows])
        kept: list[tuple[int, int]] = []  # (row that a beam continues, its new token)
        rows_before, rows = rows, []
        for search in searches:
            of_search = [row for row, (owner, _) in enumerate(rows_before) if owner is search]
            if of_search:
                survivors = _extend(search, logprobs[of_search], width, ends, stopped)
                kept += [(of_search[beam], token) for beam, token in survivors]
                rows += [(search, number) for number in range(len(survivors))]
        if not rows or step + 1 == max_tokens:
            break
        order = torch.tensor([row for row, _ in kept], device=device)
        cache.reorder_cache(order)
        ids = torch.tensor([[token] for _, token in kept], device=device)
        mask = torch.cat([mask[order], mask.new_ones(len(kept), 1)], dim=1)
        positions, lengths = lengths[order][:, None], lengths[order] + 1
    for search in searches:
        search.finished += [Candidate(beam.tokens, beam.likelihood) for beam in search.live]
    return [search.result() for search in searches]


def _token_logprobs(
    model: L2DForCausalLM, state, sampler: SamplerConfig, lengths: torch.Tensor, owners: list[_Search]
) -> torch.Tensor:
    """Log-probabilities (rows, V) float32 of the next token of every beam; costs go to the beams' searches."""
    rows = torch.arange(len(owners), device=lengths.device)
    noises = [search.noise for search in owners]
    solved, logits = solve_next(model.paths, state, sampler, rows, torch.zeros_like(rows), lengths.tolist(), noises)
    costs = (
        column.tolist() for column in (solved.nfe_requested, solved.nfe_computed, solved.passes, solved.capped.long())
    )
    for search, nfe_requested, nfe_computed, passes, capped in zip(owners, *costs, strict=True):
        search.cost.add_cost(Candidate([], 0.0, [nfe_requested], [nfe_computed], [passes], capped))
    return torch.log_softmax(logits, dim=-1)


def _extend(
    search: _Search, logprobs: torch.Tensor, width: int, ends: list[int], stopped: Callable[[list[int]], bool]
) -> list[tuple[int, int]]:
    """Put one more token on a request's beams, `logprobs` (beams, V); return (beam, token) of those that go on."""
    before = torch.tensor([beam.likelihood for beam in search.live], device=logprobs.device)
    total = (before[:, None] + logprobs).flatten()
    values, indices = total.topk(min(len(total), (1 + max(1, len(ends))) * width))
    survivors: list[tuple[int, int]] = []
    beams: list[_Beam] = []
    for rank, (value, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        beam, token = divmod(index, logprobs.shape[-1])
        tokens = [*search.live[beam].tokens, token]
        if token in ends or stopped(tokens):
            if rank < width:
                search.finished.append(Candidate(tokens, value))
        elif len(beams) < width:
            beams.append(_Beam(tokens, value))
            survivors.append((beam, token))
    if len(search.finished) >= width:
        beams, survivors = [], []
    search.live = beams
    return survivors
