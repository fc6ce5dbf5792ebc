"""The two tasks of the study: rows, splits and tokenizers.

* `products`: a 4-digit times a 1-digit number, the answer's digits reversed, one token per character:
  `^3476*6=` -> `65802`; all 72,000 problems, split as the demo's are
* `machine`: a state and five operations, each a fixed permutation of the ten states; the answer is the last state:
  `^3cahbi=` -> `7`. The depth of a problem is the number of its operations before `i`, which does nothing
* a base of `machine` writes down every state: `^3cahbi=` -> `80577`. So it knows how to apply one operation, and its
  first token is the answer only at depth 1; the path is to apply all of them before the first token, on rows whose
  depth rises from two to five
* no prompt is in two splits: the CRC-32 of the prompt says which split it is in

A row is `{"prompt", "completion", "depth"}`; the end token is added by the tokenizer's users.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from training.demo.data import build_tokenizer, split_of

Row = dict[str, Any]

PARTS = ("base", "base_validation", "train", "validation", "test")
TEST_ROWS = 1024
VALIDATION_ROWS = 512

SHALLOW = 13  # one in so many held-out problems has depth two
STATES, OPERATIONS, IDLE = "0123456789", "abcdefgh", "i"
DEEPEST = 5
RISING = (0.35, 0.65)  # parts of the path's rows: until the first, depths up to two; from the second on, all


@dataclass(frozen=True)
class Task:
    """One task of the study.

    Attributes:
        name: also of its folder.
        title: for tables and figures.
        build: makes the rows of `PARTS` for a number of training rows.
        tokenizer: makes the tokenizer of its bases.
        width: tokens of the longest row, with the end token.
        base_target: accuracy on the base's own rows at which its training ends.
        base_steps: after which it ends with an error otherwise.
        steps: of a training.
        learning_rate, noise_std: of the path.
        train_rows: rows to train base and path on; all there are if fewer.
        ordered: whether training takes the rows in their order, which is one of rising depth.
    """

    name: str
    title: str
    build: Callable[[int], dict[str, list[Row]]]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    width: int
    base_target: float
    base_steps: int
    steps: int
    learning_rate: float
    noise_std: float
    train_rows: int
    ordered: bool


# ---- products ----------------------------------------------------------------------------------------------------


def product_rows(count: int) -> dict[str, list[Row]]:
    """The rows of every split, at most `count` for training; the base is trained on the same ones."""
    rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for first in range(1000, 10000):
        for second in range(2, 10):
            prompt = f"^{first}*{second}="
            row = {"prompt": prompt, "completion": str(first * second)[::-1], "depth": 0}
            rows[split_of(prompt)].append(row)
    for part in rows.values():
        random.Random(0).shuffle(part)
    rows["train"] = rows["train"][:count]
    rows = {**rows, "validation": rows["validation"][:VALIDATION_ROWS], "test": rows["test"][:TEST_ROWS]}
    return {"base": rows["train"], "base_validation": rows["validation"], **rows}


# ---- machine -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, dict[str, str]]:
    """Operation -> state -> next state; the same machine every time."""
    draw = random.Random(0)
    table = {operation: dict(zip(STATES, draw.sample(STATES, len(STATES)), strict=True)) for operation in OPERATIONS}
    return {**table, IDLE: {state: state for state in STATES}}


def machine_rows(count: int) -> dict[str, list[Row]]:
    """`count` rows for base and path each; validation and test rows from depth two on."""
    start, end = RISING

    def deepest(number: int) -> int:
        """Of the row with this number."""
        passed = max(0.0, (number / count - start) / (end - start))
        return min(DEEPEST, 2 + math.ceil(passed * (DEEPEST - 3) + 1e-9)) if passed else 2

    draw, table = random.Random(0), machine()
    rows = {
        "base": [_machine_row(table, "base", draw, draw.randint(1, DEEPEST)) for _ in range(count)],
        "train": [_machine_row(table, "train", draw, draw.randint(1, deepest(number))) for number in range(count)],
    }
    sizes = {"base_validation": VALIDATION_ROWS, "validation": VALIDATION_ROWS, "test": TEST_ROWS}
    return rows | {part: _held_out(table, part, draw, size) for part, size in sizes.items()}


def _held_out(table: dict[str, dict[str, str]], part: str, draw: random.Random, size: int) -> list[Row]:
    """Different problems, few of depth two, of which there are few, and equally many of every other depth."""
    shallow = size // SHALLOW
    rows: dict[str, Row] = {}
    while len(rows) < size:
        number = len(rows) - shallow
        row = _machine_row(table, part, draw, 2 if number < 0 else 3 + number % (DEEPEST - 2))
        rows[row["prompt"]] = row
    return list(rows.values())


def _machine_row(table: dict[str, dict[str, str]], part: str, draw: random.Random, depth: int) -> Row:
    """A random problem whose prompt belongs to the part's split; rows of a base hold every state."""
    split = {"base": "train", "base_validation": "validation"}.get(part, part)
    while True:
        state, operations = draw.choice(STATES), "".join(draw.choices(OPERATIONS, k=depth)).ljust(DEEPEST, IDLE)
        prompt = f"^{state}{operations}="
        if split_of(prompt) == split:
            break
    states = []
    for operation in operations:
        state = table[operation][state]
        states.append(state)
    return {"prompt": prompt, "completion": "".join(states if part.startswith("base") else states[-1:]), "depth": depth}


# ---- all ---------------------------------------------------------------------------------------------------------

TASKS = {
    "products": Task(
        name="products",
        title="4-digit x 1-digit products",
        build=product_rows,
        tokenizer=build_tokenizer,
        width=14,
        base_target=0.52,
        base_steps=4000,
        steps=2000,
        learning_rate=3.0e-3,
        noise_std=1.5,
        train_rows=60_000,
        ordered=False,
    ),
    "machine": Task(
        name="machine",
        title="last state of a machine after 2 to 5 operations",
        build=machine_rows,
        tokenizer=lambda: build_tokenizer(f"{STATES}={OPERATIONS}{IDLE}"),
        width=2 * DEEPEST + 4,
        base_target=0.97,
        base_steps=4000,
        steps=2400,
        learning_rate=6.0e-3,
        noise_std=0.5,
        train_rows=2400 * 128,
        ordered=True,
    ),
}


def write_rows(rows: dict[str, list[Row]], folder: Path) -> None:
    """Writes `<part>.jsonl` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
