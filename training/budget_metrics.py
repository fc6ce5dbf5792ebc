"""What the sampler makes of the evaluation data during training.

- `budget_accuracy`: share of response tokens that the sampler chooses greedily, at several budgets
- `first_examples`: of a data set or a stream
- `padded`: encoded examples as tensors
- `write_samples`: responses of the base and of the largest budget, side by side in `samples.jsonl`

Both use the first evaluation examples and noise that depends on these alone, so that evaluations compare.
"""

import itertools
import json
import os
from typing import Any

import datasets
import torch
from trl import SFTTrainer

from training.data.tokenizing import IGNORED

_BATCH = 8


@torch.no_grad()
def budget_accuracy(trainer: SFTTrainer, examples: Any, prefix: str) -> dict[str, float]:
    """Accuracy over the response tokens of the first examples, whose true text comes before each, by budget."""
    args, budgets = trainer.args, trainer.args.eval_budgets or []
    first = first_examples(examples, args.eval_budget_examples if budgets else 0)
    mine = first[args.process_index :: args.world_size]
    sums = torch.zeros(len(budgets), 2, dtype=torch.float64, device=args.device)
    model = trainer.accelerator.unwrap_model(trainer.model)
    for start in range(0, len(mine), _BATCH):
        rows = mine[start : start + _BATCH]
        ids, mask, targets = padded(rows, trainer.processing_class.pad_token_id, args.device)
        for number, budget in enumerate(budgets):
            with trainer.accelerator.autocast():
                greedy = model.score(ids, mask, continuation_mask=targets, sampler={"budget": budget}).greedy
            sums[number] += torch.stack([(greedy & targets).sum(), targets.sum()]).to(sums)
    sums = trainer.accelerator.reduce(sums, "sum").cpu() if budgets else sums
    return {
        f"{prefix}accuracy_budget_{budget}": (hits / count).item()
        for budget, (hits, count) in zip(budgets, sums, strict=True)
    }


def first_examples(examples: Any, count: int) -> list[dict[str, Any]]:
    """The first examples of a data set, or of a stream, which loaders may have wrapped."""
    if isinstance(examples, datasets.Dataset):
        return [examples[row] for row in range(min(count, len(examples)))]
    while not isinstance(examples, datasets.IterableDataset) and hasattr(examples, "dataset"):
        examples = examples.dataset
    return list(itertools.islice(examples, count))


def padded(
    rows: list[dict[str, Any]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and response mask (B, S), padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask, targets = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        mask[number, :length] = 1
        targets[number, 1:length] = torch.tensor(row["labels"][1:]) != IGNORED
    return ids.to(device), mask.to(device), targets.to(device)


@torch.no_grad()
def write_samples(trainer: SFTTrainer, examples: Any) -> None:
    """Append one line per example: step, prompt, true response, and what the base and the sampler generate."""
    args, tokenizer = trainer.args, trainer.processing_class
    if not args.eval_samples or not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    default = model.config.default_sampler().budget
    budgets = (1, args.eval_budgets[-1] if args.eval_budgets else default)
    os.makedirs(args.output_dir, exist_ok=True)
    with open(os.path.join(args.output_dir, "samples.jsonl"), "a", encoding="utf-8") as file:
        for example in first_examples(examples, args.eval_samples):
            ids, labels = example["input_ids"], example["labels"]
            start = next(n for n, label in enumerate(labels) if label != IGNORED and n)
            line = {"step": trainer.state.global_step, "prompt": tokenizer.decode(ids[:start])}
            line["response"] = tokenizer.decode(ids[start:])
            prompt = torch.tensor([ids[:start]], device=args.device)
            for budget in budgets:
                with trainer.accelerator.autocast():
                    out = model.generate(
                        prompt, max_new_tokens=args.eval_sample_tokens, sampler={"budget": budget}, do_sample=False
                    )
                line[f"budget {budget}"] = tokenizer.decode(out[0, start:])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
