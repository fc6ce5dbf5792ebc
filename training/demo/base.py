"""The demo's base: a tiny Llama, trained from scratch on both skills and stopped half-way.

* `build_base`: 2 layers, 64 wide, 4 heads, 128 feed-forward, one token per character
* `train_base`: AdamW on the answers of products and sums in equal parts; a running average of the weights is kept, and
  saved as soon as it solves `TARGET_ACCURACY` of the validation products: a base that is finished would leave a
  finetuning method nothing to show
* `pretrain`: the same for any rows, target and seed
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.demo.data import SEED, SKILLS, build_tokenizer, read_rows

TARGET_ACCURACY = 0.50
MAX_STEPS = 4000
CHECK_EVERY = 25
WIDTH = 12  # tokens of the longest problem, its answer and the end: ^347*6=2802$
BATCH = 128
LEARNING_RATE = 3.0e-3
WARMUP = 50
AVERAGE_DECAY = 0.98  # per step: a running average over about 50 steps

Encoded = dict[str, tuple[Tensor, Tensor]]
"""Ids and labels (N, S) of the rows of every skill."""


def build_base(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> LlamaForCausalLM:
    """A random base of 100 k parameters; its end and padding tokens are the tokenizer's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode_rows(
    rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, width: int = WIDTH
) -> tuple[Tensor, Tensor]:
    """Right-padded ids (N, width) of prompt, answer and end token, and labels (N, width): answer and end, else -100."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    texts = [row["prompt"] + row["completion"] + str(tokenizer.eos_token) for row in rows]
    ids = tokenizer(texts)["input_ids"]
    input_ids = torch.tensor([line + [tokenizer.pad_token_id] * (width - len(line)) for line in ids])
    positions = torch.arange(width)
    starts, ends = (torch.tensor([len(line) for line in lines])[:, None] for lines in (prompts, ids))
    return input_ids, input_ids.where((positions >= starts) & (positions < ends), -100)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor) -> float:
    """Share of rows whose answer and end are all the argmax: what greedy decoding gets exactly right."""
    right = model(input_ids=input_ids).logits[:, :-1].argmax(-1) == labels[:, 1:]
    return (right | (labels[:, 1:] == -100)).all(-1).double().mean().item()


def train_base(
    data: Path, out: Path, log: Callable[[str], None] = print, target: float = TARGET_ACCURACY
) -> dict[str, float]:
    """Trains a base on `data` until the target, saves it with its tokenizer in `out`; returns what it reached.

    `target` is the share of the validation products that it must solve.

    Raises `RuntimeError` when `MAX_STEPS` are not enough.
    """
    tokenizer = build_tokenizer()
    train, validation = (
        {skill: encode_rows(read_rows(data / f"{skill}_{split}.jsonl"), tokenizer) for skill in SKILLS}
        for split in ("train", "validation")
    )
    return pretrain(build_base(tokenizer), tokenizer, train, validation, out, target, MAX_STEPS, SEED, log)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    train: Encoded,
    validation: Encoded,
    out: Path,
    target: float,
    max_steps: int,
    seed: int = SEED,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Trains `model` on equal parts of every skill until it solves `target` of the first one's validation rows.

    Args:
        train, validation: per skill ids and labels (N, S).
        out: where the running average of the weights, the tokenizer and `pretraining.json` are saved.
        max_steps: after which it has failed.

    Returns what it reached. Raises `RuntimeError` when `max_steps` are not enough.
    """
    first = next(iter(train))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP)
        input_ids, labels = _batch(list(train.values()), generator)
        logits = model(input_ids=input_ids).logits[:, :-1]  # (B, S - 1, V)
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        if step % CHECK_EVERY == 0:
            reached = {skill: accuracy(averaged.module, *part) for skill, part in validation.items()}
            done = reached[first] >= target
            if done or step % (10 * CHECK_EVERY) == 0:
                log(f"step {step}: loss {loss.item():.3f}, " + ", ".join(f"{k} {v:.3f}" for k, v in reached.items()))
            if done:
                break
    else:
        raise RuntimeError(f"the base did not solve {target:.0%} of the {first} within {max_steps} steps")
    trained: Any = averaged.module
    trained.save_pretrained(out)
    tokenizer.save_pretrained(out)
    result = {"steps": step, **reached}
    (out / "pretraining.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def _batch(parts: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels (BATCH, WIDTH) of random rows, the same number of every part."""
    size = BATCH // len(parts)
    rows = [torch.randint(len(input_ids), (size,), generator=generator) for input_ids, _ in parts]
    ids = torch.cat([input_ids[index] for (input_ids, _), index in zip(parts, rows, strict=True)])
    labels = torch.cat([labels[index] for (_, labels), index in zip(parts, rows, strict=True)])
    return ids, labels


if __name__ == "__main__":  # python -m training.demo.base DATA OUT
    train_base(Path(sys.argv[1]), Path(sys.argv[2]))
