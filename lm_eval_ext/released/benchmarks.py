"""The six benchmarks as the release puts them to a model.

- `BENCHMARKS`: by name, where rows come from and how a row becomes a question, an answer and a reference
- `messages`: the conversation of a row and its shots
- `is_shot`: whether a row is one of its own shots, which the release skips

All functions take rows with all their columns. No text is stripped.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

MATH_SUBJECTS = (
    "abstract_algebra",
    "college_mathematics",
    "elementary_mathematics",
    "high_school_mathematics",
    "high_school_statistics",
)
CODING_SUBJECTS = ("high_school_computer_science",)
SHOTS = 5
MAX_TOKENS = 2048
"""Tokens that a prompt and its reference may have together."""
KS = (1, 5, 10)
"""The k of pass@k."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        path, config: the data set.
        shots_from: split of the shots; `shot_rows` its rows, or `None` for the first of the question's `subject`.
        question: text of the user's turn. answer: text of the assistant's turn of a shot.
        reference: text that counts in the length filter and that a completion is compared with.
        guidance: guidance class of a row when guidance is on, `None` for no guidance.
        letters: letters of a row's options, where it has any.
        subject: column by which shots are chosen.
        opening: text with which the answer's turn is left open, in place of a generation prompt.
        identity: text by which the release recognizes a shot among the problems.
        code: whether completions are run.
    """

    path: str
    config: str | None
    shots_from: str
    question: Callable[[Row], str]
    answer: Callable[[Row], str]
    reference: Callable[[Row], str]
    guidance: Callable[[Row], str | None]
    letters: Callable[[Row], str] | None = None
    subject: str | None = None
    opening: Callable[[Row], str] | None = None
    identity: Callable[[Row], str] | None = None
    code: bool = False

    def shot_rows(self, rows: int) -> list[int] | None:
        """Rows of the split of `rows` rows that are the shots, or `None` where they depend on the question's subject.

        MATH, whose rows are ordered by subject, takes them at equal distances; all others take the first.
        """
        if self.subject is not None:
            return None
        step = rows // SHOTS if self.path.endswith("MATH-lighteval") else 1
        return [number * step for number in range(SHOTS)]


def messages(benchmark: Benchmark, row: Row, shots: Sequence[Row]) -> list[dict[str, str]]:
    """The conversation: a user and an assistant turn per shot, the question, and the opened answer if there is one."""
    turns = []
    for shot in shots:
        turns += [_turn("user", benchmark.question(shot)), _turn("assistant", benchmark.answer(shot))]
    turns.append(_turn("user", benchmark.question(row)))
    if benchmark.opening is not None:
        turns.append(_turn("assistant", benchmark.opening(row)))
    return turns


def is_shot(benchmark: Benchmark, row: Row, shots: Sequence[Row]) -> bool:
    """Whether the release skips `row`, since its text equals a shot's."""
    identity = benchmark.identity
    return identity is not None and identity(row) in [identity(shot) for shot in shots]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _choices(question: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {option}\n" for letter, option in zip(_alphabet(options), options, strict=True)]
    return f"Question:\n{question}\nChoices:\n{''.join(lines)}"


def _alphabet(options: Sequence[str]) -> str:
    return "".join(chr(ord("A") + number) for number in range(len(options)))


def mmlu_class(subject: str) -> str:
    """Guidance class of a subject of MMLU, such as `abstract_algebra`."""
    return "math" if subject in MATH_SUBJECTS else "coding" if subject in CODING_SUBJECTS else "general_qa"


def _mbpp_question(row: Row) -> str:
    return f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n'


def _mmlu_letter(row: Row) -> str:
    return _alphabet(row["choices"])[row["answer"]]


def _mmlu_pro_letter(row: Row) -> str:
    return _alphabet(row["options"])[row["answer_index"]]


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        path="openai/gsm8k",
        config="main",
        shots_from="train",
        question=lambda row: row["question"],
        answer=lambda row: row["answer"],
        reference=lambda row: row["answer"],
        guidance=lambda row: "math",
    ),
    "math": Benchmark(
        path="DigitalLearningGmbH/MATH-lighteval",  # `lighteval/MATH`, which the release names, was withdrawn
        config=None,
        shots_from="train",
        question=lambda row: row["problem"],
        answer=lambda row: row["solution"],
        reference=lambda row: row["solution"],
        guidance=lambda row: "math",
    ),
    "mmlu": Benchmark(
        path="cais/mmlu",
        config="all",
        shots_from="dev",
        question=lambda row: f"{_choices(row['question'], row['choices'])}\nAnswer:",
        answer=_mmlu_letter,
        reference=_mmlu_letter,
        guidance=lambda row: mmlu_class(row["subject"]),
        letters=lambda row: _alphabet(row["choices"]),
        subject="subject",
    ),
    "mmlu_pro": Benchmark(
        path="TIGER-Lab/MMLU-Pro",
        config=None,
        shots_from="validation",
        question=lambda row: _choices(row["question"], row["options"]),
        answer=_mmlu_pro_letter,
        reference=_mmlu_pro_letter,
        guidance=lambda row: "math" if row["category"] == "math" else "general_qa",
        letters=lambda row: _alphabet(row["options"]),
        subject="category",
    ),
    "humaneval": Benchmark(
        path="codeparrot/instructhumaneval",
        config=None,
        shots_from="test",
        question=lambda row: row["instruction"],
        answer=lambda row: row["context"] + row["canonical_solution"],
        reference=lambda row: row["canonical_solution"],
        guidance=lambda row: None,
        opening=lambda row: row["context"],
        identity=lambda row: row["prompt"],
        code=True,
    ),
    "humaneval_openai": Benchmark(
        path="openai/openai_humaneval",
        config=None,
        shots_from="test",
        question=lambda row: row["prompt"],
        answer=lambda row: row["canonical_solution"],
        reference=lambda row: row["canonical_solution"],
        guidance=lambda row: None,
        identity=lambda row: row["prompt"],
        code=True,
    ),
    "mbpp": Benchmark(
        path="google-research-datasets/mbpp",
        config="full",
        shots_from="prompt",
        question=_mbpp_question,
        answer=lambda row: row["code"],
        reference=lambda row: row["code"],
        guidance=lambda row: "coding",
        identity=_mbpp_question,
        code=True,
    ),
}
"""All benchmarks by name. `humaneval_openai` is a variant that the release has and does not use."""
