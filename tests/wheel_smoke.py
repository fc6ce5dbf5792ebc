"""Builds the wheel, installs it into an empty environment, and runs every command from there, outside the repository.

    python -m tests.wheel_smoke [--keep DIR]

The base, the data and the task are made on the spot; training takes two steps on a CPU. Every step prints its time, the
first that fails ends the run with its output. Some minutes; needs pip's index.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.environments import CONSTRAINTS, REPOSITORY, Environment, torch_pin

INSIDE = (
    "l2d_lm_eval.pth", "l2d/trace.html", "lm_eval_ext/leaderboard/page.html", "lm_eval_ext/leaderboard/page.css",
    "lm_eval_ext/leaderboard/page.js", "lm_eval_ext/tasks/released/l2d_released.yaml",
    "lm_eval_ext/released/templates/base_llama.jinja", "lm_eval_ext/sweeps/released-llama-3.2-1b.yaml",
    "lm_eval_ext/tasks/demo/l2d_demo_products.yaml", "training/recipes/gsm8k_lora.yaml", "training/recipes/README.md",
    "training/recipes/shared/paper.yaml", "training/recipes/shared/llama-3.2-1b.json",
    "training/accelerate_configs/single.yaml", "training/accelerate_configs/slurm.sh",
)  # fmt: skip
"""Files that are no Python and must be in the wheel."""
TASK = {
    "task": "smoke",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "task.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
PLAIN = {
    "base": "base", "dataset": "data.jsonl", "lora_rank": 2, "max_steps": 2, "per_device_train_batch_size": 4,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none",
}  # fmt: skip
TUNED = {**PLAIN, "method": "lora_sft", "output_dir": "tuned"}
RECIPE = {
    **PLAIN, "method": "l2d", "output_dir": "model", "diffusion_dim": 8, "input_width": 8, "conditioning_width": 8,
    "frequency_width": 8, "noise_std": 2.0,
}  # fmt: skip
SWEEP = {
    "output": "swept",
    "tasks": ["smoke"],
    "base": True,
    "model_args": {"pretrained": "model", "device": "cpu"},
    "grid": {"diffusion_budget": [3]},
    "run": {"include_path": ".", "batch_size": 4, "log_samples": True},
}


@dataclasses.dataclass
class Step:
    """A command, what its output must say, what it must leave, and what it is told."""

    command: str
    says: str = ""
    leaves: str = ""
    told: str = ""


STEPS = [
    Step("python -c 'import l2d; print(l2d.__file__)'", says="site-packages"),
    Step("python -m training.train --config {packages}/training/recipes/gsm8k_lora.yaml --dry_run true", "37,620,864"),
    Step("python -m training.train --config recipe.yaml --dry_run true", "memory per device"),
    Step("python -m training.train --config recipe.yaml", leaves="model/model.safetensors"),
    Step(
        "accelerate launch --config_file {packages}/training/accelerate_configs/single.yaml --cpu -m training.train "
        "--config tuned.yaml",
        leaves="tuned/model.safetensors",
    ),
    Step("python -m lm_eval_ext args", "diffusion_budget"),
    Step("python -m lm_eval_ext --model l2d --model_args help", "diffusion_budget"),
    Step("lm_eval ls tasks", "l2d_released"),
    Step(
        "lm_eval --model l2d --model_args pretrained=model,diffusion_budget=3 --tasks smoke --include_path . "
        "--device cpu --output_path results/l2d --log_samples",
        says="exact_match",
        leaves="results/l2d",
    ),
    Step(
        "python -m lm_eval_ext --model hf --model_args pretrained=base --tasks smoke --include_path . --device cpu "
        "--output_path results/base --log_samples",
        says="exact_match",
    ),
    Step("python -m lm_eval_ext.sweep sweep.yaml", says="diffusion_budget", leaves="swept"),
    Step("l2d-leaderboard results swept --out report", leaves="report/leaderboard.html"),
    Step("python -m lm_eval_ext.leaderboard results --out again --only md", leaves="again/leaderboard.md"),
    Step("python -m l2d trace model --prompt 'How many' --budget 3 --out trace.html", leaves="trace.html"),
    Step("python -m l2d chat model --budget 3 --plain --max-new-tokens 4", told="How many\n/quit\n"),
    Step("python -m l2d.released --help", "target"),
    Step("python -m training.demo --help", "--out"),
]


def prepare(work: Path) -> None:
    """A tiny random base with a tokenizer, data to train on, a task, a recipe and a sweep, in `work`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import SIZES, train_tokenizer

    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **ids})).save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    rows = [{"prompt": f"{n} and {n}?", "completion": f" {2 * n}"} for n in range(16)]
    asked = [{"question": f"{n} and {n}?", "answer": str(2 * n)} for n in range(4)]
    for name, lines in (("data.jsonl", rows), ("task.jsonl", asked)):
        (work / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in (("smoke.yaml", TASK), ("recipe.yaml", RECIPE), ("tuned.yaml", TUNED), ("sweep.yaml", SWEEP)):
        (work / name).write_text(yaml.safe_dump(content, sort_keys=False))


def build(folder: Path) -> Path:
    """The wheel of the repository, checked for what must be inside."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    missing = set(INSIDE) - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        raise SystemExit(f"not in the wheel: {', '.join(sorted(missing))}")
    return wheel


def perform(step: Step, work: Path, variables: dict[str, str]) -> None:
    """Run one command in `work`; `SystemExit` with its output if it does not do what it should."""
    done = subprocess.run(
        step.command, shell=True, cwd=work, env=variables, input=step.told, capture_output=True, text=True, timeout=600
    )
    said = done.stdout + done.stderr
    if done.returncode or step.says not in said or not (work / step.leaves).exists():
        raise SystemExit(f"{said}\nfailed with status {done.returncode}: {step.command}")


def main(arguments: list[str] | None = None) -> None:
    """Build, install, run all commands."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheel_smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work here and leave everything")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="l2d-wheel-") as temporary:
        folder = (given.keep or Path(temporary)).resolve()
        work = folder / "work"
        work.mkdir(parents=True, exist_ok=True)
        wheel = timed("build", lambda: build(folder))
        environment = Environment(folder / "environment")
        timed("install torch", lambda: environment.install("-c", str(CONSTRAINTS), torch_pin()))
        timed("install the wheel", lambda: environment.install("-c", str(CONSTRAINTS), str(wheel)))
        prepare(work)
        (packages,) = (environment.folder / "lib").glob("python*/site-packages")
        variables = environment.variables()
        for step in STEPS:
            step = dataclasses.replace(step, command=step.command.format(packages=packages))
            timed(step.command.replace(str(packages), "..."), lambda step=step: perform(step, work, variables))
        print(f"{wheel.name}: {len(STEPS)} commands run from the installed wheel")


def timed(name: str, action: Callable[[], Any]) -> Any:
    """Do it and print how long it took."""
    start = time.monotonic()
    result = action()
    print(f"{time.monotonic() - start:6.1f} s  {name}", flush=True)
    return result


if __name__ == "__main__":
    main()
