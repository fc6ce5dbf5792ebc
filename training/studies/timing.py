"""How much processor time a training step of every method takes.

    python -m training.studies.timing OUT.json NAME=RECIPE.yaml ...

* a few steps of each recipe, one after the other in one process: all are timed under the same circumstances, while the
  duration of the whole trainings depends on what ran beside them
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from training.recipe import read_recipe
from training.train import build_trainer, prepare

STEPS = 30


def seconds_per_step(config: Path, steps: int = STEPS) -> float:
    """Processor time in seconds of a step, all threads together, without the loading of model and data."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--max_steps", str(steps), "--output_dir", folder, "--overwrite_output_dir", "true"]
        trainer = build_trainer(prepare(read_recipe(["--config", str(config), *options])))
        started = time.process_time()
        trainer.train()
        return (time.process_time() - started) / steps


def main(out: Path, configs: dict[str, Path]) -> None:
    """Write seconds per step by name."""
    torch.set_num_threads(1)
    seconds = {name: round(seconds_per_step(config), 5) for name, config in configs.items()}
    out.write_text(json.dumps(seconds) + "\n", encoding="utf-8")


if __name__ == "__main__":
    named = dict(argument.split("=", 1) for argument in sys.argv[2:])
    main(Path(sys.argv[1]), {name: Path(config) for name, config in named.items()})
