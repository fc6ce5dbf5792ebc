"""What one sampler setting of a checkpoint reaches, and which setting is best.

- `measure`: token accuracy, exact match, loss and cost of one sampler setting
- `best_single_evaluation`: the time at which one evaluation of the path does best
- `cheapest_gate`: the gate that computes least at the same accuracy
- `compare`: a setting against another one, paired by example

Legend: E examples, S positions.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l2d.sampler_config import SamplerConfig, single_evaluation
from l2d.statistics import Estimate, Paired, mean, paired, ratio

if TYPE_CHECKING:
    import torch

    from l2d.modeling import L2DForCausalLM

TIMES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
BUDGETS = (1, 3, 7, 15, 31)
GATES = ("skip_confidence", "early_confidence")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one sampler setting reached, per example (E,) float64.

    Attributes:
        counts, right: targets, and correct ones. nll_sums: summed negative log-probability of the targets in nats.
        computed, passes: evaluations that the network computed, and batched passes of the path, summed over targets.
    """

    sampler: SamplerConfig
    counts: "torch.Tensor"
    right: "torch.Tensor"
    nll_sums: "torch.Tensor"
    computed: "torch.Tensor"
    passes: "torch.Tensor"

    @property
    def exact(self) -> "torch.Tensor":
        """(E,) float64: 1 where the whole answer is right."""
        return (self.right == self.counts).double()

    @property
    def accuracy(self) -> Estimate:
        """Share of right tokens, with the error over examples."""
        return ratio(self.right.numpy(), self.counts.numpy())

    @property
    def exact_match(self) -> Estimate:
        """Share of answers that are right as a whole."""
        return mean(self.exact.numpy())

    @property
    def nll(self) -> Estimate:
        """Mean negative log-probability of a target in nats, with the error over examples."""
        return ratio(self.nll_sums.numpy(), self.counts.numpy())

    @property
    def evaluations(self) -> Estimate:
        """Evaluations that the network computed for a target, with the error over examples."""
        return ratio(self.computed.numpy(), self.counts.numpy())

    def record(self) -> dict[str, Any]:
        """Plain values; an error is `None` where it is not known, as for one example."""
        values: dict[str, Any] = {"sampler": self.sampler.to_dict()}
        for name in ("accuracy", "exact_match", "nll", "evaluations"):
            estimate: Estimate = getattr(self, name)
            values |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
        return values


def measure(
    model: "L2DForCausalLM",
    ids: "torch.Tensor",
    mask: "torch.Tensor",
    is_target: "torch.Tensor",
    sampler: dict[str, Any],
    batch_size: int = 32,
) -> Measurement:
    """Score the answers of right-padded rows.

    Args:
        ids, mask, is_target: (E, S), tokens, which of them are no padding, and which are targets.
        sampler: changes to the checkpoint's sampler settings.
        batch_size: rows at a time; changes nothing but memory and speed.

    Raises `ValueError` for a row without a target, and for settings that the model cannot follow.
    """
    import torch

    settings, counts = model.sampler(sampler), is_target.sum(1).double().cpu()
    if not bool((counts > 0).all()):
        raise ValueError("is_target marks no target in some row: leave out examples without an answer.")
    right, nll_sums, computed, passes = (torch.zeros_like(counts) for _ in range(4))
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        width = int(mask[rows].sum(1).max())
        targets = is_target[rows, :width].bool()
        scored = model.score(ids[rows, :width], mask[rows, :width], continuation_mask=targets, sampler=settings)
        right[rows] = (scored.greedy & targets).sum(1).double().cpu()
        nll_sums[rows] = -scored.logprobs.double().masked_fill(~targets, 0).sum(1).cpu()
        computed[rows] = scored.nfe_computed.sum(1).double().cpu()
        passes[rows] = scored.passes.sum(1).double().cpu()
    return Measurement(settings, counts, right, nll_sums, computed, passes)


def best_single_evaluation(
    model: "L2DForCausalLM",
    ids: "torch.Tensor",
    mask: "torch.Tensor",
    is_target: "torch.Tensor",
    times: Sequence[float] = TIMES,
    batch_size: int = 32,
) -> tuple[Measurement, list[Measurement]]:
    """The best of `times` as `choose_best` says, and what all of them reached.

    Arguments as for `measure`; the time is `Measurement.sampler.final_time`. Use data that were not trained on.
    """
    measurements = [measure(model, ids, mask, is_target, single_evaluation(time), batch_size) for time in times]
    return choose_best(measurements), measurements


def choose_best(measurements: Sequence[Measurement]) -> Measurement:
    """The lowest loss among those within one paired standard error of the highest exact match.

    The highest exact match alone would be chosen by noise: times differ less in it than examples do.
    """
    highest = max(measurements, key=lambda one: one.exact_match.value)
    behind = [(one, compare(highest, one)) for one in measurements]
    close = [one for one, difference in behind if difference.value <= (difference.stderr or 0.0)]
    return min(close, key=lambda one: one.nll.value)


def compare(one: Measurement, other: Measurement) -> Paired:
    """Exact match of `one` minus that of `other` on the same examples."""
    return paired(one.exact.numpy(), other.exact.numpy())


def compare_tokens(one: Measurement, other: Measurement) -> Estimate:
    """Token accuracy of `one` minus that of `other` on the same examples."""
    return ratio((one.right - other.right).numpy(), one.counts.numpy(), bounds=(-1.0, 1.0))


def cheapest_gate(gates: Sequence[Measurement], ungated: Measurement) -> Measurement | None:
    """The gate that computes the fewest evaluations, if any is at most one paired standard error behind `ungated` in
    token accuracy."""
    differences = [(gate, compare_tokens(gate, ungated)) for gate in gates]
    close = [gate for gate, difference in differences if difference.value >= -(difference.stderr or 0.0)]
    return min(close, key=lambda gate: gate.evaluations.value, default=None)
