"""Runs the steps of the demo, or of another plan.

* `Step`: one command, with the output that it leaves and the steps that must come before it
* `run_steps`: some at a time, one thread each; output to log files, progress and times to the terminal; a step that
  fails ends the run with the last lines of its log, and so does a time limit, with SIGTERM to what still runs
* `run_or_exit`: the same for a command, which ends with a message
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.demo.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.1
NEWS_SECONDS = 20.0  # between lines of progress where the output is not a terminal
LAST_LINES = 20


class StepFailed(RuntimeError):
    """A step's command failed; the message holds the end of its log."""


class OutOfTime(RuntimeError):
    """The time that the run was given is over; the message says what was ended."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: shown, and the name of its log file.
        command: program and arguments.
        output: file or folder that it leaves; removed before the command starts.
        needs: names of the steps that must be complete before.
        threads: threads that it may use; a step with two has the machine to itself.
        result: reads one line worth showing from the complete step.
        kind: of a step that begins anew when it is ended: with a time limit it is only begun where the longest complete
            one of its kind would fit. Steps without a kind continue where they were ended.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    threads: int = 1
    result: Callable[[], str] | None = None
    kind: str | None = None


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    log: Path
    started: float


def run_steps(
    steps: list[Step],
    workspace: Workspace,
    environment: dict[str, str],
    cwd: Path,
    slots: int = 2,
    until: float | None = None,
) -> None:
    """Run all steps that are not complete, in the order given as far as `needs` and `slots` allow.

    Args:
        until: time of `time.monotonic` at which running steps get SIGTERM, on which a training saves itself.

    Raises `StepFailed` or, when the time is over before all is done, `OutOfTime`, after ending all running steps.
    """
    screen = _Screen()
    waiting = [step for step in steps if not workspace.complete(step.name, step.output)]
    if done := len(steps) - len(waiting):
        screen.line(f"{done} of {len(steps)} steps were complete already")
    complete = {step.name for step in steps} - {step.name for step in waiting}
    total = len(steps)
    running: list[_Running] = []
    (workspace.folder / "logs").mkdir(exist_ok=True)
    try:
        while waiting or running:
            for step in list(waiting):
                busy = sum(one.step.threads for one in running)
                fits = until is None or time.monotonic() + _expected(step, steps, workspace) < until
                if complete.issuperset(step.needs) and busy + step.threads <= slots and fits:
                    waiting.remove(step)
                    running.append(_start(step, workspace, environment, cwd))
            if until is not None and (time.monotonic() >= until or not running):
                ended = ", ".join(one.step.name for one in running) or "nothing"
                raise OutOfTime(f"the time is over with {len(complete)} of {total} steps complete; ended: {ended}")
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                seconds = _end(one)
                workspace.record(one.step.name, seconds)
                complete.add(one.step.name)
                result = f": {one.step.result()}" if one.step.result else ""
                screen.line(f"[{len(complete):2d}/{total}] {one.step.name}, {seconds:.0f} s{result}")
            screen.status(lambda: "   ".join(_progress(one) for one in running))
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()


def _expected(step: Step, steps: list[Step], workspace: Workspace) -> float:
    """Seconds of the longest complete step of its kind; 0 where nothing is known."""
    alike = (one.name for one in steps if step.kind is not None and one.kind == step.kind)
    return max((workspace.seconds[name] for name in alike if name in workspace.seconds), default=0.0)


def environment(out: Path) -> dict[str, str]:
    """Environment of every step: offline, on the CPU, with caches in the folder of the run."""
    fixed = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(out / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return {**os.environ, **fixed}


def run_or_exit(steps: list[Step], workspace: Workspace, slots: int = 2, until: float | None = None) -> None:
    """Run all steps; a failed or interrupted one ends the process with a message and exit status 1 or 130.

    Raises `OutOfTime` where a time limit is given, see `run_steps`.
    """
    try:
        run_steps(steps, workspace, environment(workspace.folder), ROOT, slots, until)
    except StepFailed as error:
        print("error:", error, file=sys.stderr)
        print("the same command continues from here", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from here", file=sys.stderr)
        sys.exit(130)


def _start(step: Step, workspace: Workspace, environment: dict[str, str], cwd: Path) -> _Running:
    if step.output.is_dir():
        shutil.rmtree(step.output)
    step.output.unlink(missing_ok=True)
    log = workspace.folder / "logs" / f"{step.name.replace(' ', '_')}.log"
    environment = {**environment, "OMP_NUM_THREADS": str(step.threads), "MKL_NUM_THREADS": str(step.threads)}
    with log.open("w", encoding="utf-8") as file:
        print("$", *step.command, file=file, flush=True)
        process = subprocess.Popen(
            step.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=environment,
            pass_fds=(workspace.lock.fileno(),),  # a step that outlives us keeps the folder locked
        )
    return _Running(step, process, log, time.monotonic())


def _end(one: _Running) -> float:
    if one.process.returncode != 0 or not one.step.output.exists():
        lines = one.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        ending = "\n".join("    " + line for line in lines[-LAST_LINES:])
        status = f"exit status {one.process.returncode}"
        raise StepFailed(f"{one.step.name} failed ({status}); the end of {one.log}:\n{ending}")
    return time.monotonic() - one.started


def _progress(one: _Running) -> str:
    """Name, seconds so far, and the last `n/total` of the step's progress bar."""
    with one.log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
        ending = file.read().decode("utf-8", errors="replace")
    bars = re.findall(r"\| (\d+/\d+) \[", ending)
    return f"{one.step.name} {bars[-1] + ', ' if bars else ''}{time.monotonic() - one.started:.0f} s"


class _Screen:
    """Lines that stay, and on a terminal one line of progress below them."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.last = time.monotonic()

    def line(self, text: str) -> None:
        print("\r\x1b[K" * self.live + text, flush=True)
        self.last = time.monotonic()

    def status(self, text: Callable[[], str]) -> None:
        now = time.monotonic()
        if now - self.last < (0.5 if self.live else NEWS_SECONDS):
            return
        self.last = now
        if self.live:
            width = shutil.get_terminal_size().columns
            print("\r\x1b[K" + text()[: width - 1], end="", flush=True)
        else:
            print("        " + text(), flush=True)
