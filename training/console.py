"""What the training commands tell: one line, once for all processes.

- `say`: on standard output
- `end`: why the command ends, on standard error
"""

import os
import sys
from typing import NoReturn

RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def say(line: str | None) -> None:
    """Print a line, once for all processes."""
    if line and RANK == 0:
        print(line, flush=True)


def end(error: Exception, status: int) -> NoReturn:
    """Say in one line, once for all processes, why the command ends here."""
    if RANK == 0:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(status)
