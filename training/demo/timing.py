"""How much processor time a training step of every recipe takes.

    python -m training.demo.timing OUT.json NAME=RECIPE.yaml ... [--turns N] [--alone]

* the recipes take turns, a few steps each, in one process on one thread: whatever else the machine does meanwhile
  slows all of them
* the first steps of every turn warm up and do not count; the result is the median over all other steps
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from training.recipe import read_recipe
from training.train import build_trainer, prepare

TURNS, WARM_UP, STEPS = 5, 4, 8


class _StepTimes(TrainerCallback):
    """Processor time of every step, all threads together."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        self.started = time.process_time()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.process_time() - self.started)


def seconds_per_step(
    configs: dict[str, Path], turns: int = TURNS, steps: int = STEPS, warm_up: int = WARM_UP, alone: bool = False
) -> dict[str, float]:
    """Median processor time in seconds of a training step, by recipe; nothing is written.

    Args:
        alone: whether a trainer is built anew for each of its turns, so that one at a time is in memory.
    """
    measured: dict[str, list[float]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--max_steps", str(warm_up + steps), "--output_dir", folder, "--overwrite_output_dir", "true"]
        fixed += ["--save_strategy", "no", "--resume_from_checkpoint", "null"]

        def build(config: Path) -> Any:
            return build_trainer(prepare(read_recipe(["--config", str(config), *fixed])))

        trainers = {} if alone else {name: build(config) for name, config in configs.items()}
        for _ in range(turns):
            for name, config in configs.items():
                trainer = trainers.get(name) or build(config)
                times = _StepTimes()
                trainer.add_callback(times)
                trainer.train()
                trainer.remove_callback(times)
                measured[name] += times.seconds[warm_up:]
                del trainer
    return {name: round(statistics.median(seconds), 5) for name, seconds in measured.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.timing", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("recipes", nargs="+", metavar="NAME=RECIPE.yaml")
    parser.add_argument("--turns", type=int, default=TURNS, help="of every recipe")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="first steps of a turn, which do not count")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a turn that count")
    parser.add_argument(
        "--alone", action="store_true", help="keep one trainer at a time in memory, built for each turn"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = {name: Path(file) for name, file in (word.split("=", 1) for word in options.recipes)}
    seconds = seconds_per_step(named, options.turns, options.steps, options.warm_up, options.alone)
    draft = options.out.with_suffix(".partial")
    draft.write_text(json.dumps(seconds) + "\n", encoding="utf-8")
    os.replace(draft, options.out)


if __name__ == "__main__":
    main()
