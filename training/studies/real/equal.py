"""The methods at equal processor time: what the fastest training took is the time that every method gets.

    python -m training.studies.real.equal SECONDS.json METHOD RUN_FOLDER OUT.json EVALUATION_OPTIONS...

* `at_equal_time`: steps that fit into that time, rounded to the nearest checkpoint
* the command evaluates that checkpoint; of the method whose time it is, it is the last one
* learning rates are constant after the warm-up, so that a checkpoint on the way is a shorter training
"""

import json
import sys
from pathlib import Path

from training.studies.real import evaluate


def at_equal_time(seconds: dict[str, float], method: str, steps: int, saved: list[int]) -> int:
    """Of the steps `saved`, the nearest to the time that the fastest method takes for all `steps`.

    Args:
        seconds: processor time of a step, by method.
    """
    fitting = min(seconds.values()) * steps / seconds[method]
    return min(saved, key=lambda step: abs(step - fitting))


def saved_steps(folder: Path) -> list[int]:
    """The steps of a training's checkpoints, in rising order."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def main(seconds: Path, method: str, folder: Path, out: Path, options: list[str]) -> None:
    """Evaluate a method at equal processor time; the result says at which step."""
    saved = saved_steps(folder)
    step = at_equal_time(json.loads(seconds.read_text(encoding="utf-8")), method, saved[-1], saved)
    evaluate.main([str(folder / f"checkpoint-{step}"), str(out), *options])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
