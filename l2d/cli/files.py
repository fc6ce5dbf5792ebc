"""Files that are whole or not there.

- `write_files`: several texts into a folder, none of them before all have been written
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


def write_files(folder: str | os.PathLike, texts: Mapping[str, str], argument: str) -> None:
    """Write `texts` by file name into `folder`, which is created; earlier files stay until all new ones are complete.

    Raises `ValueError` that names `argument`, which the folder comes from, where the system refuses.
    """
    folder = Path(folder)
    partial = {name: folder / f".{name}.partial" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with open(partial[name], "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for name, path in partial.items():
            os.replace(path, folder / name)
    except OSError as error:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink()
        reason = "it is a file" if folder.is_file() else error.strerror
        raise ValueError(
            f"{argument}: {str(folder)!r} cannot be written ({reason}), so nothing was: make room, or name another "
            "folder."
        ) from error
