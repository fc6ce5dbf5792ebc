"""The data sets of the six benchmarks.

- `Rows`: problems of a benchmark, and the shots of each
- `load`: reads them, with `datasets`; where a local copy lacks some, substitutes, with a warning
- `rebuilt`: a row of instructhumaneval, from HumanEval's
"""

import functools
import re
from pathlib import Path
from typing import Any

from lm_eval_ext.arguments import UsageError
from lm_eval_ext.released.benchmarks import BENCHMARKS, SHOTS, Row
from lm_eval_ext.released.options import SUBSTITUTE, SUBSTITUTE_SHOTS


class Rows:
    """All rows of a benchmark: `test` (a `datasets.Dataset`), the shots of a row, whether some are `substituted`."""

    def __init__(
        self, name: str, test: Any, pool: Any, substitutes: list[int] | None = None, substituted: bool = False
    ):
        self.benchmark, self.test, self.substituted = BENCHMARKS[name], test, substituted
        self.shot_numbers = substitutes or self.benchmark.shot_rows(len(pool))
        self._left_out = set(substitutes or ())
        self._shots: dict[str | None, list[Row]] = {}
        if self.shot_numbers is not None:
            self._shots[None] = [pool[number] for number in self.shot_numbers]
        for row in pool if self.benchmark.subject else ():
            of_subject = self._shots.setdefault(row[self.benchmark.subject], [])
            if len(of_subject) < SHOTS:
                of_subject.append(row)

    def shots(self, row: Row) -> list[Row]:
        """The shots of `row`: its subject's where the benchmark has subjects."""
        return self._shots[row[self.benchmark.subject] if self.benchmark.subject else None]

    def is_left_out(self, number: int) -> bool:
        """Whether row `number` of the test split is a shot in place of the training split's."""
        return number in self._left_out


@functools.lru_cache(maxsize=2 * len(BENCHMARKS))
def load(name: str, source: str | None = None) -> Rows:
    """Rows of a benchmark; `source` is that of `row_source`.

    Raises `UsageError` in one sentence if a data set or a split of it cannot be read.
    """
    benchmark = BENCHMARKS[name]
    if source == SUBSTITUTE or (source is None and _lacks(name)):
        if name == "humaneval":
            test = _read("openai/openai_humaneval", None)["test"].map(rebuilt)
            return Rows(name, test, test, substituted=True)
        if name == "math":
            test = _read(benchmark.path, benchmark.config)["test"]
            return Rows(name, test, test, SUBSTITUTE_SHOTS, substituted=True)
    splits = _read(benchmark.path, benchmark.config)
    for split in ("test", benchmark.shots_from):
        if split not in splits:
            raise UsageError(
                f"data set {benchmark.path!r} has no split {split!r} here, which l2d_released_{name} takes rows from: "
                "get the whole data set."
            )
    return Rows(name, splits["test"], splits[benchmark.shots_from])


def _lacks(name: str) -> bool:
    """Whether the current directory holds a copy of the data that lacks released rows, and substitutes for them."""
    benchmark = BENCHMARKS[name]
    if name == "humaneval":
        return not Path(benchmark.path).is_dir() and Path("openai/openai_humaneval").is_dir()
    return name == "math" and Path(benchmark.path).is_dir() and "train" not in _read(benchmark.path, benchmark.config)


def _read(path: str, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, config)
    except Exception as error:  # of `datasets`, the hub's client, pyarrow, the network
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"data set {path!r} cannot be read ({type(error).__name__}: {reason[:200]}): connect to a hub, or run "
            "where there is a folder of that name."
        ) from error


def rebuilt(row: Row) -> Row:
    """A row of HumanEval with the columns of instructhumaneval, as its data set card describes them."""
    start = row["prompt"].rindex(f"def {row['entry_point']}(")
    head, _, body = row["prompt"][start:].partition("\n")
    text = re.search(r'("""|\'\'\')(.*?)(\1|\Z)', body, re.DOTALL)
    lines = (line.strip() for line in (text[2] if text else "").splitlines())
    docstring = "\n".join(line for line in lines if line)
    signature = head.strip().removeprefix("def ").removesuffix(":")
    return {
        **row,
        "signature": signature,
        "docstring": docstring,
        "context": row["prompt"][:start] + head,
        "instruction": f"Write a function {signature} to solve the following problem:\n{docstring}",
    }
