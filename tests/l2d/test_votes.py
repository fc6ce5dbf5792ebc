"""Votes: the mean of the probabilities of several noise draws, in decoding and in scoring."""

import pytest
import torch

from l2d import L2DForCausalLM
from l2d.sampler_config import SamplerConfig
from tests.l2d.test_sampling import GUIDED, decode, prompts

ONE = dict(solver="euler", budget=2, final_time=0.1)  # one evaluation near the noise end


@pytest.fixture(scope="module")
def model(make_base, make_l2d):
    return L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "lora", ["math", "coding"])).double()


@pytest.mark.parametrize("settings", [ONE, {}, GUIDED, dict(choice_temperature=1.0), dict(solver="dopri5", rtol=0.1)])
def test_votes_average_the_probabilities_of_their_draws(model, settings):
    """The distribution of the next token is the mean of what each draw gives by itself; draws are told by scoring."""
    ids, mask = prompts(2)
    options = dict(return_dict_in_generate=True, output_logits=True, max_new_tokens=1, request_keys=["a", "b"])
    voted, record = model.generate(
        ids, attention_mask=mask, sampler={**settings, "votes": 3}, return_record=True, **options
    )
    probabilities = torch.softmax(voted.logits[0].double(), -1)
    for row in range(2):
        prompt = ids[row][mask[row] > 0]
        for token in voted.logits[0][row].topk(3).indices.tolist() + [7]:
            scored = model.score(
                torch.cat([prompt, torch.tensor([token])])[None],
                continuation_mask=torch.arange(len(prompt) + 1)[None] == len(prompt),
                sampler={**settings, "mc_samples": 3},
                request_keys=["ab"[row]],
            )
            assert float(scored.logprobs[0, -1].exp()) == pytest.approx(float(probabilities[row, token]), abs=1e-6)
            assert int(scored.nfe_computed[0, -1]) >= record.nfe_computed[row][0] - 3
    if "rtol" not in settings:
        assert all(nfe_requested == [3 * SamplerConfig(**settings).budget] for nfe_requested in record.nfe_requested)


def test_votes_do_not_depend_on_batch_mates(model):
    ids, mask = prompts(4)
    sampler = {**ONE, "votes": 5}
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, sampler=sampler)
    for row in range(4):
        alone = model.generate(ids[row][mask[row] > 0][None], max_new_tokens=8, sampler=sampler)
        assert torch.equal(alone[0, -8:], together[row, -8:])


def test_votes_matter_and_one_vote_does_not(model):
    assert torch.equal(decode(model, {**ONE, "votes": 1}), decode(model, ONE))
    assert not torch.equal(decode(model, {**ONE, "votes": 16}), decode(model, ONE))
    assert torch.equal(decode(model, {"budget": 1, "votes": 16}), decode(model, {"budget": 1}))


def test_votes_score_what_they_generate(model):
    ids, _ = prompts(1)
    sampler = {"budget": 7, "votes": 3}
    made = model.generate(ids, max_new_tokens=6, sampler=sampler, request_keys=["a"])
    wanted = torch.zeros_like(made, dtype=torch.bool)
    wanted[:, -6:] = True
    scored = model.score(made, continuation_mask=wanted, sampler=sampler, request_keys=["a"])
    assert scored.greedy[wanted].all() and (scored.nfe_requested[wanted] == 21).all()


def test_votes_that_make_no_sense(model):
    with pytest.raises(ValueError, match="votes=0"):
        SamplerConfig(votes=0)
    with pytest.raises(ValueError, match="votes=3 and mc_samples=2"):
        SamplerConfig(votes=3, mc_samples=2)
    ids, _ = prompts(1)
    with pytest.raises(ValueError, match="noise gives one start per token"):
        model.generate(ids, max_new_tokens=2, sampler={"votes": 2}, noise=torch.zeros(2, 1, 16))
