"""The output folder of the demo, or of another run of steps.

* `Layout`: what such a folder holds
* `open_workspace`: refuses folders whose content is not an unfinished demo of the same settings, and folders in use
* `Workspace`: which steps are complete, kept in `demo.json`, so that an interrupted run continues where it stopped
"""

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCK = ".lock"


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    Attributes:
        noun: what messages call the run.
        contents: names of the files and folders that it leaves, its table first and the record of its steps last.
    """

    noun: str
    contents: tuple[str, ...]

    @property
    def state(self) -> str:
        """Name of the file that says which steps are complete."""
        return self.contents[-1]

    @property
    def draft(self) -> str:
        """Name of that file while it is written."""
        return f".{self.state}"


class Workspace:
    """An output folder and the record of its complete steps.

    Attributes:
        folder: absolute path.
        layout: what it holds.
        seconds: duration of every complete step by name.
        lock: open file, locked as long as this process or one that inherited it lives.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], layout: Layout):
        self.folder = folder
        self.layout = layout
        self.settings = settings
        self.seconds: dict[str, float] = {}
        self.lock = (folder / LOCK).open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock.close()
            raise ValueError(
                f"OUT={folder} is in use by a {layout.noun} that still runs: wait, or choose another OUT=."
            ) from error

    def complete(self, name: str, output: Path) -> bool:
        """Whether the step `name` was completed, and its output is still there."""
        return name in self.seconds and output.exists()

    def record(self, name: str, seconds: float) -> None:
        """Remember that a step is complete."""
        self.seconds[name] = round(seconds, 1)
        self._save(finished=False)

    def finish(self) -> None:
        """Remember that the whole run is complete, and unlock the folder."""
        self._save(finished=True)
        self.lock.close()

    def _save(self, finished: bool) -> None:
        state = {"finished": finished, "settings": self.settings, "seconds": self.seconds}
        draft = self.folder / self.layout.draft
        draft.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / self.layout.state)  # never half-written


def open_workspace(folder: Path, settings: dict[str, Any], overwrite: bool, layout: Layout) -> Workspace:
    """Prepare `folder`: new or empty, an unfinished run of the same settings, or a run to be overwritten.

    Raises `ValueError`, one sentence, for anything else; files that are not the run's are never removed.
    """
    folder = folder.absolute()
    if "," in str(folder):
        raise ValueError(f"OUT={folder} holds a comma, which separates arguments of lm_eval: choose another OUT=.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUT={folder} is a file: choose a folder with OUT= (--out).")
    content = {path.name for path in folder.iterdir()} - {LOCK, layout.draft} if folder.exists() else set()
    if content and layout.state not in content:
        raise ValueError(
            f"OUT={folder} holds {min(content)!r}, which is no {layout.noun}'s: choose another folder with OUT=."
        )
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(folder, settings, layout)
    if content and overwrite:
        _clear(folder, layout)
    elif content:
        workspace.seconds = _resumed(folder, settings, layout)
    workspace._save(finished=False)
    return workspace


def _resumed(folder: Path, settings: dict[str, Any], layout: Layout) -> dict[str, float]:
    """The complete steps of the unfinished run in `folder`. Raises `ValueError` if it cannot be continued."""
    state = _read_state(folder, layout)
    remedy = "choose another folder with OUT=, or replace it with OVERWRITE=1 (--overwrite)."
    if state["finished"]:
        raise ValueError(f"OUT={folder} holds a finished {layout.noun} (see {layout.contents[0]} there): {remedy}")
    if any(settings.get(name) != value for name, value in state["settings"].items()):  # what is added may be new
        raise ValueError(f"OUT={folder} holds an unfinished {layout.noun} of other settings: {remedy}")
    return state["seconds"]


def _read_state(folder: Path, layout: Layout) -> dict[str, Any]:
    try:
        state = json.loads((folder / layout.state).read_text(encoding="utf-8"))
        return {"finished": state["finished"], "settings": state["settings"], "seconds": state["seconds"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"OUT={folder} holds an unreadable {layout.state}: choose another folder with OUT=."
        ) from error


def _clear(folder: Path, layout: Layout) -> None:
    for name in layout.contents:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
