"""Rows and bases of the study, as two commands.

    python -m training.studies.prepare data TASK OUT [ROWS]
    python -m training.studies.prepare base TASK SEED DATA OUT [TARGET]

* the bases have the demo's shape and are trained as the demo's is, each with its own seed
"""

import sys
from collections.abc import Callable
from pathlib import Path

from training.demo.base import build_base, encode_rows, pretrain
from training.demo.data import read_rows
from training.studies.tasks import TASKS, write_rows


def write_data(name: str, out: Path, rows: int | None = None) -> None:
    """Writes the rows of every part of a task into `out`."""
    task = TASKS[name]
    write_rows(task.build(task.train_rows if rows is None else rows), out)


def train_base(
    name: str, seed: int, data: Path, out: Path, target: float | None = None, log: Callable[[str], None] = print
) -> dict[str, float]:
    """Trains a base of a task, to its target or another one, and saves it in `out`; see `demo.base.pretrain`."""
    task, tokenizer = TASKS[name], TASKS[name].tokenizer()
    train, validation = (
        {name: encode_rows(read_rows(data / f"{part}.jsonl"), tokenizer, task.width)}
        for part in ("base", "base_validation")
    )
    model = build_base(tokenizer, seed)
    target = task.base_target if target is None else target
    return pretrain(model, tokenizer, train, validation, out, target, task.base_steps, seed, log)


if __name__ == "__main__":
    if sys.argv[1] == "data":
        write_data(sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
    else:
        target = float(sys.argv[6]) if len(sys.argv) > 6 else None
        train_base(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]), target)
