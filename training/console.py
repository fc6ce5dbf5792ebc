"""What the training commands tell: one line, once for all processes.

- `say`: on standard output
- `end`: why the command ends, on standard error
"""

import os
import sys
from typing import NoReturn

RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def say(line: str | None) -> None:
    """Print a line, once for all processes."""
    if line and RANK == 0:
        print(line, flush=True)


def end(error: Exception, status: int, by: int = RANK) -> NoReturn:
    """Say in one line why the command ends here: once for all processes, or with `LOCAL_RANK` once on each machine."""
    if by == 0:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(status)
