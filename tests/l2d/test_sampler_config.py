"""Budget arithmetic and sampler settings: what is allowed, and one clear sentence for what is not."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2d.sampler_config import (
    FIXED_SOLVERS,
    SamplerConfig,
    budget_for_levels,
    levels_for_budget,
    nearest_budgets,
    temperature_at,
)

WRONG = [
    (dict(budget=0), "diffusion_budget"),
    (dict(budget=-1.0), "diffusion_budget"),
    (dict(budget=15.5), "diffusion_budget"),
    (dict(budget=True), "diffusion_budget"),
    (dict(budget="many"), "diffusion_budget"),
    (dict(budget=float("nan")), "diffusion_budget"),
    (dict(budget=float("inf")), "diffusion_budget"),
    (dict(budget=14), "use 13 or 15"),
    (dict(budget=15, solver="heun3"), "use 13 or 16"),
    (dict(solver="Euler"), "solver"),
    (dict(final_time=1.5), "final_time"),
    (dict(final_time=0.0), "final_time"),
    (dict(start_time=0.9, final_time=0.5), "start_time"),
    (dict(rtol=0), "rtol"),
    (dict(atol=-1e-3), "atol"),
    (dict(first_step=0.0), "first_step"),
    (dict(max_evaluations=0), "max_evaluations"),
    (dict(guidance_scale=float("nan")), "guidance_scale"),
    (dict(guidance_scale="strong"), "guidance_scale"),
    (dict(guidance_class=1.5), "guidance_class"),
    (dict(choice="mode"), "choice"),
    (dict(choice_temperature=-0.1), "choice_temperature"),
    (dict(choice_temperature="polynomial_1"), "choice_temperature"),
    (dict(choice_temperature="polynomial_1_0"), "choice_temperature"),
    (dict(end_velocity="half"), "end_velocity"),
    (dict(mc_samples=0), "mc_samples"),
    (dict(skip_confidence=0), "skip_confidence=0 must be a number above 0 and at most 1"),
    (dict(skip_confidence=1.01), "skip_confidence"),
    (dict(skip_confidence="high"), "skip_confidence"),
    (dict(early_confidence=0), "early_confidence=0 must be a number above 0 and at most 1"),
    (dict(early_time=0), "early_time=0 must be a number above 0 and at most 1"),
    (dict(seed=-1), "seed"),
    (dict(speculation="perhaps"), "speculation"),
]


@pytest.mark.parametrize(("settings", "named"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_wrong_settings_are_named_in_one_sentence(settings, named):
    with pytest.raises(ValueError, match=named) as error:
        SamplerConfig(**settings)
    assert "\n" not in str(error.value)


def test_unknown_settings_suggest_the_nearest_name():
    with pytest.raises(ValueError, match="guidance_scale"):
        SamplerConfig().replace(guidance_scales=2)


def test_numbers_may_arrive_as_text_or_float():
    sampler = SamplerConfig(budget="15", guidance_scale="1.5", final_time="1", seed=3.0, speculation="False")
    assert (sampler.budget, sampler.guidance_scale, sampler.seed, sampler.speculation) == (15, 1.5, 3, False)


@given(st.sampled_from(sorted(FIXED_SOLVERS)), st.integers(1, 400))
def test_levels_and_budget_are_inverse(solver, levels):
    assert levels_for_budget(solver, budget_for_levels(solver, levels)) == levels


@given(st.sampled_from(sorted(FIXED_SOLVERS)), st.integers(-3, 400))
def test_nearest_budgets_can_be_met_and_are_nearest(solver, budget):
    near = nearest_budgets(solver, budget)
    assert [budget_for_levels(solver, levels_for_budget(solver, b)) for b in near] == near
    met = [budget_for_levels(solver, n) for n in range(1, 500)]
    assert abs(near[0] - budget) <= max(abs(b - budget) for b in near)
    assert min(abs(b - budget) for b in near) == min(abs(b - budget) for b in met)


def test_documented_budgets():
    assert [budget_for_levels(s, 4) for s in ("euler", "midpoint", "heun2", "heun3", "rk4")] == [4, 7, 7, 10, 13]
    assert levels_for_budget("midpoint", 15) == 8


def test_temperature_schedules():
    assert temperature_at(0.4, 0.9) == 0.4
    assert temperature_at("polynomial_2_0.5", 0.25) == 0.25
    assert temperature_at("polynomial_1_0.5", 0.5) == 0.0


def test_classes():
    sampler = SamplerConfig(guidance_scale=1.5, guidance_class="math")
    assert sampler.class_index(["coding", "math"]) == 1
    assert SamplerConfig(guidance_class=0).class_index(["coding"]) == 0
    assert SamplerConfig().class_index(["coding"]) is None
    for wrong, classes in (
        (sampler, None),
        (sampler, ["coding"]),
        (SamplerConfig(guidance_scale=1.5), ["coding"]),
        (SamplerConfig(guidance_class=3), ["coding"]),
    ):
        with pytest.raises(ValueError, match="guidance"):
            wrong.class_index(classes)


def test_settings_need_no_torch():
    code = "import sys, l2d, l2d.sampler_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
