"""A path that hands its hidden state from one evaluation to the next, and one that sees no noise at all."""

import pytest
import torch

from l2d import L2DConfig, L2DForCausalLM, SamplerConfig
from l2d.decoding import DraftLength
from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.fixed_grid import fixed_grid
from l2d.sampling.sites import Sites
from l2d.sampling.solve import solve_sites
from tests.conftest import randomise_path
from tests.l2d.test_sampling import GUIDED, decode, prompts

CLASSES = ["math", "coding"]


@pytest.fixture(scope="module")
def carrying(make_base, make_l2d):
    """A float64 model with a random carried state."""
    folder = make_l2d(make_base("llama"), "lora", CLASSES, carried_state=True)
    return L2DForCausalLM.from_pretrained(folder).double()


@pytest.fixture(scope="module")
def noise_free(make_base, make_l2d):
    return L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "full", noise_free=True)).double()


def random_sites(model, rows: int = 3) -> tuple:
    """The main path of some prompts, and a site at the last position of each with its own noise."""
    ids, mask = prompts(rows)
    state = model.paths.main_path(ids, mask).last()
    noise = torch.randn(rows, model.config.diffusion_dim, generator=torch.Generator().manual_seed(5))
    return state, Sites(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), noise.double() * 2)


@pytest.mark.parametrize("settings", [{}, GUIDED, dict(solver="rk4", budget=9)])
def test_fresh_carried_state_changes_no_bit(make_base, tmp_path, settings):
    shape = dict(diffusion_dim=16, input_width=16, conditioning_width=16, frequency_width=16, noise_std=2.0)
    found = []
    for carried in (False, True):
        torch.manual_seed(0)
        model = L2DForCausalLM.from_base(
            str(make_base("llama")), L2DConfig(guidance_classes=CLASSES, carried_state=carried, **shape)
        )
        fresh = torch.zeros_like(model.path.carried_state.projection.weight) if carried else None
        randomise_path(model)  # draws in the order of the names, in which the carried state comes last
        if carried:
            model.path.carried_state.projection.weight.data.copy_(fresh)
        ids, mask = prompts()
        options = dict(max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
        # The same batches of evaluations in both: without speculation rounding has no say.
        sampler = {**settings, "speculation": False}
        made = model.generate(ids, attention_mask=mask, sampler=sampler, **options)
        scores = model.score(ids, sampler=sampler).logprobs
        found.append([made.sequences, *made.logits, scores])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_weights_of_a_fresh_model_do_not_depend_on_the_flag(base_dir):
    weights = []
    for carried in (False, True):
        torch.manual_seed(0)
        model = L2DForCausalLM.from_base(str(base_dir), L2DConfig(carried_state=carried))
        weights.append(dict(model.trained_parameters()))
    (extra,) = weights[1].keys() - weights[0].keys()
    assert extra == "path.carried_state.projection.weight" and not weights[1][extra].any()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@torch.no_grad()
def test_carried_state_enters_after_the_input_projection(carrying):
    """`W RMSNorm(s)` is added to the projected state, and nothing for s = 0."""
    state, sites = random_sites(carrying)
    carried = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).double() * 5
    query = (state, sites.rows, sites.index, sites.noise, torch.full((3,), 0.4), torch.tensor([0, 1, 2]))
    expected, own = carrying.paths.path_hidden(*query, carried)
    project, weight = carrying.path.input_projection.forward, carrying.path.carried_state.projection.weight
    norm = carried / (carried.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    carrying.path.input_projection.forward = lambda x, time: project(x, time) + norm @ weight.T
    try:
        found, own_found = carrying.paths.path_hidden(*query)
    finally:
        del carrying.path.input_projection.forward
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own_found, own, rtol=1e-9, atol=1e-9)
    plain, _ = carrying.paths.path_hidden(*query)
    assert torch.equal(carrying.paths.path_hidden(*query, torch.zeros_like(carried))[0], plain)
    assert not torch.allclose(plain, expected)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_solver_carries_each_sites_own_state(carrying, guided):
    """Evaluation by evaluation, by hand: what the evaluation before left, of each branch by itself."""
    model, sampler = carrying, SamplerConfig(budget=7, **(GUIDED if guided else {}))
    state, sites = random_sites(model)
    site_class = sampler.class_index(CLASSES)
    solved = solve_sites(model.paths, state, sites, sampler, site_class, record=True)
    evaluator, grid = PathEvaluator(model.paths, state, sampler, site_class), fixed_grid(sampler)
    states = grid.states(sites.noise, solved.clean)
    for site in range(len(sites)):
        carried = {kind: torch.zeros(1, model.config.hidden_size).double() for kind in evaluator.branches}
        for number in range(1, len(grid.times)):
            chosen = []
            for kind in evaluator.branches if number < grid.evaluations else evaluator.branches[:1]:
                classes = torch.tensor([len(CLASSES) if kind is None else kind])
                where = (torch.tensor([site]), torch.tensor([0]))
                time = grid.times[number].view(1)
                fused, carried[kind] = model.paths.path_hidden(
                    state, *where, states[site, number][None], time, classes, carried[kind]
                )
                chosen.append(int(model.paths.logits(fused).argmax()))
                if kind == evaluator.branches[0]:
                    torch.testing.assert_close(solved.evaluated[site, number], fused[0], rtol=1e-5, atol=1e-5)
            if number < grid.evaluations:
                assert solved.chosen[site, number].tolist() == chosen
    assert (solved.nfe_computed == (len(grid.times) - 2) * len(evaluator.branches) + 1).all()


def test_carried_state_matters_and_switches_speculation_off(carrying, caplog):
    with_state = decode(carrying, {})
    kept = carrying.path.carried_state
    carrying.path.carried_state = None
    try:
        assert not torch.equal(decode(carrying, {"speculation": False}), with_state)
    finally:
        carrying.path.carried_state = kept
    assert carrying.sampler({}).speculation is False
    _, record = decode(carrying, {}, return_record=True)
    assert all(passes == 14 for row in record.passes for passes in row)


def test_carried_state_does_not_depend_on_batch_mates_or_drafts(carrying, monkeypatch):
    ids, mask = prompts(4)
    together = carrying.generate(ids, attention_mask=mask, max_new_tokens=8, sampler={"draft_tokens": 0})
    for row in range(4):
        alone = carrying.generate(ids[row][mask[row] > 0][None], max_new_tokens=8, sampler={"draft_tokens": 0})
        assert torch.equal(alone[0, -8:], together[row, -8:])
    monkeypatch.setattr(DraftLength, "choose", lambda self, rows: self.most)
    assert torch.equal(
        carrying.generate(ids, attention_mask=mask, max_new_tokens=8, sampler={"draft_tokens": 3}), together
    )


def test_base_is_untouched_at_budget_one(carrying, noise_free):
    ids, mask = prompts()
    for model in (carrying, noise_free):
        base = model.base.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        ours = model.generate(ids, attention_mask=mask, max_new_tokens=6, sampler={"budget": 1}, pad_token_id=0)
        assert torch.equal(ours, base)


def test_scoring_carries_what_decoding_carries(carrying):
    ids, mask = prompts(1)
    made, record = carrying.generate(
        ids, max_new_tokens=6, sampler={"budget": 7}, request_keys=["a"], return_record=True
    )
    wanted = torch.zeros_like(made, dtype=torch.bool)
    wanted[:, -6:] = True
    scored = carrying.score(made, continuation_mask=wanted, sampler={"budget": 7}, request_keys=["a"])
    assert scored.greedy[wanted].all()
    assert scored.passes[wanted].tolist() == [6] * 6


@torch.no_grad()
def test_noise_free_path_sees_no_noise(noise_free):
    assert (noise_free.sampler().solver, noise_free.sampler().budget) == ("euler", 2)
    seeds = [decode(noise_free, {"seed": seed}, return_record=True) for seed in (0, 1)]
    assert torch.equal(seeds[0][0], seeds[1][0])
    assert not torch.equal(seeds[0][0], decode(noise_free, {"budget": 1}))
    assert all(nfe_computed >= 1 for row in seeds[0][1].nfe_computed for nfe_computed in row)
    state, sites = random_sites(noise_free)
    solved = solve_sites(noise_free.paths, state, sites, noise_free.sampler(), None)
    assert solved.nfe_computed.tolist() == [1, 1, 1]


REFUSED = [
    (dict(noise_free=True), dict(budget=15, solver="midpoint"), "cannot be spent by a noise-free path"),
    (dict(noise_free=True), dict(final_time=0.5), "cannot be spent by a noise-free path"),
    (dict(noise_free=True), dict(mc_samples=3), "cannot be spent by a noise-free path"),
    (dict(carried_state=True), dict(solver="dopri5"), "carries a state from one evaluation to the next"),
]


@pytest.mark.parametrize(("flags", "settings", "message"), REFUSED)
def test_settings_that_a_path_cannot_follow(flags, settings, message):
    config = L2DConfig(**flags)
    with pytest.raises(ValueError, match=message):
        config.check_sampler(config.default_sampler(settings))


@pytest.mark.parametrize(
    "flags", [dict(noise_free=True, carried_state=True), dict(noise_free=1), dict(carried_state="x")]
)
def test_flags_that_make_no_sense(flags):
    with pytest.raises(ValueError, match="noise_free|carried_state"):
        L2DConfig(**flags)


def test_flags_are_in_the_checkpoint(carrying, noise_free, tmp_path):
    for model, flag in ((carrying, "carried_state"), (noise_free, "noise_free")):
        model.save_pretrained(tmp_path / flag)
        again = L2DForCausalLM.from_pretrained(tmp_path / flag, base=model.base)
        assert getattr(again.config, flag) is True
        assert torch.equal(
            decode(again, {"budget": 2, "solver": "euler"}), decode(model, {"budget": 2, "solver": "euler"})
        )
