"""Every kind of base, of a real model: trained for a few steps, saved, and looked at in a new process.

    python -m tests.bases.real FOLDER OUT [--gguf-folder FOLDER --gguf-file NAME] [--only WORD ...]

FOLDER holds a plain model with tokenizer and chat template. A line of a table is printed for each kind: bytes of the
base's weights, loss of the first and last of some steps, seconds per step, whether all texts and log-likelihoods of
`lm_eval` at budget 1 are those of the harness's own class on the same base, and the first words of a chat. OUT is kept.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from l2d.__main__ import main as l2d
from l2d.checkpoint.bases import load_base
from l2d.network.quantized import weight_parts
from tests.bases.making import KINDS, look, train
from tests.training_runs import BASELINE, sums, train_here, write_jsonl, write_recipe

STEPS = 8


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights, codes and scales."""
    parts = {id(module.weight): held for module in model.modules() if (held := weight_parts(module)) is not None}
    each = (parts.get(id(parameter), [parameter]) for parameter in model.parameters())
    return sum(tensor.nbytes for tensors in each for tensor in tensors)


def prepare(kind: str, options: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Base and recipe of a kind, and the arguments of the harness's own class for the same base."""
    if kind == "plain":
        return options.base, {}, {"pretrained": str(options.base)}
    if kind == "GGUF":
        place = {"pretrained": str(options.gguf_folder), "gguf_file": options.gguf_file}
        return options.gguf_folder, {"base_gguf_file": options.gguf_file}, place
    if kind == "adapter":
        data = write_jsonl(folder / "lora.jsonl", sums(16))
        settings = {**BASELINE, "method": "lora_sft", "base": options.base, "dataset": data, "max_steps": STEPS}
        train_here(write_recipe(folder / "lora.yaml", **settings, output_dir=folder / "lora"))
        adapter = folder / "lora" / "adapter"
        l2d(["dequantize", str(adapter), str(folder / "merged")])
        return adapter, {}, {"pretrained": str(folder / "merged")}
    load_base(options.base, dtype=torch.float32, **KINDS[kind]).save_pretrained(folder / "stored")
    AutoTokenizer.from_pretrained(options.base).save_pretrained(folder / "stored")
    return options.base, KINDS[kind], {"pretrained": str(folder / "stored")}


def line(kind: str, options: argparse.Namespace) -> str:
    """What was measured of one kind."""
    folder = options.out / kind.replace(" ", "-").replace(",", "")
    folder.mkdir(parents=True)
    base, recipe, theirs = prepare(kind, options, folder)
    names = {"base_gguf_file": "gguf_file"}
    loaded = load_base(base, dtype=torch.float32, **{names.get(name, name): value for name, value in recipe.items()})
    size = stored_bytes(loaded)
    del loaded
    gc.collect()
    started = time.perf_counter()
    path = {"warm_start": True, "lora_rank": 8, "diffusion_dim": 64, "learning_rate": 0.001}
    checkpoint = train(
        folder, base, rows=64, max_steps=STEPS, save_strategy="steps", save_steps=STEPS, **path, **recipe
    )
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    (runtime,) = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    (seen,) = look([(checkpoint, theirs)], tokens=8)
    equal = "equal" if seen.l2d == seen.hf else "DIFFERENT"
    words = " ".join(seen.chat.splitlines()[1].split())[:40]
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    loss = f"{losses[0]:.2f} to {losses[-1]:.2f}"
    return f"| {kind} | {size / 1e6:.0f} | {loss} | {runtime / STEPS:.1f} | {equal} | {words} |"


def main() -> None:
    """Measure the kinds that are asked for, and print the table as it grows."""
    parser = argparse.ArgumentParser(prog="python -m tests.bases.real", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf-folder", type=Path)
    parser.add_argument("--gguf-file")
    parser.add_argument("--only", nargs="*", help="kinds with one of these words")
    options = parser.parse_args()
    kinds = ["plain", *(["GGUF"] if options.gguf_file else []), "adapter", *KINDS]
    table = options.out / "table.md"
    for kind in kinds:
        if options.only is None or any(word in kind for word in options.only):
            measured = line(kind, options)
            with open(table, "a", encoding="utf-8") as file:
                file.write(measured + "\n")
            print(measured, flush=True)


if __name__ == "__main__":
    main()
