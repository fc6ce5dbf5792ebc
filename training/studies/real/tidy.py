"""Makes the checkpoints of a finished training small: `python -m training.studies.real.tidy FOLDER OUT.json`.

* what only a resumed training needs is removed, two thirds of their bytes: the trained weights stay, for the
  comparison at equal processor time
* the trainer's log stays in the folder of the training; its losses are written to `OUT.json`, one for every step
"""

import json
import sys
from pathlib import Path

from training.studies.packing import write_json

ONLY_FOR_RESUMING = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def tidy(folder: Path, out: Path) -> None:
    """Write the losses, and remove what a finished training needs no more."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    write_json([round(entry["loss"], 4) for entry in history if "loss" in entry], out)
    for name in ONLY_FOR_RESUMING:
        for file in folder.glob(f"checkpoint-*/{name}"):
            file.unlink()


if __name__ == "__main__":
    tidy(*map(Path, sys.argv[1:]))
