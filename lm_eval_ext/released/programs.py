"""Code benchmarks: the program of a completion, how it is run, and pass@k.

- `assemble`: the text that is executed
- `passes`: whether programs end by themselves, each in a process of its own
- `pass_at_k`: of n samples of which c pass; `pass_rates`: its means over problems

Programs are the model's: run them where they can do no harm. What `runner` switches off only prevents accidents.
"""

import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lm_eval_ext.released.benchmarks import KS, Row

SECONDS = 3.0
"""Time that a program may take."""
_GRACE = 60.0  # for the interpreter's start on a busy machine

_RUNNER = Path(__file__).with_name("runner.py")


def assemble(name: str, row: Row, completion: str) -> str:
    """The program of a `completion` with the row's tests: nothing of it is cut, no fence removed."""
    if name == "mbpp":
        return "\n".join([completion, *row["test_list"]])
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})"


def passes(programs: Sequence[str], seconds: float = SECONDS) -> list[bool]:
    """Whether each program ends within `seconds` without an exception or exit."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(functools.partial(_passes, seconds=seconds), programs))


def _passes(program: str, seconds: float) -> bool:
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(json.dumps([program, seconds, word]), timeout=seconds + _GRACE)
        except (subprocess.TimeoutExpired, OSError):
            printed = ""
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # threads and children of the program, too
            except ProcessLookupError:
                pass
            process.wait()
    return printed == word


def pass_at_k(samples: int, passing: int, k: int) -> float:
    """Probability that one of `k` of the samples passes: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(samples - passing, k) / math.comb(samples, k)


def pass_rates(problems: Sequence[tuple[int, int]]) -> dict[str, float]:
    """pass@k, the mean over problems of (samples, passing), for each k that no problem has fewer samples than."""
    return {
        f"pass@{k}": sum(pass_at_k(samples, passing, k) for samples, passing in problems) / len(problems)
        for k in KS
        if all(samples >= k for samples, _ in problems)
    }
