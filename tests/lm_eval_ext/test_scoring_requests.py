"""Scores of the harness's requests are those of the model itself: noise, greedy tokens and cut contexts.

Run: `python -m pytest tests/lm_eval_ext/test_scoring_requests.py` (about 10 seconds)
"""

import pytest
import torch
from lm_eval.api.instance import Instance

from l2d.sampling.noise import request_key
from lm_eval_ext.model import L2DLM
from lm_eval_ext.requests.compute_record import RunRecord, sources
from lm_eval_ext.requests.token_search import Candidate, best

BUDGET = 7


@pytest.fixture(scope="module")
def lm(l2d_dir) -> L2DLM:
    return L2DLM(str(l2d_dir), device="cpu", batch_size=16, diffusion_budget=BUDGET)


def by_hand(lm: L2DLM, context: list[int], continuation: list[int], length: int | None = None) -> tuple[float, bool]:
    """Log-probability and whether greedy, of a continuation after the last tokens of a context."""
    tokens = (context + continuation)[-(length or 10**6) :]
    marked = torch.arange(len(tokens)) >= len(tokens) - len(continuation)
    scored = lm.model.score(
        torch.tensor([tokens]),
        continuation_mask=marked[None],
        sampler={"budget": BUDGET},
        request_keys=[request_key(context)],
    )
    return scored.logprobs[0][marked].sum().item(), bool(scored.greedy[0][marked].all())


def test_continuations_are_scored_under_the_noise_of_their_context(lm):
    context, continuations = [5, 80, 41, 7], [[9], [9, 10, 11], [300, 4]]
    answers = lm._loglikelihood_tokens([(("a", "b"), context, one) for one in continuations], disable_tqdm=True)
    for one, (logprob, greedy) in zip(continuations, answers, strict=True):
        expected = by_hand(lm, context, one)
        assert logprob == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_one_token_of_all_is_greedy_whatever_the_batch(lm):
    """In one batch with a longer continuation, beside which all are padded."""
    context = [5, 80, 41, 7]
    requests = [(("a", "b"), context, [token]) for token in range(400)]
    answers = lm._loglikelihood_tokens([*requests, (("a", "b"), context, [3] * 6)], disable_tqdm=True)[:400]
    logprobs = torch.tensor([logprob for logprob, _ in answers])
    assert [token for token, (_, greedy) in enumerate(answers) if greedy] == [int(logprobs.argmax())]
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-3)


def test_long_contexts_keep_their_end(l2d_dir):
    short = L2DLM(str(l2d_dir), device="cpu", batch_size=4, diffusion_budget=BUDGET, max_length=12)
    context, continuation = list(range(20, 80)), [9, 10]
    ((logprob, greedy),) = short._loglikelihood_tokens([(("a", "b"), context, continuation)], disable_tqdm=True)
    expected = by_hand(short, context, continuation, length=13)
    assert logprob == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_the_best_candidate_has_the_highest_mean():
    """Not the highest sum, by which short answers win."""
    assert best([Candidate([1] * 2, -1.0), Candidate([1] * 10, -2.0), Candidate([1] * 5, -1.5)]).tokens == [1] * 10


def test_seconds_of_a_batch_are_shared_by_solved_tokens():
    record, requests = RunRecord(), [Instance("loglikelihood", {}, (name, "x"), n) for n, name in enumerate("ab")]
    rows = [[7], [7, 7, 7]]
    record.add_batch(sources(requests), rows, rows, rows, seconds=4.0)
    assert [cost.seconds for cost in record.requests] == [1.0, 3.0]
