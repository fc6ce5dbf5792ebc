"""The two tasks of the study: rows, splits and tokenizers.

* `products`: a 4-digit times a 1-digit number, the answer's digits reversed, one token per character:
  `^3476*6=` -> `65802`; all 72,000 problems, split as the demo's are
* `chains`: three chains of six nodes are listed as pairs of a node and the next one, all in random order, then a node;
  the answer is the end of its chain: `ab fg bb ca ... c` -> `b`. The last node is its own next. Each pair is one token;
  the depth of a problem is the number of steps from the node to the end: one pass through two layers takes few of them
* a base of `chains` writes down every step: `c` -> `a b`. So it knows how to take one, and its first token is the end
  only at depth 1; the path is to take all of them before the first token, on rows whose depth rises from two to five
* no prompt is in two splits: the CRC-32 of the prompt says which split it is in

A row is `{"prompt", "completion", "depth"}`; the end token is added by the tokenizer's users.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training.demo.data import build_tokenizer, split_of

Row = dict[str, Any]

PARTS = ("base", "base_validation", "train", "validation", "test")
TEST_ROWS = 1024
VALIDATION_ROWS = 512

CHAINS, LENGTH = 3, 6
NODES = "abcdefghijklmnopqrstuvwxyz"[: CHAINS * LENGTH]
DEEPEST = LENGTH - 1
RISING = (0.3, 0.6)  # part of the path's rows after which they become deeper than two, and after which all depths occur
_SPECIAL_TOKENS = ("_", "^", "$", "?")  # padding, start, end, unknown word


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
        noise_std: of the path.
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


# ---- chains ------------------------------------------------------------------------------------------------------


def chain_rows(count: int) -> dict[str, list[Row]]:
    """`count` rows for base and path each; equally many validation and test rows of every depth."""

    start, end = RISING

    def deepest(number: int) -> int:
        """Of the row with this number."""
        passed = max(0.0, (number / count - start) / (end - start))
        return min(DEEPEST, 2 + math.ceil(passed * (DEEPEST - 3) + 1e-9)) if passed else 2

    draw = random.Random(0)
    depths = {
        "base": [draw.randint(1, DEEPEST) for _ in range(count)],
        "train": [draw.randint(1, deepest(number)) for number in range(count)],
        **{
            part: [1 + number % DEEPEST for number in range(rows // DEEPEST * DEEPEST)]
            for part, rows in (
                ("base_validation", VALIDATION_ROWS),
                ("validation", VALIDATION_ROWS),
                ("test", TEST_ROWS),
            )
        },
    }
    return {part: list(_chains(part, wanted)) for part, wanted in depths.items()}


def _chains(part: str, depths: list[int]) -> Iterator[Row]:
    """New chains per depth, whose prompt belongs to the split; rows of a base hold every step."""
    split = {"base": "train", "base_validation": "validation"}.get(part, part)
    draw = random.Random(part)
    for depth in depths:
        row = chain_problem(draw, depth)
        while split_of(row["prompt"]) != split:
            row = chain_problem(draw, depth)
        if part.startswith("base"):
            row["completion"] = row["steps"]
        del row["steps"]
        yield row


def chain_problem(draw: random.Random, depth: int) -> Row:
    """Random chains of all nodes, and a node that is `depth` steps from the end of its own; with the steps taken."""
    nodes = draw.sample(NODES, len(NODES))
    chains = [nodes[start : start + LENGTH] for start in range(0, len(nodes), LENGTH)]
    pairs = [
        node + following for chain in chains for node, following in zip(chain, chain[1:] + chain[-1:], strict=True)
    ]
    draw.shuffle(pairs)
    walk = chains[0][-1 - depth :]
    return {
        "prompt": " ".join([*pairs, walk[0]]),
        "completion": f" {walk[-1]}",
        "depth": depth,
        "steps": "".join(f" {node}" for node in walk[1:]),
    }


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: a node, or a pair of nodes."""
    words = [*_SPECIAL_TOKENS, *NODES, *(node + following for node in NODES for following in NODES)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="_",
        bos_token="^",
        eos_token="$",
        unk_token="?",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


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
        noise_std=1.5,
        train_rows=60_000,
        ordered=False,
    ),
    "chains": Task(
        name="chains",
        title="end of a chain, 1 to 5 steps away",
        build=chain_rows,
        tokenizer=chain_tokenizer,
        width=len(NODES) + LENGTH + 1,
        base_target=0.97,
        base_steps=4000,
        noise_std=1.5,
        train_rows=256_000,
        ordered=True,
    ),
}


def write_rows(rows: dict[str, list[Row]], folder: Path) -> None:
    """Writes `<part>.jsonl` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{part}.jsonl").write_text(text, encoding="utf-8")
