"""How much processor time a training step of every recipe takes.

    python -m training.demo.timing OUT.json NAME=RECIPE.yaml ...

* the recipes take turns, a few steps each, in one process on one thread: whatever else the machine does meanwhile
  slows all of them
* the first steps of every turn warm up and do not count; the result is the median over all other steps
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

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


def seconds_per_step(configs: dict[str, Path], turns: int = TURNS, steps: int = STEPS) -> dict[str, float]:
    """Median processor time in seconds of a training step, by recipe; nothing is written."""
    measured: dict[str, list[float]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--max_steps", str(WARM_UP + steps), "--output_dir", folder, "--overwrite_output_dir", "true"]
        trainers = {
            name: build_trainer(prepare(read_recipe(["--config", str(config), *fixed])))
            for name, config in configs.items()
        }
        for _ in range(turns):
            for name, trainer in trainers.items():
                times = _StepTimes()
                trainer.add_callback(times)
                trainer.train()
                trainer.remove_callback(times)
                measured[name] += times.seconds[WARM_UP:]
    return {name: round(statistics.median(seconds), 5) for name, seconds in measured.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    named = dict(argument.split("=", 1) for argument in sys.argv[2:])
    seconds = seconds_per_step({name: Path(config) for name, config in named.items()})
    Path(sys.argv[1]).write_text(json.dumps(seconds) + "\n", encoding="utf-8")
