"""The demo's output folder.

* `open_workspace`: refuses folders whose content is not an unfinished demo of the same settings, and folders in use
* `Workspace`: which steps are complete, kept in `demo.json`, so that an interrupted run continues where it stopped
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

STATE = "demo.json"
DRAFT = ".demo.json"
LOCK = ".lock"
CONTENTS = (
    "data", "base", "l2d", "corrupted", "noise_free", "lora_sft", "full_sft", "configs", "results", "logs", "cache",
    "l2d_controls.json", "corrupted_controls.json",
    "leaderboard.md", "leaderboard.json", "leaderboard.html", "trace.html", "trace.json", "accuracy.png", STATE,
)  # fmt: skip


class Workspace:
    """An output folder and the record of its complete steps.

    Attributes:
        folder: absolute path.
        seconds: duration of every complete step by name.
        lock: open file, locked as long as this process or one that inherited it lives.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.seconds: dict[str, float] = {}
        self.lock = (folder / LOCK).open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.close()
            raise ValueError(
                f"OUT={folder} is in use by a demo that still runs: wait, or choose another OUT=."
            ) from error

    def complete(self, name: str, output: Path) -> bool:
        """Whether the step `name` was completed, and its output is still there."""
        return name in self.seconds and output.exists()

    def record(self, name: str, seconds: float) -> None:
        """Remember that a step is complete."""
        self.seconds[name] = round(seconds, 1)
        self._save(finished=False)

    def finish(self) -> None:
        """Remember that the whole demo is complete, and unlock the folder."""
        self._save(finished=True)
        self.lock.close()

    def _save(self, finished: bool) -> None:
        state = {"finished": finished, "settings": self.settings, "seconds": self.seconds}
        draft = self.folder / DRAFT
        draft.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / STATE)  # never half-written


def open_workspace(folder: Path, settings: dict[str, Any], overwrite: bool) -> Workspace:
    """Prepare `folder`: new or empty, an unfinished demo of the same settings, or a demo to be overwritten.

    Raises `ValueError`, one sentence, for anything else; files that are not the demo's are never removed.
    """
    folder = folder.absolute()
    if "," in str(folder):
        raise ValueError(f"OUT={folder} holds a comma, which separates arguments of lm_eval: choose another OUT=.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUT={folder} is a file: choose a folder with OUT= (--out).")
    content = {path.name for path in folder.iterdir()} - {LOCK, DRAFT} if folder.exists() else set()
    if content and STATE not in content:
        raise ValueError(f"OUT={folder} holds {min(content)!r}, which is no demo's: choose another folder with OUT=.")
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder, settings)
    if content and overwrite:
        _clear(folder)
    elif content:
        workspace.seconds = _resumed(folder, settings)
    workspace._save(finished=False)
    return workspace


def _resumed(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """The complete steps of the unfinished demo in `folder`. Raises `ValueError` if it cannot be continued."""
    state = _read_state(folder)
    remedy = "choose another folder with OUT=, or replace it with OVERWRITE=1 (--overwrite)."
    if state["finished"]:
        raise ValueError(f"OUT={folder} holds a finished demo (see leaderboard.md there): {remedy}")
    if state["settings"] != settings:
        raise ValueError(f"OUT={folder} holds an unfinished demo of other settings: {remedy}")
    return state["seconds"]


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return {"finished": state["finished"], "settings": state["settings"], "seconds": state["seconds"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"OUT={folder} holds an unreadable {STATE}: choose another folder with OUT=.") from error


def _clear(folder: Path) -> None:
    for name in CONTENTS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
