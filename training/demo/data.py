"""The demo's data: two skills of arithmetic, one character per token.

* products of a 3-digit and a 1-digit number and sums of two 2-digit numbers, answers with their digits reversed:
  `^347*6=` -> `2802`, `^58+67=` -> `521`
* a split by the CRC-32 of the prompt into train, validation and test, the same on every machine;
  `lm_eval_ext/tasks/demo/problems.py` makes the same test problems for the harness
* JSONL files of `{"prompt", "completion"}` rows
* a character tokenizer as `PreTrainedTokenizerFast`
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SKILLS = ("products", "sums")
SPLITS = ("train", "validation", "test")
SEED = 0

_OPERANDS = {"products": (range(100, 1000), range(2, 10)), "sums": (range(10, 100), range(10, 100))}
_BUCKETS = 14  # 0 and 1 are the test split, 2 is the validation split
_SPECIAL_TOKENS = ("_", "^", "$", "?")  # padding, start, end, unknown character


def problem(skill: str, first: int, second: int) -> dict[str, str]:
    """The `{"prompt", "completion"}` row of one problem; the end token is added by the tokenizer's users."""
    sign, result = ("*", first * second) if skill == "products" else ("+", first + second)
    return {"prompt": f"^{first}{sign}{second}=", "completion": str(result)[::-1]}


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to: 1/7 of all problems are test problems, 1/14 are for validation."""
    bucket = crc32(prompt.encode()) % _BUCKETS
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def problems(skill: str) -> Iterator[dict[str, str]]:
    """All problems of a skill, in order: 7,200 products or 8,100 sums."""
    firsts, seconds = _OPERANDS[skill]
    return (problem(skill, first, second) for first in firsts for second in seconds)


def build_splits(skill: str) -> dict[str, list[dict[str, str]]]:
    """The rows of every split, the training rows shuffled (fixed seed)."""
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for row in problems(skill):
        rows[split_of(row["prompt"])].append(row)
    random.Random(SEED).shuffle(rows["train"])
    return rows


def build_tokenizer(characters: str = "0123456789+*=") -> PreTrainedTokenizerFast:
    """One token per character; adds no special tokens by itself, since `^` is written in the prompts."""
    vocabulary = {character: number for number, character in enumerate([*_SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="_",
        bos_token="^",
        eos_token="$",
        unk_token="?",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def write_data(folder: Path) -> dict[str, int]:
    """Writes `<skill>_<split>.jsonl` into `folder`; returns the number of rows per file."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for skill in SKILLS:
        for split, rows in build_splits(skill).items():
            path = folder / f"{skill}_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            counts[path.name] = len(rows)
    return counts


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":  # python -m training.demo.data OUT
    for name, count in write_data(Path(sys.argv[1])).items():
        print(f"{name}: {count:,} problems")
