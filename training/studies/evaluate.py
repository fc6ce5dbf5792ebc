"""Everything that the study asks of one checkpoint, in one process.

    python -m training.studies.evaluate CHECKPOINT DATA OUT.json

* `measure`: per problem, whether greedy decoding gives the answer, and how likely sampling at temperature 1 is to
* `settings`: what is measured of a path, carried or not, or of a noise-free one

Both come from scoring the true answers, as `training.compare_budgets` does. An answer is sampled with the product
of its
tokens' probabilities: that is the expectation of sampled exact match, without the noise of drawing.

Legend: N problems, S positions.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from l2d import L2DForCausalLM
from l2d.sampler_config import NOISE_FREE_SAMPLER
from training import compare_budgets as controls
from training.compare_budgets import BUDGETS, single_evaluation
from training.demo.base import encode_rows
from training.demo.data import read_rows

VOTES = 31
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Measured:
    """Per problem (N,): greedy bool, the answer is what greedy decoding gives; sampled float64, its probability."""

    greedy: Tensor
    sampled: Tensor


@torch.no_grad()
def measure(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, sampler: dict[str, Any] | None = None
) -> Measured:
    """Score the answers of right-padded rows.

    Args:
        input_ids, labels: (N, S); labels are -100 where nothing is to be scored.
        sampler: changes to an L2D checkpoint's settings; other models have none.
    """
    wanted = labels != -100
    if sampler is not None:
        found = controls.measure(model, input_ids, _until_last(wanted), wanted, sampler, BATCH)
        return Measured(found.exact.bool(), (-found.nll_sums).exp())
    greedy, sampled = [], []
    for ids, targets in zip(input_ids.split(BATCH), wanted[:, 1:].split(BATCH), strict=True):
        logits = model(input_ids=ids).logits[:, :-1].double()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        greedy.append(((logits.argmax(-1) == ids[:, 1:]) | ~targets).all(1))
        sampled.append(logprobs.masked_fill(~targets, 0).sum(1).exp())
    return Measured(torch.cat(greedy), torch.cat(sampled))


def _until_last(wanted: Tensor) -> Tensor:
    """(N, S) int64 mask of everything up to the last target of each row."""
    places = torch.arange(wanted.shape[1])
    return (places <= torch.where(wanted, places, 0).amax(1, keepdim=True)).long()


def settings(model: PreTrainedModel, single: float) -> dict[str, dict[str, Any] | None]:
    """Name -> sampler settings of everything that is measured of a model."""
    if not isinstance(model, L2DForCausalLM):
        return {"plain": None}
    if model.config.noise_free:
        return {"single": dict(NOISE_FREE_SAMPLER)}
    wanted: dict[str, dict[str, Any] | None] = {f"T{budget}": {"budget": budget} for budget in BUDGETS}
    wanted["single"] = single_evaluation(single)
    wanted["votes"] = {**single_evaluation(single), "votes": VOTES}
    return wanted


def evaluate(checkpoint: Path, data: Path) -> dict[str, Any]:
    """What a checkpoint solves of the test rows, per setting and problem, as plain values."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    l2d = AutoConfig.from_pretrained(checkpoint).model_type == "l2d"
    model: Any = (L2DForCausalLM if l2d else AutoModelForCausalLM).from_pretrained(checkpoint)
    model.eval()
    rows, chosen = read_rows(data / "test.jsonl"), read_rows(data / "validation.jsonl")
    width = max(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows + chosen) + 1
    test, validation = (encode_rows(part, tokenizer, width) for part in (rows, chosen))
    single, times = float("nan"), {}
    if l2d and not model.config.noise_free:
        ids, labels = validation
        wanted = labels != -100
        best, tried = controls.best_single_evaluation(model, ids, _until_last(wanted), wanted, batch_size=BATCH)
        single = best.sampler.final_time
        times = {one.sampler.final_time: one.exact_match[0] for one in tried}
    scores = {}
    for name, sampler in settings(model, single).items():
        found = measure(model, *test, sampler)
        scores[name] = {"greedy": found.greedy.int().tolist(), "sampled": [round(p, 6) for p in found.sampled.tolist()]}
        print(f"{name}: greedy {found.greedy.double().mean():.3f}, sampled {found.sampled.mean():.3f}", flush=True)
    return {
        "depths": [row["depth"] for row in rows],
        "best_time": single if times else None,
        "times": times,
        "scores": scores,
    }


def main(checkpoint: Path, data: Path, out: Path) -> None:
    """Evaluate and write a JSON file, never half of one."""
    content = evaluate(checkpoint, data)
    draft = out.with_suffix(".partial")
    draft.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(draft, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
