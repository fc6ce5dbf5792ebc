"""Memory per process of training, replicated, and as FSDP2 and DeepSpeed ZeRO shard it: one step on CPUs.

    python -m tests.benchmarks.sharding --processes 4

A random base is trained (method l2d) by each launch configuration in turn. What grows in a process, from before the
model is made to after the last step, is compared: at rest between steps, and at most within one. Files and libraries,
which every process holds once, are left out. On CPUs accelerate has to be told that it may shard, as in the tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY, train_tokenizer
from tests.training_runs import RUNS, sums, write_jsonl

CONFIGURATIONS = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
MEASURED = """
import ctypes, gc, threading, time
import psutil
from transformers import TrainerCallback

process, seen = psutil.Process(), {"peak": 0, "before": 0}

def memory():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free, but kept for later
    return process.memory_info().rss

def watch():
    while True:
        seen["peak"] = max(seen["peak"], process.memory_info().rss)
        time.sleep(0.005)

class AtRest(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            seen["peak"] = 0  # from here on, a whole step
        if state.global_step == 3:
            peak, rest = seen["peak"], memory()
            figures = [(value - seen["before"]) / 2**20 for value in (rest, peak)]
            print("memory", args.process_index, *figures, flush=True)

built = train.build_trainer

def build_measured(job):
    seen["before"] = memory()
    trainer = built(job)
    trainer.add_callback(AtRest())
    threading.Thread(target=watch, daemon=True).start()
    return trainer

train.build_trainer = build_measured
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks.sharding", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--variant", choices=("lora", "full"), default="full")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS)
    parser.add_argument("--json", type=Path, help="file for settings and figures")
    return parser.parse_args(arguments)


def make_base(folder: Path, options: argparse.Namespace) -> None:
    """A random Llama in bfloat16 with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer()
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=8, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Mean MiB per process, at rest and within a step, of the launch configuration `name`."""
    recipe = {
        "method": "l2d", "variant": options.variant, "lora_rank": 8 if options.variant == "lora" else None,
        "base": str(folder / "base"), "dtype": "bfloat16", "bf16": True, "dataset": str(folder / "data.jsonl"),
        "output_dir": str(folder / name), "max_steps": 3, "save_strategy": "no", "per_device_train_batch_size": 1,
        "disable_tqdm": True,
    }  # fmt: skip
    recipe = {name: value for name, value in recipe.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "runs.json").write_text(json.dumps([({}, ["--config", str(folder / "recipe.yaml")])]))
    text = (REPOSITORY / "training" / "accelerate_configs" / f"{name}.yaml").read_text()
    text = text.replace("num_processes: 8", f"num_processes: {options.processes}") + "main_process_port: 0\n"
    (folder / "config.yaml").write_text(text)
    (folder / "script.py").write_text(RUNS.replace("with open(sys.argv[1])", MEASURED + "\nwith open(sys.argv[1])"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
    command += [str(folder / "script.py"), str(folder / "runs.json")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}  # what is freed is gone
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    rows = [line.split()[2:] for line in done.stdout.splitlines() if line.startswith("memory ")]
    if len(rows) != options.processes:
        raise RuntimeError(f"{name} did not run in {options.processes} processes:\n{done.stderr[-4000:]}")
    rest, peak = (sum(float(row[column]) for row in rows) / len(rows) for column in (0, 1))
    return {"configuration": name, "rest_mib": rest, "peak_mib": peak}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print; returns the figures."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base", options)
        write_jsonl(folder / "data.jsonl", sums(64))
        figures = []
        for configuration in options.only:
            figures.append(measure(configuration, folder, options))
            print("{configuration:16} {rest_mib:8.0f} MiB at rest {peak_mib:8.0f} MiB at most".format(**figures[-1]))
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": str(options.json), "results": figures}, indent=1))
    return figures


if __name__ == "__main__":
    main()
