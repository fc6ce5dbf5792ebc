"""A path whose attention reads values of its own: `own_values_rank`.

Decoding keeps them in a cache and makes them once per token; scoring makes them all at once; training makes them with
gradients. All three must be the same arithmetic, which is also written out here.
"""

import pytest
import torch

from l2d import L2DConfig, L2DForCausalLM
from l2d.decoding import DraftLength
from lm_eval_ext.requests.token_search import beam_search
from tests.conftest import randomise_path
from tests.l2d.test_sampling import GUIDED, decode, decode_and_score, prompts

RANK = 4
SAMPLERS = [{}, GUIDED, dict(solver="bosh3", rtol=0.1, atol=0.1), dict(choice_temperature=1.0), dict(budget=1)]


@pytest.fixture(scope="module")
def model(make_base, make_l2d):
    """A float64 model with random values of its own."""
    folder = make_l2d(make_base("llama"), "lora", ["math", "coding"], own_values_rank=RANK, warm_start=True)
    return L2DForCausalLM.from_pretrained(folder).double()


def fresh(base, **settings) -> L2DForCausalLM:
    torch.manual_seed(0)
    return L2DForCausalLM.from_base(str(base), L2DConfig(diffusion_dim=16, input_width=16, **settings)).eval()


def test_other_weights_are_those_of_a_model_without_them(base_dir):
    weights = [dict(fresh(base_dir, own_values_rank=rank).trained_parameters()) for rank in (0, RANK)]
    extra = weights[1].keys() - weights[0].keys()
    assert len(extra) == 4 and all("own_values" in name for name in extra)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(bool(weights[1][name].any()) == ("down" in name) for name in extra)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt_oss"])
def test_a_fresh_change_changes_nothing_and_a_trained_one_does(make_base, family):
    base = make_base(family)
    model = fresh(base, own_values_rank=RANK, warm_start=True)
    plain = decode(model, {"budget": 1})
    assert torch.equal(decode(model, {"budget": 7}), plain)
    randomise_path(model, gain=2.0)
    with_values = decode(model, {"budget": 7})
    assert torch.equal(decode(model, {"budget": 1}), plain)
    for layer in model.path.layers:
        layer.own_values.up.weight.data.zero_()
    without = decode(model, {"budget": 7})
    assert not torch.equal(with_values, without)


@torch.no_grad()
def test_attention_reads_the_changed_values(model):
    """A change of values by hand, in a state that a path without its own values reads."""
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    state = model.paths.main_path(ids)
    rows, index = torch.arange(2), torch.tensor([8, 5])
    x, time = torch.randn(2, 16, dtype=torch.float64), torch.tensor([0.3, 0.8])
    classes = torch.tensor([0, 2])
    hidden, _ = model.paths.path_hidden(state, rows, index, x, time, classes)
    kept = [layer.own_values for layer in model.path.layers]
    for layer, own, base in zip(state.layers, kept, model.paths.decoder.layers, strict=True):
        change = layer.received.double() @ own.down.weight.double().T @ own.up.weight.double().T
        groups, size = layer.values.shape[1], layer.values.shape[3]
        by_hand = change.view(2, 9, groups, size).permute(0, 2, 1, 3)
        projected = base.self_attn.v_proj(layer.received).view(2, 9, groups, size).permute(0, 2, 1, 3)
        torch.testing.assert_close(layer.values, projected)
        layer.values = layer.values + by_hand
    try:
        for layer in model.path.layers:
            layer.own_values = None
        again, _ = model.paths.path_hidden(state, rows, index, x, time, classes)
    finally:
        for layer, own in zip(model.path.layers, kept, strict=True):
            layer.own_values = own
    torch.testing.assert_close(again, hidden)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("drafts", [0, 3])
def test_decoding_with_a_cache_is_scoring_without_one(model, monkeypatch, sampler, drafts):
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)
    decode_and_score(model, {**sampler, "draft_tokens": drafts})


@pytest.mark.parametrize("settings", [{}, GUIDED])
def test_speculation_drafts_and_batch_mates_change_nothing(model, monkeypatch, settings):
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)
    made = [decode(model, {**settings, **more}) for more in ({}, dict(speculation=False), dict(draft_tokens=0))]
    assert all(torch.equal(made[0], one) for one in made)
    ids, mask = prompts()
    for row in range(len(ids)):
        own = mask[row].bool()
        options = dict(attention_mask=mask[row, own][None], sampler=settings, max_new_tokens=12)
        assert torch.equal(model.generate(ids[row, own][None], **options)[0, -12:], made[0][row, -12:])


def test_a_search_of_width_one_is_greedy_decoding(model):
    """The search reorders its cache, with the path's values in it."""
    ids, _ = prompts(1)
    sampler = model.sampler({"budget": 7})
    answer = model.generate(ids, sampler=sampler, max_new_tokens=6, eos_token_id=None)[0, ids.shape[1] :].tolist()
    found = {
        width: beam_search(model, [ids[0].tolist()] * 2, [b"0", b"1"], sampler, width, 6, [], lambda tokens: False, 0)
        for width in (1, 2)
    }
    keyed = model.generate(ids, sampler=sampler, request_keys=[b"0"], max_new_tokens=6, eos_token_id=None)
    assert found[1][0].tokens == keyed[0, ids.shape[1] :].tolist() and len(answer) == 6
    for one in found[2]:
        tokens = torch.tensor([ids[0].tolist() + one.tokens])
        new = torch.zeros(tokens.shape, dtype=torch.bool)
        new[:, ids.shape[1] :] = True
        key = [b"0" if one is found[2][0] else b"1"]
        scored = model.score(tokens, continuation_mask=new, sampler=sampler, request_keys=key)
        assert float(scored.logprobs.sum()) == pytest.approx(one.likelihood, abs=1e-4)


def test_bases_without_value_projections_are_refused(make_base):
    with pytest.raises(
        ValueError, match="own_values_rank=4 cannot be followed: Phi3Attention has no projection v_proj"
    ):
        fresh(make_base("phi3"), own_values_rank=RANK)
