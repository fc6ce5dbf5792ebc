"""The data sets of the six benchmarks.

- `Rows`: problems of a benchmark, and the shots of each
- `load`: reads them, with `datasets`
- `rebuilt`: a row of instructhumaneval, from HumanEval's
"""

import functools
import re
from typing import Any

from lm_eval_ext.arguments import UsageError
from lm_eval_ext.released.benchmarks import BENCHMARKS, SHOTS, Row
from lm_eval_ext.released.options import SUBSTITUTE, SUBSTITUTE_SHOTS


class Rows:
    """All rows of a benchmark: `test` (a `datasets.Dataset`), and the shots of a row."""

    def __init__(self, name: str, test: Any, pool: Any, substitutes: list[int] | None = None):
        self.benchmark, self.test = BENCHMARKS[name], test
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


@functools.lru_cache(maxsize=len(BENCHMARKS))
def load(name: str, substitute: bool = False) -> Rows:
    """Rows of a benchmark; `UsageError` in one sentence if a data set or a split of it cannot be read."""
    benchmark = BENCHMARKS[name]
    if substitute and name == "humaneval":
        test = _read("openai/openai_humaneval", None)["test"].map(rebuilt)
        return Rows(name, test, test)
    splits = _read(benchmark.path, benchmark.config, hint=name in ("humaneval", "math"))
    if substitute and name == "math":
        return Rows(name, splits["test"], splits["test"], SUBSTITUTE_SHOTS)
    for split in ("test", benchmark.shots_from):
        if split not in splits:
            raise UsageError(
                f"data set {benchmark.path!r} has no split {split!r} here, which l2d_released_{name} takes rows from: "
                f"get the whole data set{_HINT if name == 'math' else ''}."
            )
    return Rows(name, splits["test"], splits[benchmark.shots_from])


_HINT = (
    f""", or give --metadata '{{"released_rows": "{SUBSTITUTE}"}}' for other rows in its place, see docs/released.md"""
)


def _read(path: str, config: str | None, hint: bool = False) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, config)
    except Exception as error:  # of `datasets`, the hub's client, pyarrow, the network
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"data set {path!r} cannot be read ({type(error).__name__}: {reason[:200]}): connect to a hub, or run "
            f"where there is a folder of that name{_HINT if hint else ''}."
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
