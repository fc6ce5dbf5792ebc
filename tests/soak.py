"""A long run: train, evaluate and trace in a loop, and see that nothing grows and nothing is left behind.

    python -m tests.soak --minutes 30 [--tokenizer merges] [--json FILE]

Every round, in this process and on the CPU, with a base of the demo's size:

- trains a few steps with `training.train` and loads what was saved
- scores and generates with it in the harness, at budgets in turn
- traces a prompt and writes the page

Then it notes memory (resident set), open files, threads, child processes, and what lies in the folder for temporary
files. Memory is judged by the medians of the first and the last third of the rounds after warm-up: they may differ by
3 %. Exit status 1 if memory grew by more, or anything else did.

The base has the demo's tokenizer, one token per character. `--tokenizer merges` takes a byte-pair one, and is not flat:
tokenizers 0.23 keeps the words that a tokenizer has merged when the tokenizer itself is gone, and a round loads three.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 0.2  # share of the time that is not judged
MOST_GROWTH = 0.03
COUNTED = ("open files", "threads", "children", "temporary files")


def measure() -> dict[str, float]:
    """What this process holds: megabytes resident, and counts."""
    import psutil

    gc.collect()
    process = psutil.Process()
    return {
        "megabytes": process.memory_info().rss / 2**20,
        "open files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
    }


def make_base(folder: Path, tokenizer: str) -> None:
    """A random base of the demo's shape. Its tokenizer has one token per character, as the demo's, or merges."""
    from tests.conftest import train_tokenizer
    from training.demo.base import build_base
    from training.demo.data import build_tokenizer

    characters = "".join(sorted(set(string.printable) - set("_^$?")))
    made = build_tokenizer(characters) if tokenizer == "characters" else train_tokenizer()
    made.model_max_length = 4096
    build_base(made).save_pretrained(folder)
    made.save_pretrained(folder)


def prepare(work: Path, tokenizer: str = "characters") -> Callable[[int], None]:
    """Make the base and its data, and return what is done in a round."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from l2d.__main__ import main as l2d
    from lm_eval_ext.model import L2DLM
    from tests.integration.harness import TASKS
    from tests.training_runs import SMALL, sums, write_jsonl, write_recipe
    from training.train import main as train

    make_base(work / "base", tokenizer)
    data = write_jsonl(work / "data.jsonl", sums(60))
    settings = {**SMALL, "base": work / "base", "dataset": data, "eval_holdout": 10, "eval_strategy": "steps"}
    settings |= {
        "max_steps": 8,
        "eval_steps": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "overwrite_output_dir": True,
    }
    recipe = write_recipe(work / "recipe.yaml", output_dir=work / "l2d", report_to="none", **settings)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)

    def turn(number: int) -> None:
        train(["--config", str(recipe), "--seed", str(number)])
        model = L2DLM(pretrained=str(work / "l2d"), diffusion_budget=(3, 7, 15)[number % 3], device="cpu", batch_size=8)
        tasks = ["l2d_test_choice", "l2d_test_generate"]
        lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, limit=6, gen_kwargs="max_gen_toks=8")
        prompt = ["--prompt", f"Question: {number}?", "--max-new-tokens", "6"]
        l2d(["trace", str(work / "l2d"), *prompt, "--out", str(work / "trace.html")])

    return turn


def soak(minutes: float, work: Path, tokenizer: str) -> list[dict[str, float]]:
    """Do rounds for `minutes`, and return what was measured after each, with the seconds since the start."""
    with quiet():
        turn = prepare(work, tokenizer)
    start, rounds = time.monotonic(), []
    while time.monotonic() < start + 60 * minutes or len(rounds) < 6:
        with quiet():
            turn(len(rounds))
        rounds.append({"seconds": time.monotonic() - start, **measure()})
        if len(rounds) % 10 == 1:
            print(row(len(rounds), rounds[-1]), flush=True)
    return rounds


@contextlib.contextmanager
def quiet():
    """What the commands say is kept back, unless they fail."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException:
        print(said.getvalue()[-4000:], file=sys.stderr)
        raise


def row(number: int, round_: dict[str, float]) -> str:
    """A line of the table."""
    counts = "".join(f"{round_[name]:>17}" for name in COUNTED)
    return f"{number:>6}{round_['seconds']:>9.0f}{round_['megabytes']:>11.1f}{counts}"


def judge(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Growth of memory from the first to the last third after warm-up, and what was left behind since then."""
    end = rounds[-1]["seconds"]
    judged = [r for r in rounds if r["seconds"] >= WARM_UP * end]
    third = max(1, len(judged) // 3)
    first, last = (statistics.median(r["megabytes"] for r in part) for part in (judged[:third], judged[-third:]))
    left = {name: max(0, rounds[-1][name] - judged[0][name]) for name in COUNTED}
    growth = last / first - 1
    return {
        "rounds": len(rounds),
        "minutes": round(end / 60, 1),
        "megabytes_first_third": round(first, 1),
        "megabytes_last_third": round(last, 1),
        "growth": round(growth, 4),
        "left_behind": left,
        "flat": abs(growth) <= MOST_GROWTH and not any(left.values()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Train, evaluate and trace in a loop")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--tokenizer", choices=("characters", "merges"), default="characters")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(work / "cache"), CUDA_VISIBLE_DEVICES="")
    (work / "tmp").mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(work / "tmp")  # nobody else's
    print(f" round  seconds  megabytes{''.join(f'{name:>17}' for name in COUNTED)}")
    try:
        rounds = soak(given.minutes, work, given.tokenizer)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    verdict = judge(rounds)
    print(row(len(rounds), rounds[-1]))
    left = ", ".join(f"{count:g} {name}" for name, count in verdict["left_behind"].items() if count) or "nothing"
    print(
        f"{verdict['rounds']} rounds in {verdict['minutes']} minutes: memory {verdict['growth']:+.2%} "
        f"({verdict['megabytes_first_third']} to {verdict['megabytes_last_third']} MB), left behind: {left}: "
        f"{'flat' if verdict['flat'] else 'NOT flat'}"
    )
    if given.json:
        given.json.write_text(json.dumps({**verdict, "measured": rounds}, indent=1) + "\n")
    sys.exit(0 if verdict["flat"] else 1)


if __name__ == "__main__":
    main()
