"""Solvers against torchdiffeq and against problems with a known solution; no model is needed."""

import pytest
import torch
from torchdiffeq import odeint

from l2d.sampler_config import SamplerConfig, budget_for_levels
from l2d.sampling.fixed_grid import fixed_grid

SOLVERS = ["euler", "midpoint", "heun2", "heun3", "rk4"]


def follow(sampler: SamplerConfig, noise: torch.Tensor, estimate) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a grid sequentially with `estimate(x, t)`; returns the states at the time levels and the last state."""
    grid = fixed_grid(sampler)
    clean = noise.new_zeros(len(noise), grid.evaluations, noise.shape[1])
    for number in range(grid.evaluations):
        clean[:, number] = estimate(grid.states(noise, clean, number)[:, 0], float(grid.times[number]))
    return grid.trajectory(noise, clean), grid.states(noise, clean, grid.evaluations)[:, 0]


def curved(x: torch.Tensor, time: float) -> torch.Tensor:
    """A clean estimate that moves with state and time."""
    return torch.tanh(x.flip(-1)) + time**2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("levels", "start", "final"), [(2, 0.0, 1.0), (4, 0.0, 1.0), (9, 0.25, 1.0), (5, 0.0, 0.02)])
def test_linear_map_equals_torchdiffeq(solver, levels, start, final):
    noise = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def field(time, x):
        if time >= 1:
            return torch.zeros_like(x)
        return (curved(x, float(time)) - x) / (1 - float(time))

    budget = budget_for_levels(solver, levels)
    sampler = SamplerConfig(solver=solver, budget=budget, start_time=start, final_time=final, end_velocity="zero")
    levels_states, last = follow(sampler, noise, curved)
    expected = odeint(field, noise, torch.linspace(start, final, levels), method=solver)
    torch.testing.assert_close(levels_states, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, expected[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_estimate_is_reached_exactly_along_a_straight_line(solver):
    generator = torch.Generator().manual_seed(0)
    noise, clean = torch.randn(2, 2, 4, dtype=torch.float64, generator=generator)
    noise = noise * 64
    sampler = SamplerConfig(solver=solver, budget=budget_for_levels(solver, 6))
    states, last = follow(sampler, noise, lambda x, time: clean)
    torch.testing.assert_close(last, clean, rtol=0, atol=1e-4)
    for time, state in zip(fixed_grid(sampler).levels.tolist(), states, strict=True):
        torch.testing.assert_close(state, (1 - time) * noise + time * clean, rtol=0, atol=1e-5)  # float32 times


@pytest.mark.parametrize("solver", ["heun2", "rk4"])
def test_zero_end_velocity_leaves_noise_as_the_released_code_does(solver):
    noise, clean = torch.full((1, 1), 64.0, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    budget = budget_for_levels(solver, 4)
    _, last = follow(SamplerConfig(solver=solver, budget=budget, end_velocity="zero"), noise, lambda x, t: clean)
    fraction = {"heun2": 1 / 2, "rk4": 1 / 8}[solver]
    assert float(last) == pytest.approx(64 / 3 * fraction, rel=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    noise = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)

    def last(levels: int) -> torch.Tensor:
        sampler = SamplerConfig(solver=solver, budget=budget_for_levels(solver, levels), final_time=0.5)
        return follow(sampler, noise, curved)[1]

    reference = odeint(
        lambda time, x: (curved(x, time) - x) / (1 - time),
        noise,
        torch.tensor([0.0, 0.5], dtype=torch.float64),
        rtol=1e-12,
        atol=1e-13,
    )[-1]
    coarse, fine = ((last(n) - reference).norm() for n in (5, 9))
    assert float(torch.log2(coarse / fine)) == pytest.approx(order, abs=0.35)


def test_evaluations_reach_the_network_at_the_documented_times():
    grid = fixed_grid(SamplerConfig(solver="midpoint", budget=5))
    torch.testing.assert_close(grid.times, torch.tensor([0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert grid.temperatures == (0.0,) * 4
    grid = fixed_grid(SamplerConfig(solver="heun2", budget=5, choice_temperature="polynomial_1_1.0"))
    assert grid.evaluations == 3  # the ask at t = 1 needs no network
    assert grid.temperatures == (0.5, 0.0, 0.0)
    control = fixed_grid(SamplerConfig(solver="euler", budget=2, final_time=0.02))
    assert control.times.tolist() == pytest.approx([0.0, 0.02])
