"""Adaptive solvers, one step size per site: a result never depends on batch-mates.

- `solve_adaptive`: embedded Runge-Kutta steps of torchdiffeq's tableaus, all sites in one batch, each at its own time

Step control is torchdiffeq's (error norm, safety 0.9, growth at most 10, shrinkage at most 5). Steps are clipped to end
at `final_time`; a stage at t = 1 takes the previous stage's velocity, exact on a straight line.
Greedy choices make the field discontinuous, and a solver can creep along a boundary: after `max_evaluations` a site
goes straight to its current clean estimate and is counted as capped. Sites that are done leave the batch.
"""

import torch
from torchdiffeq._impl.odeint import SOLVERS

from l2d.sampler_config import temperature_at
from l2d.sampling.evaluator import PathEvaluator
from l2d.sampling.sites import Sites, SiteSolution

_SAFETY, _GROWTH, _SHRINKAGE = 0.9, 10.0, 0.2


class _Field:
    """Velocity of sites at their own times; counts evaluations and changes of the chosen token."""

    def __init__(self, evaluator: PathEvaluator, sites: Sites):
        self.evaluator, self.sites = evaluator, sites
        zeros = torch.zeros(len(sites), dtype=torch.int64, device=sites.noise.device)
        self.nfe_requested, self.nfe_computed, self.changes = zeros.clone(), zeros.clone(), zeros.clone()
        self.token = torch.full_like(zeros, -1)

    def __call__(self, keep: torch.Tensor, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Velocity (M, d) at states x (M, d) and times (M,) below 1 of the sites `keep` (M,)."""
        sites, evaluator = self.sites.take(keep), self.evaluator
        branches = len(evaluator.branches)
        start = time == 0
        hidden = evaluator.base_hidden(sites)[:, None].repeat(1, branches, 1)
        late = torch.nonzero(~start, as_tuple=True)[0]
        if len(late):
            found = evaluator.at_times(sites.take(late), x[late], time[late], branches)
            hidden[late.to(hidden.device)] = found
        clean, token = self._choose(hidden, time, keep)
        token = token[:, 0]
        self.changes[keep] += (token != self.token[keep]) & (self.token[keep] >= 0)
        self.token[keep] = token
        self.nfe_computed[keep[late]] += branches
        self.nfe_requested[keep] += 1
        return (evaluator.mix(clean) - x) / (1 - time)[:, None]

    def _choose(self, hidden: torch.Tensor, time: torch.Tensor, keep: torch.Tensor) -> tuple:
        temperature = self.evaluator.sampler.choice_temperature
        if not isinstance(temperature, str) and self.sites.uniforms is None:
            return self.evaluator.choose(hidden, float(temperature), None)
        results = []
        for row in range(len(keep)):  # every site has its own time, hence its own temperature
            number = int(keep[row])
            uniforms = None
            if self.sites.uniforms is not None:
                uniforms = self.sites.uniforms[number, self.nfe_requested[number]].view(1)
            tau = temperature_at(temperature, float(time[row]))
            results.append(self.evaluator.choose(hidden[row : row + 1], tau, uniforms))
        clean, token = zip(*results, strict=True)
        return torch.cat(clean), torch.cat(token)


def solve_adaptive(evaluator: PathEvaluator, sites: Sites) -> SiteSolution:
    """Integrate every site from `start_time` to `final_time` and read the output there."""
    sampler, device = evaluator.sampler, sites.noise.device
    solver = SOLVERS[sampler.solver]
    field = _Field(evaluator, sites)
    total = len(sites)
    x = sites.noise.clone()
    time = torch.full((total,), sampler.start_time, dtype=torch.float64, device=device)
    step = torch.full_like(time, sampler.first_step)
    capped = torch.zeros(total, dtype=torch.bool, device=device)
    everyone = torch.arange(total, device=device)
    velocity = field(everyone, x, time)
    active = everyone
    stages = len(solver.tableau.alpha)
    while len(active):
        over = field.nfe_requested[active] + stages + 1 > sampler.max_evaluations
        if bool(over.any()):
            stopped = active[over]
            x[stopped] += (sampler.final_time - time[stopped])[:, None] * velocity[stopped]
            capped[stopped] = True
            active = active[~over]
            continue
        end = torch.clamp(time[active] + step[active], max=sampler.final_time)
        new_x, new_velocity, error = _step(
            field, solver.tableau, active, x[active], velocity[active], time[active], end
        )
        scale = sampler.atol + sampler.rtol * torch.maximum(x[active].abs(), new_x.abs())
        ratio = (error / scale).square().mean(-1).sqrt().nan_to_num(nan=torch.inf)  # not finite: a shorter step
        good = ratio <= 1
        accepted = active[good]
        length = end - time[active]
        x[accepted], velocity[accepted], time[accepted] = new_x[good], new_velocity[good], end[good]
        step[active] = length * _factor(ratio, solver.order)
        active = active[time[active] < sampler.final_time]
    hidden = evaluator.at_times(sites, x, torch.full_like(time, sampler.final_time), 1)[:, 0]
    nfe_requested = field.nfe_requested + 1
    return SiteSolution(
        hidden=hidden,
        nfe_requested=nfe_requested,
        nfe_computed=field.nfe_computed + 1,
        passes=nfe_requested - int(sampler.start_time == 0),  # the first evaluation is the base's answer
        changes=field.changes,
        capped=capped,
    )


def _step(
    field: _Field,
    tableau,
    active: torch.Tensor,
    x: torch.Tensor,
    velocity: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One embedded step of the sites `active`: states, velocities and error estimates at `end`, each (M, d)."""
    length = (end - start)[:, None]
    slopes = [velocity]
    for node, weights in zip(tableau.alpha.tolist(), tableau.beta, strict=True):
        stage = x + length * sum(w * k for w, k in zip(weights.tolist(), slopes, strict=True))
        at = end if node == 1.0 else start + node * (end - start)
        slope = slopes[-1].clone()  # of a stage at t = 1: the previous stage's velocity
        inside = torch.nonzero(at < 1, as_tuple=True)[0]
        if len(inside):
            slope[inside] = field(active[inside], stage[inside], at[inside])
        slopes.append(slope)
    new_x = x + length * sum(w * k for w, k in zip(tableau.c_sol.tolist(), slopes, strict=True))
    error = length * sum(w * k for w, k in zip(tableau.c_error.tolist(), slopes, strict=True))
    return new_x, slopes[-1], error


def _factor(ratio: torch.Tensor, order: int) -> torch.Tensor:
    """Growth of the step size (M,) for error ratios (M,)."""
    low = torch.where(ratio < 1, 1.0, _SHRINKAGE)
    ideal = torch.where(ratio == 0, _GROWTH, _SAFETY / ratio.clamp(min=1e-30) ** (1 / order))
    return torch.clamp(torch.maximum(ideal, low), max=_GROWTH)
