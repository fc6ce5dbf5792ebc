"""What a solve moves towards: guidance, averages, temperatures and the end of a capped solve, against plain arithmetic.

Run: `python -m pytest tests/l2d/test_choices.py` (about 5 seconds)
"""

import pytest
import torch
from torchdiffeq import odeint

from l2d import L2DForCausalLM, SamplerConfig
from l2d.network.diffusion_path import PathInputs
from l2d.sampling.evaluator import PathEvaluator, clean_estimate
from l2d.sampling.fixed_grid import fixed_grid

IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([[2, 3, 4, 7], [0, 1, 5, -1]])
CLASS, NO_CLASS = 1, 2  # "coding" of two classes


@pytest.fixture(scope="module")
def model(make_base, make_l2d) -> L2DForCausalLM:
    model = L2DForCausalLM.from_pretrained(make_l2d(make_base("llama"), "lora", ["math", "coding"])).double()
    with torch.no_grad():
        model.path.class_embedding.weight.mul_(10)  # classes choose other tokens
    return model


@torch.no_grad()
def euler_by_hand(model, x0: torch.Tensor, sampler: SamplerConfig, estimate) -> torch.Tensor:
    """Final logits (B, Q, V) with the class; `estimate(logits, without)` of class and no class is moved towards."""
    state, x = model.paths.main_path(IDS), x0

    def logits(time: float, kind: int) -> torch.Tensor:
        if time == 0:
            return model.paths.base_logits(state, INDEX)
        times = torch.full(INDEX.shape, time)
        return model.paths.path_logits(state, PathInputs(INDEX, x, times, torch.full(INDEX.shape, kind)))

    times = torch.linspace(0, 1, sampler.budget).tolist()
    for time, following in zip(times, times[1:], strict=False):
        clean = estimate(logits(time, CLASS), logits(time, NO_CLASS))
        x = x + (following - time) * (clean - x) / (1 - time)
    return logits(1.0, CLASS)


def noise(seed: int = 3) -> torch.Tensor:
    return torch.randn(*INDEX.shape, 16, generator=torch.Generator().manual_seed(seed)).double() * 2


@torch.no_grad()
def check(model, sampler: SamplerConfig, estimate) -> None:
    x0 = noise()
    expected = euler_by_hand(model, x0, sampler, estimate)
    classes = torch.full((len(INDEX),), CLASS)
    for speculation in (False, True):
        state = model.paths.main_path(IDS)
        found = model.solve(state, INDEX, x0, sampler.replace(speculation=speculation), classes=classes).final_logits
        torch.testing.assert_close(found[INDEX >= 0], expected[INDEX >= 0], rtol=1e-5, atol=1e-5)


def test_guidance_goes_from_no_class_towards_the_class(model):
    sampler = SamplerConfig(solver="euler", budget=4, guidance_scale=1.7, guidance_class="coding")
    table, differing = model.paths.vocabulary_table().double(), []

    def estimate(logits, without):
        differing.append((logits.argmax(-1) != without.argmax(-1))[INDEX >= 0].any())
        return 1.7 * table[logits.argmax(-1)] - 0.7 * table[without.argmax(-1)]

    check(model, sampler, estimate)
    assert any(differing)


@pytest.mark.parametrize("normalize", [False, True])
def test_averaged_estimates_and_their_norm(model, normalize):
    settings = dict(choice="average", choice_temperature=0.5, normalize_average=normalize)
    sampler = SamplerConfig(solver="euler", budget=4, guidance_class="coding", **settings)
    table = model.paths.vocabulary_table().double()

    def estimate(logits, without):
        mean = torch.softmax(logits / 0.5, -1) @ table
        return mean * (16**0.5 / mean.norm(dim=-1, keepdim=True)) if normalize else mean

    check(model, sampler, estimate)


def test_sampled_estimates_have_the_tempered_frequencies():
    logits, table = torch.tensor([0.0, 0.5, -1.0]), torch.eye(3)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    clean, tokens = clean_estimate(logits.expand(4000, 3), table, "sample", 0.5, uniforms=uniforms)
    torch.testing.assert_close(clean.mean(0), torch.softmax(logits / 0.5, -1), rtol=0, atol=1e-3)
    assert torch.equal(clean.argmax(-1), tokens)


@pytest.mark.parametrize(
    ("solver", "budget", "temperatures"),
    [
        ("midpoint", 5, [0.75, 0.5, 0.25, 0.0]),  # evaluations at 0, 1/4, 1/2, 3/4, each read half a step ahead
        ("euler", 5, [0.75, 0.5, 0.25, 0.0]),  # at the same times, a whole step ahead
        ("heun2", 5, [0.5, 0.0, 0.0]),  # at 0, 1/2, 1/2, a whole step of 1/2 ahead
    ],
)
def test_temperatures_are_read_ahead_of_an_evaluation(solver, budget, temperatures):
    grid = fixed_grid(SamplerConfig(solver=solver, budget=budget, choice_temperature="polynomial_1_1.0"))
    assert list(grid.temperatures) == pytest.approx(temperatures)


@pytest.mark.parametrize("final_time", [0.7, 1.0])
def test_a_capped_solve_goes_straight_to_its_estimate(model, final_time):
    """At once, with a cap below the first step: which is one step of Euler's."""
    state, x0 = model.paths.main_path(IDS), noise()
    capped = model.solve(state, INDEX, x0, dict(solver="bosh3", max_evaluations=2, final_time=final_time))
    euler = model.solve(state, INDEX, x0, dict(solver="euler", budget=2, final_time=final_time))
    torch.testing.assert_close(capped.final_logits, euler.final_logits, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["adaptive_heun", "bosh3", "dopri5"])
def test_steps_are_chosen_as_torchdiffeq_chooses_them(model, monkeypatch, solver):
    """The times of all evaluations before the last steps, which ours clips to end at `final_time`."""
    average = dict(choice="average", choice_temperature=1.0, final_time=0.9)
    control = dict(rtol=1e-4, atol=1e-4, first_step=0.01)
    index, x0, table = torch.tensor([[5]]), noise()[:1, :1], model.paths.vocabulary_table()
    state, times = model.paths.main_path(IDS[:1]), {"ours": [], "theirs": []}

    def field(time, x):
        times["theirs"].append(float(time))
        logits = model.paths.path_logits(state, PathInputs(index, x, torch.full((1, 1), float(time))))
        return (clean_estimate(logits, table, "average", 1.0)[0] - x) / (1 - float(time))

    at_times = PathEvaluator.at_times

    def recorded(self, sites, x, time, branches):
        times["ours"] += time.tolist()
        return at_times(self, sites, x, time, branches)

    monkeypatch.setattr(PathEvaluator, "at_times", recorded)
    model.solve(state, index, x0, SamplerConfig(solver=solver, **average, **control))
    options = {"first_step": control.pop("first_step")}
    odeint(field, x0, torch.tensor([0.0, 0.9], dtype=torch.float64), method=solver, options=options, **control)
    ours, theirs = ([time for time in found if 0 < time < 0.3] for found in times.values())
    assert len(ours) > 10 and ours == pytest.approx(theirs, rel=1e-3)
