"""Command lines whose mistakes end in one line.

- `Parser`: an `argparse.ArgumentParser` that says what is wrong and where help is, without the usage text
- `check_folder`: whether a folder can be written to, before there is anything to write
"""

import argparse
import difflib
import os
from pathlib import Path
from typing import NoReturn

from l2d.sampler_config import REMOVED


class Parser(argparse.ArgumentParser):
    """Refuses with one sentence and exit status 2; an unknown option gets the nearest known one as a hint."""

    def error(self, message: str) -> NoReturn:
        """End the process with `message` on standard error."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help).\n")

    def parse_known_args(self, args=None, namespace=None):
        """As in the base class, but what is not known is refused here, where the known options are at hand."""
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            name = rest[0].split("=")[0]
            if reason := REMOVED.get(name.lstrip("-")):
                self.error(reason)
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"argument {rest[0]!r} is not known{f': did you mean {near[0]}?' if near else ''}")
        return known, rest


def check_folder(argument: str, folder: str | os.PathLike) -> None:
    """Raise `ValueError` unless `folder`, the value of `argument`, can be created or written to; creates nothing."""
    parent = Path(folder).absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(
            f"{argument}={os.fspath(folder)!r} cannot be created: {str(parent)!r} is a file; give a folder."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"{argument}={os.fspath(folder)!r} cannot be written to: choose another folder, or change the permissions "
            f"of {str(parent)!r}."
        )
