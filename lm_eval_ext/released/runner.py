"""Runs one program of a model, as a process of its own: `programs` starts it, nothing else should.

Reads [program, seconds, word] as JSON from standard input, and prints the word if the program ends within that time
without an exception or exit. What could do harm by accident is switched off first; this is no sandbox.
"""

import builtins
import faulthandler
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from typing import Any

_OFF = {
    builtins: "exit quit help",
    os: "kill killpg system putenv remove removedirs rmdir fchdir setuid fork forkpty rename renames truncate replace "
    "unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    shutil: "rmtree move chown",
    subprocess: "Popen",
}


class _Closed(io.StringIO):
    """A standard input that cannot be read."""

    def read(self, *_: Any) -> str:
        raise OSError("this program has no standard input")

    readline = readlines = read  # type: ignore[assignment]  # all of them raise


def _stop(*_: Any) -> None:
    raise TimeoutError


def main() -> None:
    """Read, run, print."""
    program, seconds, word = json.load(sys.stdin)
    output = os.fdopen(os.dup(1), "w")
    end = os._exit
    faulthandler.dump_traceback_later(seconds + 1, exit=True, file=open(os.devnull, "w"))  # if the alarm is caught
    sys.stdin, sys.stdout, sys.stderr = _Closed(), io.StringIO(), io.StringIO()
    os.environ["OMP_NUM_THREADS"] = "1"
    for module, names in _OFF.items():
        for name in names.split():
            setattr(module, name, None)
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        exec(program, {})
        signal.setitimer(signal.ITIMER_REAL, 0)
    except BaseException:
        word = ""
    output.write(word)
    output.flush()
    end(0)


if __name__ == "__main__":
    main()
