"""The held-out problems of the demo's tasks, made on the spot.

* every problem is a prompt (`^347*6=`) and its answer with the digits reversed (`2802`)
* a problem belongs to the test split when the CRC-32 of its prompt says so, on every machine and without a seed;
  `training/demo/data.py` leaves the same problems out of the training data
"""

from itertools import product
from zlib import crc32

from datasets import Dataset, DatasetDict

SIGNS = {"products": "*", "sums": "+"}
OPERANDS = {"products": (range(100, 1000), range(2, 10)), "sums": (range(10, 100), range(10, 100))}


def held_out(skill: str, **_: object) -> DatasetDict:
    """All test problems of `skill` ("products" or "sums") as `{"test": rows of prompt and answer}`.

    The harness also hands in its model arguments and the task's version: they change nothing here.
    """
    rows = []
    for first, second in product(*OPERANDS[skill]):
        prompt = f"^{first}{SIGNS[skill]}{second}="
        if crc32(prompt.encode()) % 14 < 2:  # one in seven
            result = first * second if skill == "products" else first + second
            rows.append({"prompt": prompt, "answer": str(result)[::-1]})
    return DatasetDict({"test": Dataset.from_list(rows)})
