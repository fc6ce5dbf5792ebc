"""A path that starts as the base itself: it changes nothing at first, and is exact like the published start.

Run: `python -m pytest tests/l2d/test_warm_start.py`; every tested type of base is in `test_architectures.py`.
"""

import json
import shutil

import pytest
import torch

import tests.l2d.test_invariance as invariance
import tests.l2d.test_sampling as sampling
from l2d import L2DConfig, L2DForCausalLM
from l2d.decoding import DraftLength
from l2d.network.diffusion_path import NoisedTargets, PathInputs
from tests.conftest import randomise_path
from tests.l2d.test_sampling import GUIDED, decode, prompts

CLASSES = ["math", "coding"]
SHAPE = dict(diffusion_dim=16, input_width=16, conditioning_width=16, frequency_width=16, noise_std=2.0, lora_rank=4)


def fresh(base, **settings) -> L2DForCausalLM:
    torch.manual_seed(0)
    return L2DForCausalLM.from_base(str(base), L2DConfig(**{**SHAPE, "warm_start": True, **settings})).eval()


@pytest.fixture(scope="module")
def folder(make_base, make_l2d):
    return make_l2d(make_base("llama"), "lora", CLASSES, warm_start=True)


@pytest.fixture(scope="module")
def model(folder):
    """A float64 model with a random path: equal tokens then mean an equal method."""
    return L2DForCausalLM.from_pretrained(folder).double()


# ---- a fresh path ----------------------------------------------------------------------------------------------------

FRESH = {
    "lora": dict(),
    "full": dict(variant="full"),
    "guided": dict(guidance_classes=CLASSES, sampler=GUIDED),
    "carried": dict(carried_state=True),
}


@pytest.mark.parametrize("option", FRESH)
@pytest.mark.parametrize("budget", [1, 3, 15, 31])
def test_a_fresh_path_gives_the_bases_tokens_at_every_budget(base_dir, option, budget):
    one = fresh(base_dir, **FRESH[option])
    ids, mask = prompts()
    settings = dict(attention_mask=mask, max_new_tokens=8)
    expected = one.base.generate(ids, do_sample=False, **settings)
    for more in ({}, {"speculation": False, "draft_tokens": 0}):
        assert torch.equal(one.generate(ids, sampler={"budget": budget, **more}, **settings), expected)


def test_a_fresh_noise_free_path_gives_the_bases_tokens(base_dir):
    one = fresh(base_dir, noise_free=True)
    ids, mask = prompts()
    settings = dict(attention_mask=mask, max_new_tokens=8)
    assert torch.equal(one.generate(ids, **settings), one.base.generate(ids, do_sample=False, **settings))


@torch.no_grad()
def test_a_fresh_path_scores_as_the_base(base_dir):
    one = fresh(base_dir).double()
    ids, _ = prompts(2)
    for budget in (1, 7):
        expected = torch.log_softmax(one.base(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0].float()
        scores = one.score(ids, sampler={"budget": budget}).logprobs[:, 1:]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_only_the_last_layer_of_the_projection_starts_differently(base_dir):
    warm, cold = (dict(fresh(base_dir, warm_start=on).trained_parameters()) for on in (True, False))
    assert warm.keys() == cold.keys()
    different = [name for name in warm if not torch.equal(warm[name], cold[name])]
    assert different == ["path.input_projection.layers.2.weight"] and not warm[different[0]].any()


def test_weight_decay_pulls_towards_the_base(base_dir):
    """Trained weights that shrink give the base in the end, open gates included."""
    one = fresh(base_dir)
    randomise_path(one)
    ids, _ = prompts(1)
    settings = dict(max_new_tokens=6)
    expected = one.base.generate(ids, do_sample=False, **settings)
    assert not torch.equal(one.generate(ids, sampler={"budget": 7}, **settings), expected)
    optimizer = torch.optim.AdamW([p for _, p in one.trained_parameters()], lr=1.0, weight_decay=0.9)
    for _, parameter in one.trained_parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(8):
        optimizer.step()
    assert torch.equal(one.generate(ids, sampler={"budget": 7}, **settings), expected)


def test_gradients_reach_what_the_published_start_leaves_without(base_dir):
    """At the first step: the deltas and modulation heads of every layer, which wait for open gates otherwise."""
    index, targets = torch.tensor([[3, 4, 5]]), torch.tensor([[7, 8, 9]])
    time, noise = torch.tensor([[[0.2, 0.5, 0.9]]]), torch.randn(1, 1, 3, 16)
    reached = []
    for on in (True, False):
        one = fresh(base_dir, warm_start=on)
        one(torch.arange(3, 12)[None], noised_targets=NoisedTargets(index, targets, time, noise)).nll.sum().backward()
        reached.append({name for name, p in one.trained_parameters() if p.grad is not None and bool(p.grad.any())})
    layers = len(one.path.layers)
    for kind in ("twin.self_attn.o_proj.lora_B", "twin.mlp.down_proj.lora_B", "modulation.2.bias"):
        assert [sum(kind in name for name in names) for names in reached] == [layers, 0]
    assert "path.input_projection.layers.2.weight" in reached[0] - reached[1]


# ---- a trained path --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_at_time_zero_are_the_bases_bit_for_bit(folder):
    one = L2DForCausalLM.from_pretrained(folder)
    ids, _ = prompts(2)
    state, index = one.paths.main_path(ids), torch.arange(ids.shape[1]).expand_as(ids)
    x = torch.randn(*ids.shape, 16) * 50
    for dtype in (torch.float32, torch.bfloat16):
        one = L2DForCausalLM.from_pretrained(folder, dtype=dtype)
        state = one.paths.main_path(ids)
        at_zero = one.paths.path_logits(state, PathInputs(index, x, torch.zeros(ids.shape)))
        assert torch.equal(at_zero, one.base(ids).logits)
        later = one.paths.path_logits(state, PathInputs(index, x, torch.full(ids.shape, 0.5)))
        assert float((later - at_zero).abs().max()) > 0.1
    settings = dict(max_new_tokens=6)
    assert torch.equal(one.generate(ids, sampler={"budget": 1}, **settings), one.base.generate(ids, **settings))


@torch.no_grad()
def test_the_path_is_what_its_equations_say(model, make_base, make_l2d):
    """A published path with the base's input stream and open gates put in by hand, and `h_main + a (h - h_main)`."""
    plain = L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "lora", CLASSES)).double()
    for (_, parameter), (_, other) in zip(model.trained_parameters(), plain.trained_parameters(), strict=True):
        other.copy_(parameter)
    for layer in plain.path.layers:
        layer.modulation[2].bias.view(6, -1)[[2, 5]] += 1
    ids, _ = prompts(3)
    rows, index, time = torch.arange(3), torch.tensor([4, 9, 6]), torch.tensor([0.1, 0.6, 1.0])
    x, classes = torch.randn(3, 16).double(), torch.tensor([0, 1, 2])
    embedded = plain.base.get_input_embeddings()(ids)[rows, index]
    project = plain.path.input_projection.forward
    plain.path.input_projection.forward = lambda *given: project(*given) + embedded
    state = plain.paths.main_path(ids)
    _, expected = plain.paths.path_hidden(state, rows, index, x, time, classes)
    head, embed = plain.path.output_modulation, plain.path.conditioning
    factor = time[:, None] + head(embed(time, classes)) - head(embed(torch.zeros(3), classes))
    main = state.hidden[rows, index]
    fused, own = model.paths.path_hidden(model.paths.main_path(ids), rows, index, x, time, classes)
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused, main + factor * (expected - main), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, GUIDED, dict(solver="rk4", budget=9), dict(choice_temperature=1.0)])
def test_speculation_and_drafts_change_nothing(model, monkeypatch, settings):
    slow = decode(model, {**settings, "speculation": False, "draft_tokens": 0})
    fast, record = decode(model, settings, return_record=True)
    assert torch.equal(fast, slow) and sum(map(sum, record.changes)) >= 8
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)
    assert torch.equal(decode(model, settings), slow)


def test_decoding_and_scoring_see_the_same_probabilities(model):
    sampling.test_scores_are_the_log_probabilities_that_decoding_sees(model)


def test_batches_padding_and_packing_change_nothing(model):
    assert invariance.needle_violations(model, {"budget": 7}) == 0
    assert invariance.packing_violations(model) == 0
    assert invariance.training_violations(model) == 0


def test_a_carried_state_goes_from_evaluation_to_evaluation(make_base, make_l2d):
    path = make_l2d(make_base("llama"), "lora", CLASSES, warm_start=True, carried_state=True)
    one = L2DForCausalLM.from_pretrained(path).double()
    assert invariance.needle_violations(one, {"budget": 7}) == 0
    carried = decode(one, {"budget": 7})
    one.path.carried_state.projection.weight.data.zero_()
    assert not torch.equal(decode(one, {"budget": 7}), carried)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("digest", [True, False])
def test_another_start_than_that_of_the_weights_is_refused(make_base, make_l2d, tmp_path, trained, digest):
    """In `config.json`, whose tensors tell by their digest, and as an override, whatever the digest."""
    path = make_l2d(make_base("llama"), "lora", CLASSES, warm_start=trained)
    override = L2DConfig.from_pretrained(path, warm_start=not trained)
    if not digest:
        override.tensors_digest = None
    with pytest.raises(ValueError, match=f"trained with warm_start={trained}"):
        L2DForCausalLM.from_pretrained(path, config=override)
    shutil.copytree(path, tmp_path / "edited")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "edited" / "config.json").write_text(json.dumps({**config, "warm_start": not trained}))
    if digest:
        with pytest.raises(ValueError, match=f"trained with warm_start={trained}: set it back"):
            L2DForCausalLM.from_pretrained(tmp_path / "edited")


def test_checkpoints_that_do_not_say_have_the_published_start(make_base, make_l2d, tmp_path):
    path = make_l2d(make_base("llama"), "lora", CLASSES)
    shutil.copytree(path, tmp_path / "older")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "older" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "warm_start"}))
    older = L2DForCausalLM.from_pretrained(tmp_path / "older")
    assert older.config.warm_start is False
    assert torch.equal(decode(older, {}), decode(L2DForCausalLM.from_pretrained(path), {}))


def test_states_without_the_input_stream_are_refused(model):
    ids, _ = prompts(1)
    state = model.paths.main_path(ids)
    state.inputs = None
    with pytest.raises(ValueError, match=r"take the state from TwoPaths\.main_path"):
        model.solve(state, torch.tensor([[3]]), torch.zeros(1, 1, 16))
