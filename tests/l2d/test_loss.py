"""What the path is trained on beyond the published loss: corrupted targets and rollouts, against plain arithmetic."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy

from l2d import L2DConfig, L2DForCausalLM, SamplerConfig, loss
from l2d.network.diffusion_path import NoisedTargets, PathInputs
from l2d.sampling.noise import draw_token
from l2d.sampling.sites import Sites
from l2d.sampling.solve import solve_sites
from training.config import L2DTrainingConfig
from training.draws import answer_runs, corrupt, evaluation_targets, training_targets

IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([[2, 3, 4, 7], [0, 1, -1, -1]])
TARGETS = torch.tensor([[9, 17, 33, 65], [129, 257, 0, 0]])


@pytest.fixture(scope="module")
def make_model(make_base, make_l2d):
    """`make_model(**config)`: a float64 model with a path that matters, in training mode."""

    def make(**config):
        folder = make_l2d(make_base("llama"), "full", ["math"], **config)
        return L2DForCausalLM.from_pretrained(folder).double().train()

    return make


def targets(evaluations: int | None = None, unscored: int | None = None, draws: int = 3, seed: int = 1, **parts):
    """Random targets at INDEX: rising times of a rollout, or one time per draw."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.rand(draws, *INDEX.shape, generator=generator)
    if evaluations is not None:
        time = (torch.arange(evaluations).view(-1, 1, 1, 1) + time) / evaluations
    noise = torch.randn(draws, *INDEX.shape, 16, generator=generator)
    classes = torch.randint(0, 2, (draws, *INDEX.shape), generator=generator)
    return NoisedTargets(INDEX, TARGETS, time, noise, classes, unscored=unscored, **parts)


def losses_by_hand(model, state, x, time, classes) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and argmax (B, Q) at states x (B, Q, d), through the padded interface."""
    logits = model.paths.path_logits(state, PathInputs(INDEX, x, time, classes))
    losses = cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="none").view(INDEX.shape)
    return losses.masked_fill(INDEX < 0, 0), logits.argmax(-1)


def gradients(model, nll) -> dict[str, torch.Tensor]:
    """Of the summed losses, by name."""
    model.zero_grad()
    nll.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("unscored", [None, 1])
def test_spared_targets_are_left_out_where_the_base_is_sure(make_model, monkeypatch, unscored):
    """Losses and gradients are those of the other targets; where none is left, both are 0."""
    model, valid = make_model(), INDEX >= 0
    noised = targets(*((3, unscored) if unscored else ()))
    base = torch.softmax(model.paths.base_logits(model.paths.main_path(IDS), INDEX), -1)
    sure = base.gather(-1, TARGETS[..., None])[..., 0]
    monkeypatch.setattr(loss, "EASY", float(sure[valid].median()) - 1e-12)
    spared = torch.tensor([[True, False, True, True], [True, True, True, True]])
    left_out = spared & (sure >= sure[valid].median() - 1e-12)
    assert 1 < int((left_out & valid).sum()) < int((spared & valid).sum())
    plain = model(input_ids=IDS, noised_targets=noised)
    output = model(input_ids=IDS, noised_targets=dataclasses.replace(noised, spared=spared))
    assert torch.equal(output.valid, valid & ~left_out)
    torch.testing.assert_close(output.nll, plain.nll * ~left_out)
    found, expected = gradients(model, output.nll), gradients(model, plain.nll * ~left_out)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-10)
    monkeypatch.setattr(loss, "EASY", 1e-9)
    output = model(input_ids=IDS, noised_targets=dataclasses.replace(noised, spared=torch.ones_like(spared)))
    assert not output.valid.any() and not output.nll.any()
    found = gradients(model, output.nll)
    assert found.keys() == expected.keys() and not any(gradient.any() for gradient in found.values())


def test_corrupted_targets_are_built_from_other_tokens(make_model):
    model = make_model()
    generator = torch.Generator().manual_seed(2)
    sources = torch.randint(3, 400, (3, *INDEX.shape), generator=generator)
    sources[:, 0, 1] = -1  # a sample of the base's other tokens
    uniforms = torch.rand(sources.shape, generator=generator, dtype=torch.float64)
    noised = targets(sources=sources, uniforms=uniforms)
    output = model(input_ids=IDS, noised_targets=noised)
    state = model.paths.main_path(IDS)
    base = torch.softmax(model.paths.base_logits(state, INDEX), -1).scatter(-1, TARGETS[..., None], 0.0)
    for draw in range(3):
        built_from = torch.where(sources[draw] < 0, draw_token(base, uniforms[draw]), sources[draw])
        time = noised.time[draw]
        x = (1 - time)[..., None] * noised.noise[draw] * 2 + time[..., None] * model.paths.vocabulary_table()[
            built_from
        ]
        expected, _ = losses_by_hand(model, state, x, time, noised.classes[draw])
        torch.testing.assert_close(output.nll[draw], expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    true = model(input_ids=IDS, noised_targets=targets())
    assert float((true.nll - output.nll).detach().abs().max()) > 1e-3  # the tokens do matter


@pytest.mark.parametrize("carried", [False, True])
def test_rollout_follows_the_paths_own_choices(make_model, carried):
    model = make_model(carried_state=carried)
    noised = targets(evaluations=5, unscored=2)
    output = model(input_ids=IDS, noised_targets=noised)
    assert output.nll.shape == output.correct.shape == noised.scored_time.shape == (9, *INDEX.shape)
    state = model.paths.main_path(IDS)
    rows, slots = torch.nonzero(INDEX >= 0, as_tuple=True)
    table = model.paths.vocabulary_table()
    for draw in range(3):
        x, before = noised.noise[draw] * 2, torch.zeros(INDEX.shape)
        chosen, own = model.paths.base_logits(state, INDEX).argmax(-1), torch.zeros(len(rows), 32).double()
        for number in range(5):
            time = noised.time[number, draw]
            x = x + ((time - before) / (1 - before))[..., None] * (table[chosen] - x)
            flat = (x[rows, slots], time[rows, slots], noised.classes[draw][rows, slots])
            fused, left = model.paths.path_hidden(state, rows, INDEX[rows, slots], *flat, own if carried else None)
            own, before = left, time
            logits = model.paths.logits(fused)
            chosen = chosen.clone()
            chosen[rows, slots] = logits.argmax(-1)
            if number >= 2:
                expected = cross_entropy(logits.double(), TARGETS[rows, slots], reduction="none")
                found = output.nll[(number - 2) * 3 + draw]
                torch.testing.assert_close(found[rows, slots].double(), expected, rtol=1e-4, atol=1e-4)
                hits = output.correct[(number - 2) * 3 + draw]
                assert torch.equal(hits[rows, slots], chosen[rows, slots] == TARGETS[rows, slots])
    assert not output.nll[:, 1, 2:].any()


@torch.no_grad()
@pytest.mark.parametrize("carried", [False, True])
def test_rollout_on_a_grid_is_what_the_sampler_does(make_model, carried):
    """At Euler's own times the trained trajectory is the sampled one, evaluation by evaluation."""
    model = make_model(carried_state=carried).eval()
    budget, sampler = 6, SamplerConfig(solver="euler", budget=6, speculation=False)
    noised = targets(evaluations=budget - 1, unscored=0, draws=1)
    grid = torch.linspace(0, 1, budget)[1:]
    noised.time = grid.view(-1, 1, 1, 1).expand(-1, 1, *INDEX.shape)
    noised.classes = None
    output = model(input_ids=IDS, noised_targets=noised)
    state = model.paths.main_path(IDS)
    rows, slots = torch.nonzero(INDEX >= 0, as_tuple=True)
    sites = Sites(rows, INDEX[rows, slots], noised.noise[0][rows, slots].double() * 2)
    solved = solve_sites(model.paths, state, sites, sampler, None, record=True)
    logits = model.paths.logits(solved.evaluated.flatten(0, 1)).unflatten(0, solved.evaluated.shape[:2])
    for number in range(budget - 1):
        expected = cross_entropy(logits[:, number + 1].double(), TARGETS[rows, slots], reduction="none")
        torch.testing.assert_close(output.nll[number][rows, slots].double(), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_rollout(make_model):
    """None to the embedding that states are made of; to the carried state through the window, and only there."""
    model = make_model(carried_state=True)
    model.path.vocabulary.requires_grad_(False)
    weight = model.path.carried_state.projection.weight
    found = {}
    for window in (1, 3):
        model.zero_grad()
        noised = targets(evaluations=4, unscored=4 - window)
        model(input_ids=IDS, noised_targets=noised).nll[-3:].sum().backward()  # the last evaluation's loss alone
        found[window] = weight.grad.clone()
    assert found[1].abs().max() > 0
    assert not torch.allclose(found[1], found[3])  # with a longer window it also goes through the evaluations before
    trained = {name for name, p in model.trained_parameters() if p.requires_grad}
    assert all(p.grad is not None for name, p in model.trained_parameters() if name in trained)


def test_answer_runs():
    first, length = answer_runs(torch.tensor([[2, 3, 4, 7, 8], [5, 7, 9, -1, -1]]))
    assert first.tolist() == [[0, 0, 0, 3, 3], [0, 1, 2, 3, 4]]
    assert length.tolist() == [[3, 3, 3, 2, 2], [1, 1, 1, 1, 1]]


def test_corruption_picks_tokens_of_the_same_answer_and_samples():
    index = torch.tensor([[2, 3, 4, 7, 8], [5, -1, -1, -1, -1]])
    targets = torch.tensor([[10, 11, 12, 20, 21], [30, 0, 0, 0, 0]])

    def sources(rate: float, share: float) -> torch.Tensor:
        time = torch.zeros(4000, *index.shape)
        noised = NoisedTargets(index, targets, time, time)
        corrupt(noised, rate, share, {"generator": torch.Generator().manual_seed(0)})
        assert ((noised.uniforms >= 0) & (noised.uniforms < 1)).all()
        return noised.sources

    others = sources(1.0, 0.0)
    for slot, expected in enumerate(([11, 12], [10, 12], [10, 11], [21], [20])):
        values, counts = others[:, 0, slot].unique(return_counts=True)
        assert values.tolist() == expected
        assert (counts / 4000 - 1 / len(expected)).abs().max() < 0.04
    assert (others[:, 1, 0] == -1).all()  # the only token of its answer
    assert (others[:, 1, 1:] == 0).all()  # padding stays
    assert torch.equal(sources(0.0, 0.5), targets.expand(4000, -1, -1))
    mixed = sources(0.3, 0.5)[:, 0]
    assert float((mixed == -1).float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((mixed == targets[0]).float().mean()) == pytest.approx(0.7, abs=0.01)


def test_corruption_draws_among_different_tokens():
    """Of an answer that repeats tokens every other position counts, but those with the target's own token."""
    index = torch.tensor([[4, 5, 6, 7, 9, 10]])
    targets = torch.tensor([[8, 3, 8, 8, 6, 6]])
    noised = NoisedTargets(index, targets, time := torch.zeros(6000, *index.shape), time)
    corrupt(noised, 1.0, 0.0, {"generator": torch.Generator().manual_seed(0)})
    drawn = noised.sources[:, 0]
    assert (drawn[:, [0, 2, 3]] == 3).all() and (drawn[:, 1] == 8).all()
    assert (drawn[:, 4:] == -1).all()  # no other token in the answer: a sample of the base
    noised.targets = torch.tensor([[8, 3, 5, 8, 6, 7]])
    corrupt(noised, 1.0, 0.0, {"generator": torch.Generator().manual_seed(0)})
    values, counts = noised.sources[:, 0, 1].unique(return_counts=True)
    assert values.tolist() == [5, 8] and counts[1] / 6000 == pytest.approx(2 / 3, abs=0.03)


def test_no_wrong_token_is_the_true_one(make_model):
    """Also where the base is certain of the target, and so the share of wrong tokens is the rate."""
    model, draws = make_model(), 500
    state = model.paths.main_path(IDS)
    with torch.no_grad():
        targets = model.paths.base_logits(state, INDEX).argmax(-1).masked_fill(INDEX < 0, 0)
    time, noise = torch.ones(draws, *INDEX.shape), torch.zeros(draws, *INDEX.shape, 16)
    noised = NoisedTargets(INDEX, targets, time, noise)
    true = model(input_ids=IDS, noised_targets=noised).nll  # at t = 1 a loss says which token x_t was built from
    corrupt(noised, 0.3, 1.0, {"generator": torch.Generator().manual_seed(0)})
    wrong = (model(input_ids=IDS, noised_targets=noised).nll - true).abs() > 1e-6
    assert torch.equal(wrong, noised.sources == -1)
    assert wrong[:, INDEX >= 0].double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / draws / 6) ** 0.5)


def test_rollout_times_are_those_of_the_whole_rollout(tmp_path):
    """Evaluation j of R is in the j-th of R equal parts of time, also where the window ends before the last one."""
    args = L2DTrainingConfig(output_dir=str(tmp_path), rollout_evaluations=8, rollout_window=2, draws=3, bf16=False)
    config, ends = L2DConfig(diffusion_dim=4), set()
    for step in range(30):
        noised = training_targets(config, args, INDEX, TARGETS, None, (0, step, 0), process=0)
        ends.add(len(noised.time))
        assert len(noised.time) == noised.unscored + 2
        parts = torch.arange(len(noised.time)).view(-1, 1, 1, 1).expand_as(noised.time)
        assert torch.equal((noised.time * 8).long(), parts)
    assert min(ends) == 2 and max(ends) == 8
    whole = evaluation_targets(config, args, INDEX, TARGETS, None, [[1, 2], [3]])
    assert whole.unscored == 0 and len(whole.time) == 8
    assert torch.equal((whole.time * 8).long()[:, :, INDEX >= 0][:, 0, 0], torch.arange(8))
