"""How fast a path learns on a real model: the published start beside the warm start, in one run.

    python -m tests.benchmarks.warm_start --base DIR --data train.jsonl --steps 20 --json warm_start.json

- `BASE`: a chat model with its tokenizer; SmolLM2-135M-Instruct in `tests/benchmarks/RESULTS.md`
- `--data`: GSM8K's training split, rows with `question` and `answer`
- every run sees the same rows, in the same order, with the same noise; only start and learning rate differ

Printed: the training loss over each five steps, and then loss and token accuracy on held-out rows, whole and by bin of
time. LoRA of rank 32, AdamW, linear warm-up over a tenth of the steps, then constant.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from l2d import L2DConfig, L2DForCausalLM
from training.config import L2DTrainingConfig
from training.trainer import L2DTrainer, response_positions

STARTS = ("published", "warm")


def rows_of(path: Path, first: int, count: int) -> Dataset:
    """Some rows of a JSON Lines or Parquet file, as a user's question and the assistant's answer."""
    kind = "parquet" if path.suffix == ".parquet" else "json"
    rows = Dataset.from_parquet(str(path)) if kind == "parquet" else Dataset.from_json(str(path))
    chosen = rows.select(range(first, first + count))
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in chosen
        ]
    )


def train(options: argparse.Namespace, start: str, rate: float) -> dict[str, Any]:
    """One training: its losses, what it measures on held-out rows, and the processor time of a step."""
    torch.manual_seed(0)
    config = L2DConfig(warm_start=start != "published", noise_std=options.noise_std, variant=options.variant)
    model = L2DForCausalLM.from_base(options.base, config, dtype=torch.bfloat16)
    args = L2DTrainingConfig(
        output_dir=str(options.scratch / f"{start}-{rate:g}"),
        overwrite_output_dir=True,
        max_steps=options.steps,
        per_device_train_batch_size=min(4, options.batch),
        gradient_accumulation_steps=max(1, options.batch // 4),
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, options.steps // 10),
        time_power=options.time_power,
        bf16=True,
        activation_checkpointing=False,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=1024,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    data = rows_of(options.data, 0, options.steps * options.batch)
    held_out = rows_of(options.data, options.first_held_out, options.held_out)
    trainer = L2DTrainer(model, args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer)
    if options.heads != 1:
        set_rate_of_heads(trainer, rate * options.heads)
    begun = time.process_time()
    trainer.train()
    seconds = (time.process_time() - begun) / options.steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"start": start, "learning_rate": rate, "losses": losses, "seconds": seconds}
    return {**result, "held_out": trainer.evaluate(), "changes": changes(trainer, min(8, options.held_out))}


def set_rate_of_heads(trainer: L2DTrainer, rate: float) -> None:
    """Give the modulation heads a learning rate of their own."""
    optimizer = trainer.create_optimizer()
    heads = {id(p) for name, p in trainer.model.trained_parameters() if "modulation" in name}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in heads]
        group["params"] = [p for p in group["params"] if id(p) not in heads]
        optimizer.add_param_group({**{name: value for name, value in group.items() if name != "params"},
                                   "params": own, "lr": rate, "initial_lr": rate})  # fmt: skip


@torch.no_grad()
def changes(trainer: L2DTrainer, count: int, budget: int = 15) -> dict[str, float]:
    """How often the chosen token differs from that of the evaluation before, by time, at the targets of some rows.

    The first choice is compared with the base's, at t = 0; the sum is the number of changes per token.
    """
    model, totals, sites = trainer.model.eval(), None, 0
    for row in range(count):
        batch = trainer.data_collator([trainer.eval_dataset[row]])
        index, _ = response_positions(batch["labels"])
        state = model.paths.main_path(batch["input_ids"])
        generator = torch.Generator().manual_seed(row)
        x0 = torch.randn(*index.shape, model.config.diffusion_dim, generator=generator) * model.config.noise_std
        solved = model.solve(state, index, x0, {"budget": budget, "speculation": False})
        chosen = solved.chosen[:, 0]  # (E, Q)
        changed = (chosen.diff(dim=0) != 0).sum(1)
        totals, sites = changed if totals is None else totals + changed, sites + index.shape[1]
    times = solved.evaluation_times[1:].tolist()
    return {f"{time:.2f}": int(total) / sites for time, total in zip(times, totals.tolist(), strict=True)}


def shown(result: dict[str, Any]) -> str:
    """One line of a training."""
    fives = [result["losses"][n : n + 5] for n in range(0, len(result["losses"]), 5)]
    means = " / ".join(f"{sum(five) / len(five):.2f}" for five in fives)
    held_out = result["held_out"]
    bins = {name.removeprefix("eval_loss_t_"): value for name, value in held_out.items() if "loss_t_" in name}
    return (
        f"{result['start']:>9}  rate {result['learning_rate']:g}  training loss {means}  held-out loss "
        f"{held_out['eval_loss']:.3f}, accuracy {held_out['eval_accuracy']:.3f}  by time "
        + ", ".join(f"{name.replace('_', '-')}: {value:.2f}" for name, value in sorted(bins.items()))
        + "  changes of the choice at "
        + ", ".join(f"t = {name}: {value:.3f}" for name, value in result["changes"].items())
        + f"  {result['seconds']:.0f} s of processor time a step"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or name of a chat model")
    parser.add_argument("--data", required=True, type=Path, help="GSM8K's training split, .parquet or .jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="examples per step: 1, 2, or a multiple of 4")
    parser.add_argument("--held-out", type=int, default=32, help="rows that are measured in the end")
    parser.add_argument("--first-held-out", type=int, default=7000, help="number of the first of them")
    parser.add_argument(
        "--published", type=float, nargs="*", default=[1e-3], help="learning rates of the published start"
    )
    parser.add_argument("--warm", type=float, nargs="*", default=[1e-3], help="learning rates, warm start")
    parser.add_argument("--noise-std", type=float, default=64.0)
    parser.add_argument("--time-power", type=float, default=1.0)
    parser.add_argument(
        "--heads", type=float, default=1.0, help="learning rate of modulation heads over that of the rest"
    )
    parser.add_argument("--variant", choices=("lora", "full"), default="lora")
    parser.add_argument("--scratch", type=Path, default=Path("warm_start"), help="folder for what trainers write")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(arguments)
    results = []
    for start in STARTS:
        for rate in getattr(options, start):
            results.append(train(options, start, rate))
            print(shown(results[-1]), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
