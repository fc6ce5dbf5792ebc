"""The solver of the released implementation (SakanaAI/L2D) with all its habits, for comparison with it.

- `ReleasedSolver`: its settings
- `released_solve`: integrates as it does: torchdiffeq, one step size per batch, zero velocity at t >= 1

Legend: B rows, Q sites per row, d diffusion dimension, n time levels.
"""

import dataclasses
from typing import Any

import torch
from torchdiffeq import odeint

from l2d.modeling import L2DForCausalLM
from l2d.network.diffusion_path import PathInputs
from l2d.network.main_path import MainPathState
from l2d.sampler_config import FIXED_SOLVERS, temperature_at
from l2d.sampling.evaluator import clean_estimate
from l2d.sampling.noise import draw_token
from l2d.sampling.solve import Solution


@dataclasses.dataclass(frozen=True)
class ReleasedSolver:
    """Settings of one solve.

    Attributes:
        method, steps: torchdiffeq's name of the solver ("heun" is "heun2"), and the number of time levels n.
        family: "llama" or "qwen2", which differ in where the velocity is zeroed and the temperature is read.
        choice, temperature, normalize: as `choice`, `choice_temperature` and `normalize_average` of `SamplerConfig`.
        guidance_scale: `None` where guidance is not applied (every network call is then conditional on the class).
        start_time, final_time: ends of the time levels.
        rtol, atol, options: for adaptive methods, as torchdiffeq takes them.
        max_evaluations: a solve that asks more often is given up.
    """

    method: str
    steps: int
    family: str = "llama"
    choice: str = "sample"
    temperature: float | str = 0.0
    normalize: bool = False
    guidance_scale: float | None = None
    start_time: float = 0.0
    final_time: float = 1.0
    rtol: float = 1e-5
    atol: float = 1e-5
    options: dict[str, Any] | None = None
    max_evaluations: int = 20000

    @property
    def torch_method(self) -> str:
        """The solver's name in torchdiffeq."""
        return "heun2" if self.method == "heun" else self.method

    @property
    def levels(self) -> torch.Tensor:
        """The time levels (n,) float32."""
        return torch.linspace(self.start_time, self.final_time, self.steps, dtype=torch.float32)

    @property
    def delta(self) -> float:
        """How far ahead of an evaluation the temperature is read."""
        spacing = float(self.levels[1] - self.levels[0])
        if self.torch_method in FIXED_SOLVERS:
            return spacing / 2 if self.torch_method == "midpoint" else spacing
        return spacing if self.family == "qwen2" and self.torch_method == "adaptive_heun" else 0.0

    @property
    def zeroes_the_end(self) -> bool:
        """Whether the velocity is 0 wherever the solver asks at t >= 1."""
        adaptive = self.torch_method not in FIXED_SOLVERS
        return "heun" in self.torch_method or self.torch_method == "rk4" or (adaptive and self.family == "llama")


class _Field:
    """Velocity as the released code computes it, with a record of everything it was asked."""

    def __init__(
        self,
        model: L2DForCausalLM,
        state: MainPathState,
        index: torch.Tensor,
        solver: ReleasedSolver,
        classes: torch.Tensor | None,
        generator: torch.Generator | None,
    ):
        self.model, self.state, self.index, self.solver = model, state, index, solver
        self.classes, self.generator = classes, generator
        self.delta, self.zeroes_the_end = solver.delta, solver.zeroes_the_end
        self.asked: list[float] = []
        self.temperatures: list[float] = []
        self.chosen: list[torch.Tensor] = []

    def logits(self, x: torch.Tensor, time: float, classes: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, Q, V) at states x (B, Q, d)."""
        times = torch.full(self.index.shape, time, dtype=torch.float32, device=x.device)
        return self.model.paths.path_logits(self.state, PathInputs(self.index, x.float(), times, classes))

    def _branch(self, x: torch.Tensor, time: float, classes: torch.Tensor | None) -> torch.Tensor:
        logits, choice = self.logits(x, time, classes), self.solver.choice
        temperature = temperature_at(self.solver.temperature, time + self.delta)
        uniforms = None
        if choice == "sample" and temperature > 0:
            uniforms = torch.rand(self.index.shape, dtype=torch.float64, generator=self.generator).to(x.device)
        table = self.model.paths.vocabulary_table()
        clean, _ = clean_estimate(logits, table, choice, temperature, self.solver.normalize, uniforms)
        token = logits.argmax(-1) if uniforms is None else draw_token(torch.softmax(logits / temperature, -1), uniforms)
        self.temperatures.append(temperature)
        self.chosen.append(token)
        return (clean.double() - x) / (1 - time)

    def __call__(self, time: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        now = float(time)
        self.asked.append(now)
        if len(self.asked) > self.solver.max_evaluations:
            raise ValueError(f"the solver asked more than max_evaluations={self.solver.max_evaluations} times.")
        if self.zeroes_the_end and now >= 1:
            return torch.zeros_like(x)
        conditional, scale = self._branch(x, now, self.classes), self.solver.guidance_scale
        if scale is None:
            return conditional
        return scale * conditional + (1 - scale) * self._branch(x, now, None)


@torch.no_grad()
def released_solve(
    model: L2DForCausalLM,
    state: MainPathState,
    index: torch.Tensor,
    x0: torch.Tensor,
    solver: ReleasedSolver,
    classes: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """Integrate as the released implementation does, quirks included.

    Args:
        index: (B, Q); x0: (B, Q, d), scaled; classes: (B,) guidance class per row, `None` for "no class".
        generator: draws the tokens of sampled choices.

    Returns `Solution`: trajectory at the n levels (interpolated for adaptive methods), `evaluation_times` of every ask,
    zeroed ones included, and `chosen` (Q', B, Q) and `temperatures` (Q',) of every network call, branches in turn.
    """
    spread = None if classes is None else classes[:, None].expand_as(index)
    field = _Field(model, state, index, solver, spread, generator)
    levels = solver.levels
    extra = {} if solver.options is None else {"options": dict(solver.options)}
    trajectory = odeint(
        field,
        x0.double(),
        levels.to(x0.device),
        rtol=solver.rtol,
        atol=solver.atol,
        method=solver.torch_method,
        **extra,
    )
    return Solution(
        final_logits=field.logits(trajectory[-1], float(levels[-1]), spread),
        trajectory=trajectory,
        times=levels,
        evaluation_times=torch.tensor(field.asked, dtype=torch.float64),
        temperatures=torch.tensor(field.temperatures, dtype=torch.float64),
        chosen=torch.stack(field.chosen),
    )
