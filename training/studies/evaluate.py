"""Everything that the study asks of one checkpoint, in one process.

    python -m training.studies.evaluate CHECKPOINT DATA OUT.json

* `measure`: per problem, whether greedy decoding gives the answer, and how likely sampling at temperature 1 is to
* `settings`: what is measured of a path, carried or not, or of a noise-free one
* the result holds every problem's outcome, so that all statistics can be computed again from it

Both come from scoring the true answers, as `training.compare_budgets` does. An answer is sampled with the product
of its tokens' probabilities: that is the expectation of sampled exact match, without the noise of drawing.

Legend: N problems, S positions.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from l2d import L2DForCausalLM
from l2d.sampler_config import NOISE_FREE_SAMPLER, single_evaluation
from training.compare_budgets import measuring
from training.demo.base import encode_rows
from training.demo.data import read_rows
from training.studies.packing import write_json

BUDGETS = (3, 7, 15, 31)  # T = 1 is the base, which is measured itself
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Measured:
    """Per problem (N,): greedy bool, the answer is what greedy decoding gives; sampled float64, its probability."""

    greedy: Tensor
    sampled: Tensor

    def record(self) -> dict[str, list]:
        """Plain values."""
        return {"greedy": self.greedy.int().tolist(), "sampled": [round(p, 6) for p in self.sampled.tolist()]}


@torch.no_grad()
def measure(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, sampler: dict[str, Any] | None = None
) -> Measured:
    """Score the answers of right-padded rows.

    Args:
        input_ids, labels: (N, S); labels are -100 where nothing is to be scored.
        sampler: changes to an L2D checkpoint's settings; other models have none.
    """
    targets = labels != -100
    if sampler is not None:
        return _measured(measuring.measure(model, input_ids, _until_last(targets), targets, sampler, BATCH))
    greedy, sampled = [], []
    for ids, scored in zip(input_ids.split(BATCH), targets[:, 1:].split(BATCH), strict=True):
        logits = model(input_ids=ids).logits[:, :-1].double()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        greedy.append(((logits.argmax(-1) == ids[:, 1:]) | ~scored).all(1))
        sampled.append(logprobs.masked_fill(~scored, 0).sum(1).exp())
    return Measured(torch.cat(greedy), torch.cat(sampled))


def _measured(measurement: measuring.Measurement) -> Measured:
    return Measured(measurement.exact.bool(), (-measurement.nll_sums).exp())


def _until_last(targets: Tensor) -> Tensor:
    """(N, S) int64 mask of everything up to the last target of each row."""
    positions = torch.arange(targets.shape[1])
    return (positions <= torch.where(targets, positions, 0).amax(1, keepdim=True)).long()


def settings(model: PreTrainedModel, single: float | None) -> dict[str, dict[str, Any] | None]:
    """Name -> sampler settings of everything that is measured of a model; `single`: time of the one evaluation."""
    if not isinstance(model, L2DForCausalLM):
        return {"plain": None}
    if model.config.noise_free or single is None:
        return {"single": dict(NOISE_FREE_SAMPLER)}
    return {**{f"T{budget}": {"budget": budget} for budget in BUDGETS}, "single": single_evaluation(single)}


def evaluate(checkpoint: Path, data: Path) -> dict[str, Any]:
    """What a checkpoint solves of the test rows, per setting and problem, as plain values."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    l2d = AutoConfig.from_pretrained(checkpoint).model_type == "l2d"
    model: Any = (L2DForCausalLM if l2d else AutoModelForCausalLM).from_pretrained(checkpoint)
    model.eval()
    rows, validation_rows = read_rows(data / "test.jsonl"), read_rows(data / "validation.jsonl")
    lengths = (len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows + validation_rows)
    width = max(lengths) + 1
    test, validation = (encode_rows(part, tokenizer, width) for part in (rows, validation_rows))
    single, times = None, {}
    if l2d and not model.config.noise_free:
        ids, targets = validation[0], validation[1] != -100
        best, tried = measuring.best_single_evaluation(model, ids, _until_last(targets), targets, batch_size=BATCH)
        single = best.sampler.final_time
        times = {f"{one.sampler.final_time:g}": _measured(one).record() | {"nll": one.nll.value} for one in tried}
    scores = {}
    for name, sampler in settings(model, single).items():
        measured = measure(model, *test, sampler)
        scores[name] = measured.record()
        print(
            f"{name}: greedy {measured.greedy.double().mean():.3f}, sampled {measured.sampled.mean():.3f}", flush=True
        )
    return {"depths": [row["depth"] for row in rows], "best_time": single, "validation": times, "scores": scores}


def main(checkpoint: Path, data: Path, out: Path) -> None:
    """Evaluate and write a JSON file, never half of one."""
    write_json(evaluate(checkpoint, data), out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
