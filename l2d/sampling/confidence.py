"""Gates before the solve: where a cheap answer is sure, it is taken as it is.

- `behind_gates`: a solver that solves the other sites only
- `skip_confidence`: the base's answer, which is there already and costs nothing
- `early_confidence`: the answer of one evaluation of the path, at `early_time`

Sure is an answer whose most likely token has at least the gate's probability, before temperature and other processors
of `generate`. Whether it is depends on nothing else: not on batch-mates, drafts or speculation.

Legend: N sites, E velocity evaluations, V vocabulary, H hidden size, d diffusion dimension.
"""

import functools
from collections.abc import Callable

import torch

from l2d.network.transfers import take
from l2d.sampler_config import SamplerConfig, single_evaluation
from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.fixed_grid import fixed_grid
from l2d.sampling.sequential import solve_sequentially
from l2d.sampling.sites import Sites, SiteSolution

Solve = Callable[[Sites], SiteSolution]


def behind_gates(evaluator: PathEvaluator, solve: Solve, record: bool) -> Solve:
    """`solve` for sites that no gate of the evaluator's sampler answers: the base's gate comes first.

    A site has the cost of the answer that it gets, as if that had been asked for, and of those that were not sure. On
    request the record of an answered site says what it stands for: at every evaluation the same hidden state and its
    most likely token.
    """
    sampler = evaluator.sampler
    for threshold, answer in ((sampler.early_confidence, _early_answers), (sampler.skip_confidence, _base_answers)):
        if threshold < 1:
            solve = functools.partial(_gated, evaluator, threshold, answer, solve, record)
    return solve


def _gated(
    evaluator: PathEvaluator,
    threshold: float,
    answer: Callable[[PathEvaluator, Sites], SiteSolution],
    solve: Solve,
    record: bool,
    sites: Sites,
) -> SiteSolution:
    """What `answer` gives where it is sure, and `solve` elsewhere."""
    if not len(sites):
        return solve(sites)
    answered = answer(evaluator, sites)
    confidence, tokens, answered.logits = _most_likely(evaluator, answered.hidden)
    sure = (confidence >= threshold).cpu()
    keep, done = torch.nonzero(~sure).flatten(), torch.nonzero(sure).flatten()
    parts = []
    if len(keep):
        solved = solve(sites.take(keep) if len(done) else sites)
        solved.nfe_computed = solved.nfe_computed + answered.nfe_computed[keep]
        solved.passes = solved.passes + answered.passes[keep]
        parts.append(solved)
    if len(done):
        answered = answered.take(done)
        if record:
            _record_answer(answered, evaluator, take(tokens, done))
        parts.append(answered)
    return parts[0] if len(parts) == 1 else SiteSolution.join(parts).take(torch.argsort(torch.cat([keep, done])))


def _base_answers(evaluator: PathEvaluator, sites: Sites) -> SiteSolution:
    """The base's answers, as at T = 1."""
    nothing = torch.zeros(len(sites), dtype=torch.int64)
    return SiteSolution(evaluator.base_hidden(sites), nothing + 1, nothing, nothing, nothing, nothing.bool())


def _early_answers(evaluator: PathEvaluator, sites: Sites) -> SiteSolution:
    """The answers of one evaluation, from the start noise and the base's choice."""
    once = _once(evaluator.sampler)
    evaluator = PathEvaluator(evaluator.paths, evaluator.state, once, evaluator.site_class)
    return solve_sequentially(evaluator, sites, fixed_grid(once), record=False)


@functools.lru_cache(maxsize=64)
def _once(sampler: SamplerConfig) -> SamplerConfig:
    return sampler.replace(**single_evaluation(sampler.early_time))


def _most_likely(
    evaluator: PathEvaluator, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The most likely tokens for hidden states (N, H): probabilities (N,), tokens (N,), and, where they fit one chunk,
    the logits (N, V)."""
    found = []
    for part in hidden.split(evaluator.chunk):
        logits = evaluator.logits(part)
        found.append(torch.softmax(logits.float(), -1).max(-1))
    confidence, tokens = (torch.cat(column) for column in zip(*found, strict=True))
    return confidence, tokens, logits if len(found) == 1 else None


def _record_answer(solved: SiteSolution, evaluator: PathEvaluator, tokens: torch.Tensor) -> None:
    """Write the record of sites (N) whose every evaluation is the same answer, with tokens (N,)."""
    grid = fixed_grid(evaluator.sampler)
    count, branches = grid.evaluations, len(evaluator.branches)
    tokens = tokens.to(evaluator.table.device)
    solved.clean = evaluator.table[tokens].double()[:, None].repeat(1, count, 1)
    solved.chosen = tokens[:, None, None].repeat(1, count, branches)
    solved.evaluated = solved.hidden[:, None].repeat(1, count + 1, 1)
