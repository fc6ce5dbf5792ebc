"""Ends a process at a moment of its work that is the same on a fast and on a busy machine.

- `kill_while`: SIGKILL at a chosen function call while something is half done
- `main`: with the arguments `PATH CALL MODULE ARGUMENTS`, it is `python -m MODULE ARGUMENTS`, killed so
"""

import os
import re
import runpy
import signal
import sys


def kill_while(path: str, call: int) -> None:
    """SIGKILL this process between the moment that a path appears and the moment that it is renamed.

    Args:
        path: pattern of the last part of a folder that is made, or of a file that is opened to be written.
        call: at which function call of that time, Python's or C's, counted from 1 over all such times.
    """
    pattern, left = re.compile(f"(^|/){path}$"), call

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal left
        left -= event in ("call", "c_call")
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        if event not in ("os.mkdir", "os.rename", "open"):
            return
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and pattern.search(str(arguments[0])):
            sys.setprofile(None if event == "os.rename" else count)

    sys.addaudithook(watch)


def main() -> None:
    """Run a module as a command, and kill it."""
    path, call, module = sys.argv[1:4]
    kill_while(path, int(call))
    sys.argv = sys.argv[3:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
