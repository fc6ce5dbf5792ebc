"""Everything that the study asks of one checkpoint, in one process.

    python -m training.studies.evaluate CHECKPOINT DATA OUT.json

* `measure`: per problem, whether greedy decoding gives the answer, and how likely sampling at temperature 1 is to
* `best_single_time`: the time of one evaluation of the path that does best on validation rows
* `settings`: what is measured of a path, carried or not, or of a noise-free one

Both come from scoring the true answers: given the answer so far, decoding sees the same noise that scoring does, so an
answer is decoded greedily if and only if each of its tokens (the end included) is the most likely one, and it is
sampled with the product of their probabilities. That product is the expectation of sampled exact match, without the
noise of drawing.

Legend: N problems, S positions.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from l2d import L2DForCausalLM
from l2d.sampler_config import NOISE_FREE_SAMPLER
from training.demo.base import encode_rows
from training.demo.data import read_rows

BUDGETS = (1, 3, 7, 15, 31)
TIMES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
VOTES = 31
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Measured:
    """Per problem (N,): greedy bool, the answer is what greedy decoding gives; sampled float64, its probability."""

    greedy: Tensor
    sampled: Tensor


def one_evaluation(time: float, votes: int = 1) -> dict[str, Any]:
    """Sampler settings of a single evaluation of the path, at `time`; the one at t = 0 before it is the base's own."""
    return {"solver": "euler", "budget": 2, "final_time": time, "votes": votes}


@torch.no_grad()
def measure(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, sampler: dict[str, Any] | None = None
) -> Measured:
    """Score the answers of right-padded rows.

    Args:
        input_ids, labels: (N, S); labels are -100 where nothing is to be scored.
        sampler: changes to an L2D checkpoint's settings; other models have none.
    """
    greedy, sampled = [], []
    for ids, wanted in zip(input_ids.split(BATCH), labels.split(BATCH), strict=True):
        mask = wanted != -100
        if sampler is None:
            logits = model(input_ids=ids).logits[:, :-1].double()
            right = logits.argmax(-1) == ids[:, 1:]
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            mask = mask[:, 1:]
        else:
            used = torch.arange(ids.shape[1]) <= torch.where(mask, torch.arange(ids.shape[1]), 0).amax(1, keepdim=True)
            scored = model.score(ids, used.long(), continuation_mask=mask, sampler=sampler)
            right, logprobs = scored.greedy, scored.logprobs.double()
        greedy.append((right | ~mask).all(1))
        sampled.append(logprobs.masked_fill(~mask, 0).sum(1).exp())
    return Measured(torch.cat(greedy), torch.cat(sampled))


def best_single_time(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, times: Sequence[float] = TIMES
) -> tuple[float, dict[float, float]]:
    """The time (of equal ones the first) at which one evaluation solves most rows greedily, and what all solve."""
    found = {time: measure(model, input_ids, labels, one_evaluation(time)).greedy.double().mean() for time in times}
    return max(found, key=lambda time: found[time]), {time: value.item() for time, value in found.items()}


def settings(model: PreTrainedModel, single: float) -> dict[str, dict[str, Any] | None]:
    """Name -> sampler settings of everything that is measured of a model."""
    if not isinstance(model, L2DForCausalLM):
        return {"plain": None}
    if model.config.noise_free:
        return {"single": dict(NOISE_FREE_SAMPLER)}
    wanted: dict[str, dict[str, Any] | None] = {f"T{budget}": {"budget": budget} for budget in BUDGETS}
    wanted["single"] = one_evaluation(single)
    wanted["votes"] = one_evaluation(single, VOTES)
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
    single = float("nan")
    times: dict[float, float] = {}
    if l2d and not model.config.noise_free:
        single, times = best_single_time(model, *validation)
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
