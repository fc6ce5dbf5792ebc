"""A path whose attention reads keys and values of its own: `own_keys_rank`, `own_values_rank`.

Decoding keeps them in a cache and makes them once per token; scoring makes them all at once; training makes them with
gradients. All three must be the same arithmetic, which is also written out here.
"""

import functools

import pytest
import torch

from l2d import L2DConfig, L2DForCausalLM
from l2d.decoding import DraftLength
from l2d.network.own_keys_values import read
from lm_eval_ext.requests.token_search import beam_search
from tests.conftest import randomise_path
from tests.l2d.test_architectures import KNOWN, SMALL_PATH
from tests.l2d.test_architectures import make_base as make_known_base
from tests.l2d.test_sampling import GUIDED, decode, decode_and_score, prompts

RANK = 4
OWN = {"values": {"own_values_rank": RANK}, "keys": {"own_keys_rank": RANK}}
OWN["both"] = OWN["keys"] | OWN["values"]
FAMILIES = ["llama", "qwen3", "gemma3_text", "mixtral", "gpt_oss"]  # norms on keys, windows, sinks among them
SAMPLERS = [{}, GUIDED, dict(solver="bosh3", rtol=0.1, atol=0.1), dict(choice_temperature=1.0), dict(budget=1)]


@pytest.fixture(scope="module")
def make_model(make_base, make_l2d):
    """kind of `OWN` -> a float64 model with random keys or values of its own."""

    @functools.cache
    def make(kind: str) -> L2DForCausalLM:
        folder = make_l2d(make_base("llama"), "lora", ["math", "coding"], **OWN[kind], warm_start=True)
        return L2DForCausalLM.from_pretrained(folder).double()

    return make


@pytest.fixture
def model(make_model):
    return make_model("both")


def fresh(base, **settings) -> L2DForCausalLM:
    torch.manual_seed(0)
    return L2DForCausalLM.from_base(str(base), L2DConfig(diffusion_dim=16, input_width=16, **settings)).eval()


@pytest.mark.parametrize("kind", OWN)
def test_other_weights_are_those_of_a_model_without_them(base_dir, kind):
    weights = [dict(fresh(base_dir, **own).trained_parameters()) for own in ({}, OWN[kind])]
    extra = weights[1].keys() - weights[0].keys()
    assert len(extra) == 4 * len(OWN[kind])
    assert all(f"own_{what}" in " ".join(extra) for what in ("keys", "values") if kind in (what, "both"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(bool(weights[1][name].any()) == ("down" in name) for name in extra)


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_change_changes_nothing_and_a_trained_one_does(make_base, family, kind):
    base = make_base(family)
    model = fresh(base, **OWN[kind], warm_start=True)
    plain = decode(model, {"budget": 1})
    assert torch.equal(decode(model, {"budget": 7}), plain)
    randomise_path(model, gain=2.0)
    with_values = decode(model, {"budget": 7})
    assert torch.equal(decode(model, {"budget": 1}), plain)
    for layer in model.path.layers:
        getattr(layer, f"own_{kind}").up.weight.data.zero_()
    without = decode(model, {"budget": 7})
    assert not torch.equal(with_values, without)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_they_are_those_of_a_base_with_changed_projections(make_base, family, kind):
    """LoRA on the base's own projections is what the change stands for."""
    model = fresh(make_base(family), **OWN[kind], warm_start=True)
    randomise_path(model)
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(4, 13).expand(2, -1)
    state = model.paths.main_path(ids, position_ids=positions)
    for layer, part, base in zip(state.layers, model.path.layers, model.paths.decoder.layers, strict=True):
        own, projection = getattr(part, f"own_{kind}"), getattr(base.self_attn, f"{kind[0]}_proj")
        plain = projection.weight.data.clone()
        projection.weight.data += own.up.weight.data @ own.down.weight.data
        changed = model.paths.main_path(ids, position_ids=positions).layers[base.self_attn.layer_idx]
        projection.weight.data.copy_(plain)
        made = read(layer, state.position_ids, part.own_keys, part.own_values)
        torch.testing.assert_close(getattr(made, kind), getattr(changed, kind))
        other = {"keys": "values", "values": "keys"}[kind]
        assert torch.equal(getattr(made, other), getattr(layer, other))
        assert not torch.equal(getattr(made, kind), getattr(layer, kind))


@torch.no_grad()
def test_attention_reads_them(model):
    """Keys and values changed beforehand, in a state that a path without its own reads."""
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    state = model.paths.main_path(ids)
    rows, index = torch.arange(2), torch.tensor([8, 5])
    x, time = torch.randn(2, 16, dtype=torch.float64), torch.tensor([0.3, 0.8])
    classes = torch.tensor([0, 2])
    hidden, _ = model.paths.path_hidden(state, rows, index, x, time, classes)
    kept = [(layer.own_keys, layer.own_values) for layer in model.path.layers]
    plain = model.paths.main_path(ids)
    try:
        for number, (layer, own) in enumerate(zip(model.path.layers, kept, strict=True)):
            plain.layers[number] = read(plain.layers[number], plain.position_ids, *own)
            layer.own_keys = layer.own_values = None
        again, _ = model.paths.path_hidden(plain, rows, index, x, time, classes)
    finally:
        for layer, own in zip(model.path.layers, kept, strict=True):
            layer.own_keys, layer.own_values = own
    torch.testing.assert_close(again, hidden)


@pytest.mark.parametrize("kind", OWN)
def test_with_gradients_they_are_made_anew(make_model, kind):
    """Otherwise a second microbatch over the same state would find a graph that was used up, and the scored part of a
    rollout the results of the part before it, which have no gradient."""
    model = make_model(kind)
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))
    state, x = model.paths.main_path(ids), torch.randn(2, 16, dtype=torch.float64)
    for learning in (True, True, False, True):
        model.zero_grad()
        with torch.set_grad_enabled(learning):
            hidden, _ = model.paths.path_hidden(state, torch.arange(2), torch.tensor([8, 5]), x, torch.full((2,), 0.5))
        if not learning:
            continue
        hidden.sum().backward()
        gradients = [p.grad for name, p in model.trained_parameters() if "own_" in name]
        assert gradients and all(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("drafts", [0, 3])
def test_decoding_with_a_cache_is_scoring_without_one(make_model, monkeypatch, sampler, drafts, kind):
    model = make_model(kind)
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


@pytest.mark.parametrize("what", ["keys", "values"])
def test_bases_without_such_projections_are_refused(make_base, what):
    words = f"own_{what}_rank=4 cannot be followed: Phi3Attention has no projection {what[0]}_proj for {what} alone"
    with pytest.raises(ValueError, match=words):
        fresh(make_base("phi3"), **OWN[what])


NOT_FOLLOWED = {"axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "persimmon", "phi3", "youtu"}
"""Known bases whose attention has no projection for keys alone, or none for values."""


@torch.no_grad()
@pytest.mark.parametrize("name", list(KNOWN))
def test_fresh_ones_are_those_of_every_known_base(name):
    """Through whatever the base's attention does to them: norms, rotary embeddings of all kinds, or neither."""
    base, config = make_known_base(name), L2DConfig(**SMALL_PATH, **OWN["both"])
    if name in NOT_FOLLOWED:
        with pytest.raises(ValueError, match="_rank=4 cannot be followed: "):
            L2DForCausalLM.from_base(base, config)
        return
    model = L2DForCausalLM.from_base(base, config).eval()
    state = model.paths.main_path(torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1)))
    for layer, part in zip(state.layers, model.path.layers, strict=True):
        made = read(layer, state.position_ids, part.own_keys, part.own_values)
        torch.testing.assert_close(made.keys, layer.keys)
        assert made.keys is layer.own_keys is not layer.keys and torch.equal(made.values, layer.values)
