"""Starts our commands quickly: one process imports the libraries, and forks for every command.

- `Nursery`: `start(module, arguments)` -> `Command`, which can be killed and waited for
- `KillTimes`: kills at moments of the clock, a bounded number of times
- run as a module it is the process itself, which reads one JSON line per command

A command is `module.main(arguments)` in a process of its own, as `python -m module arguments` would run it.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.faults.kills import kill_while


@dataclasses.dataclass
class Command:
    """A running command; `text` is what it said."""

    nursery: "Nursery"
    pid: int
    log: Path

    def poll(self) -> int | None:
        """Exit status, negative for a signal; `None` while it runs."""
        return self.nursery.status(self.pid)

    def wait(self, seconds: float = 600) -> int:
        """Exit status."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"not ended within {seconds} s: {self.text[-2000:]}")
            time.sleep(0.002)
        return status

    def kill(self) -> int:
        """SIGKILL, unless it has ended; the exit status."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    @property
    def text(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text(errors="replace")


class KillTimes:
    """Kills commands at any moment of the time that an undisturbed one took, by the clock.

    One that ends by itself before was not killed: on a faster machine the moments come sooner, but never
    all within the first quarter, and after `tries` commands the test fails instead of going on for ever.
    """

    def __init__(self, seconds: float, chance: random.Random, tries: int):
        self.seconds, self.shortest, self.chance, self.tries, self.left = seconds, seconds / 4, chance, tries, tries

    def kill(self, command: Command) -> int:
        """SIGKILL, unless the command ends before; its exit status."""
        if not self.left:
            raise AssertionError(f"{self.tries} commands were not enough: too many ended before they could be killed.")
        self.left -= 1
        stop = time.monotonic() + self.chance.random() * self.seconds
        while time.monotonic() < stop and command.poll() is None:
            time.sleep(0.002)
        status = command.kill()
        if status != -signal.SIGKILL:
            self.seconds = max(self.shortest, 0.8 * self.seconds)
        return status


class Nursery:
    """Use as a context manager.

    Args:
        folder: for what commands say; modules: imported once, before any command; prepare: code that runs after that.
    """

    def __init__(self, folder: Path, modules: list[str], prepare: str = ""):
        self.folder, self.modules, self.prepare, self.count = folder, modules, prepare, 0

    def __enter__(self) -> "Nursery":
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.faults.nursery", self.prepare, *self.modules]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=300)
        self.process.stdout.close()

    def ask(self, **question: object) -> object:
        """Ask the process, and return its answer."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        module: str,
        *arguments: object,
        largest: int | None = None,
        kill: tuple[str, int] | None = None,
        cwd: Path = REPOSITORY,
    ) -> Command:
        """Start a command.

        Args:
            largest: no file that it writes may become larger, in bytes; kill: what `kill_while` is told.
        """
        self.count += 1
        log = self.folder / f"command-{self.count}.txt"
        words = [str(argument) for argument in arguments]
        pid = self.ask(module=module, arguments=words, log=str(log), largest=largest, kill=kill, cwd=str(cwd))
        return Command(self, pid, log)

    def run(self, module: str, *arguments: object, **options: object) -> Command:
        """Run a command to its end."""
        command = self.start(module, *arguments, **options)
        command.returncode = command.wait()
        return command

    def status(self, pid: int) -> int | None:
        """Exit status of a command."""
        return self.ask(status=pid)


# ---- the process -----------------------------------------------------------------------------------------------------


def _child(question: dict, log: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(question["cwd"])
    if question["largest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (question["largest"], question["largest"]))
    if question["kill"] is not None:
        kill_while(*question["kill"])
    sys.argv = [question["module"], *question["arguments"]]
    raise SystemExit(importlib.import_module(question["module"]).main(question["arguments"]))


def _main() -> None:
    """Read questions until there are no more."""
    exec(sys.argv[1], {})  # a test's own text
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is imported is not looked at again in every command
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ended: dict[int, int] = {}
    writers: dict[int, subprocess.Popen] = {}
    for line in iter(sys.stdin.readline, ""):
        question = json.loads(line)
        if "status" in question:
            pid = question["status"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    writers.pop(pid).wait()
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(pid)
        else:  # what is said goes through a pipe: a limit on the size of files is not for it
            with open(question["log"], "wb") as file:
                writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
            if not (answer := os.fork()):
                _child(question, writer.stdin.fileno())
            writer.stdin.close()
            writers[answer] = writer
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _main()
