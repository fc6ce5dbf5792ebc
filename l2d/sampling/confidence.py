"""A gate before the solve: where the base is sure, its answer is taken as it is (`SamplerConfig.skip_confidence`).

- `solve_where_unsure`: solves the other sites only

The base's distribution at a site is there already, so a token that is skipped costs no evaluation. Whether one is
depends on nothing but that distribution, before temperature and other processors of `generate`: not on batch-mates,
drafts or speculation.

Legend: N sites, E velocity evaluations, V vocabulary, H hidden size, d diffusion dimension.
"""

from collections.abc import Callable

import torch

from l2d.network.transfers import take
from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.fixed_grid import fixed_grid
from l2d.sampling.sites import Sites, SiteSolution


def solve_where_unsure(
    evaluator: PathEvaluator, sites: Sites, solve: Callable[[Sites], SiteSolution], record: bool
) -> SiteSolution:
    """What `solve` gives for sites where the base's most likely token is less likely than `skip_confidence`.

    The others have the base's hidden state, one evaluation requested (as T = 1) and none computed. On request their
    record says what they stand for: at every evaluation the base's hidden state and its most likely token.
    """
    hidden = evaluator.base_hidden(sites)
    confidence, tokens, logits = _base_answers(evaluator, hidden)
    sure = (confidence >= evaluator.sampler.skip_confidence).cpu()
    keep, skip = torch.nonzero(~sure).flatten(), torch.nonzero(sure).flatten()
    if not len(skip):
        return solve(sites)
    answered = _base_solution(take(hidden, skip), None if logits is None else take(logits, skip))
    if record:
        _record_base(answered, evaluator, take(tokens, skip))
    if not len(keep):
        return answered
    parts = SiteSolution.join([solve(sites.take(keep)), answered])
    return parts.take(torch.argsort(torch.cat([keep, skip])))


def _base_answers(
    evaluator: PathEvaluator, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The base's most likely tokens for hidden states (N, H): probabilities (N,), tokens (N,), and, where they fit one
    chunk, the logits (N, V)."""
    found = []
    for part in hidden.split(evaluator.chunk):
        logits = evaluator.logits(part)
        found.append(torch.softmax(logits.float(), -1).max(-1))
    confidence, tokens = (torch.cat(column) for column in zip(*found, strict=True))
    return confidence, tokens, logits if len(found) == 1 else None


def _base_solution(hidden: torch.Tensor, logits: torch.Tensor | None) -> SiteSolution:
    """The base's answers, as at T = 1."""
    nothing = torch.zeros(len(hidden), dtype=torch.int64)
    return SiteSolution(hidden, nothing + 1, nothing, nothing, nothing, nothing.bool(), logits=logits)


def _record_base(solved: SiteSolution, evaluator: PathEvaluator, tokens: torch.Tensor) -> None:
    """Write the record of sites (N) whose every evaluation is the base's, with tokens (N,)."""
    grid = fixed_grid(evaluator.sampler)
    count, branches = grid.evaluations, len(evaluator.branches)
    tokens = tokens.to(evaluator.table.device)
    solved.clean = evaluator.table[tokens].double()[:, None].repeat(1, count, 1)
    solved.chosen = tokens[:, None, None].repeat(1, count, branches)
    solved.evaluated = solved.hidden[:, None].repeat(1, count + 1, 1)
