"""Fixed-grid solvers, as what they are for this ODE: a linear map from noise and clean estimates to the trajectory.

- `FixedGrid`: the evaluation times of a solver and the weights that give the state at each of them
- `fixed_grid`: builds it (cached) from a `SamplerConfig`

The velocity `(z - x) / (1 - t)` is linear in the state `x` and in the clean estimate `z`, and so is every Runge-Kutta
step. Hence the state at evaluation `e` is `noise_weights[e] * x_0 + sum_j clean_weights[e, j] * z_j` with `j < e`,
whatever the network answered. Sequential solving, solving many rows that are at different evaluations, and speculation
all read the same two tables. Guidance fits in: `z = g z(class) + (1 - g) z(no class)`.

Times are rounded to float32, as torchdiffeq does for float32 grids; weights are float64.
"""

import dataclasses
import functools

import numpy as np
import torch

from l2d.sampler_config import SamplerConfig, budget_for_levels, levels_for_budget, temperature_at

_THIRD = 1 / 3
# Per solver: stage times c, stage weights a, step weights b (rk4 is the 3/8 rule, as in torchdiffeq).
_TABLEAUS: dict[str, tuple[list[float], list[list[float]], list[float]]] = {
    "euler": ([0.0], [[]], [1.0]),
    "midpoint": ([0.0, 0.5], [[], [0.5]], [0.0, 1.0]),
    "heun2": ([0.0, 1.0], [[], [1.0]], [0.5, 0.5]),
    "heun3": ([0.0, _THIRD, 2 / 3], [[], [_THIRD], [0.0, 2 / 3]], [0.25, 0.0, 0.75]),
    "rk4": (
        [0.0, _THIRD, 2 / 3, 1.0],
        [[], [_THIRD], [-_THIRD, 1.0], [1.0, -1.0, 1.0]],
        [0.125, 0.375, 0.375, 0.125],
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class FixedGrid:
    """The times at which a fixed-grid solver evaluates the path, and the state at each as a linear map.

    Attributes (E: evaluations of the velocity that reach the network; n: time levels):
        times: (E + 1,) float64, evaluation times; the last one is `final_time`, where the output is read.
        noise_weights: (E + 1,) float64, weight of the start noise in the state at each evaluation.
        clean_weights: (E + 1, E) float64, weights of the clean estimates, zero from the diagonal on.
        temperatures: (E,) choice temperature of each evaluation.
        levels: (n,) float32, the time levels.
        level_noise_weights, level_clean_weights: (n,) and (n, E) float64, the state at the time levels.
        budget: evaluations requested, T.
    """

    times: torch.Tensor
    noise_weights: torch.Tensor
    clean_weights: torch.Tensor
    temperatures: tuple[float, ...]
    levels: torch.Tensor
    level_noise_weights: torch.Tensor
    level_clean_weights: torch.Tensor
    budget: int
    _sent: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def evaluations(self) -> int:
        """Number of velocity evaluations E that reach the network."""
        return len(self.temperatures)

    def states(self, noise: torch.Tensor, clean: torch.Tensor, first: int = 0) -> torch.Tensor:
        """States (N, E + 1 - first, d) at evaluations `first` to E for noise (N, d) and clean estimates (N, E, d)."""
        noise_weights, clean_weights = self._weights(clean.device)
        return torch.addcmul(clean_weights[first:] @ clean, noise_weights[first:], noise[:, None])

    def _weights(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of noise (E + 1, 1) and of clean estimates (E + 1, E) on `device`, copied there once."""
        if device not in self._sent:
            self._sent[device] = (self.noise_weights[:, None].to(device), self.clean_weights.to(device))
        return self._sent[device]

    def trajectory(self, noise: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """States at the time levels, (n, N, d), for start noise (N, d) and clean estimates (N, E, d)."""
        weights = self.level_clean_weights.to(clean.device)
        states = self.level_noise_weights.to(noise.device)[:, None] * noise[:, None] + weights @ clean
        return states.transpose(0, 1)


def fixed_grid(sampler: SamplerConfig) -> FixedGrid:
    """The grid of a fixed-grid `sampler` with budget above 1."""
    return _build(
        sampler.solver,
        levels_for_budget(sampler.solver, sampler.budget),
        sampler.start_time,
        sampler.final_time,
        sampler.choice_temperature,
        sampler.end_velocity,
    )


@functools.lru_cache(maxsize=64)
def _build(
    solver: str, levels: int, start: float, final: float, temperature: float | str, end_velocity: str
) -> FixedGrid:
    nodes, stage_weights, step_weights = _TABLEAUS[solver]
    grid = torch.linspace(start, final, levels, dtype=torch.float32)
    spacing = float(grid[1] - grid[0])
    delta = spacing / 2 if solver == "midpoint" else spacing  # where the released code reads the temperature schedule
    most = (levels - 1) * len(nodes)

    # A state or velocity is a row of weights over (noise, clean estimate 0, clean estimate 1, ...).
    state = np.zeros(most + 1)
    state[0] = 1.0
    times: list[float] = []
    temperatures, states, level_states = [], [], [state]
    for low, high in zip(grid[:-1], grid[1:], strict=True):
        step = high - low
        velocities: list[np.ndarray] = []
        for node, weights in zip(nodes, stage_weights, strict=True):
            time = float(high if node == 1.0 else low + step * node)
            stage = state + float(step) * sum(
                (w * v for w, v in zip(weights, velocities, strict=True)), np.zeros(most + 1)
            )
            if time >= 1:  # the velocity is not defined here
                velocities.append(velocities[-1] if end_velocity == "straight" else np.zeros(most + 1))
                continue
            estimate = np.zeros(most + 1)
            estimate[len(times) + 1] = 1.0
            velocities.append((estimate - stage) / (1 - time))
            times.append(time)
            temperatures.append(temperature_at(temperature, time + delta))
            states.append(stage)
        state = state + float(step) * sum(w * v for w, v in zip(step_weights, velocities, strict=True))
        level_states.append(state)
    times.append(float(grid[-1]))
    states.append(state)

    count = len(temperatures)
    points, ends = torch.from_numpy(np.stack(states)), torch.from_numpy(np.stack(level_states))
    return FixedGrid(
        times=torch.tensor(times, dtype=torch.float64),
        noise_weights=points[:, 0].contiguous(),
        clean_weights=points[:, 1 : count + 1].contiguous(),
        temperatures=tuple(temperatures),
        levels=grid,
        level_noise_weights=ends[:, 0].contiguous(),
        level_clean_weights=ends[:, 1 : count + 1].contiguous(),
        budget=budget_for_levels(solver, levels),
    )
