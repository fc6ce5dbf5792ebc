"""The paper's protocol: prompts, answer extraction and scores of the `l2d_paper` tasks.

- `competition_math`: MATH's seven subjects as one data set
- `SubjectTask`, `SameSubject`: few-shot examples from the question's own subject (MMLU) or category (MMLU-Pro)
- `function_examples`: worked examples in HumanEval's format, which has no training split
- `score_*`: answer extraction and metric per document; code runs through the `code_eval` metric

Source: Cetin et al., 2025: 5 examples, chat template (`--apply_chat_template --fewshot_as_multiturn`), generated
answers, sampling at temperature 1, pass@1 and pass@10 for code. Wording and extraction are this project's own.
"""

import re
import textwrap
from typing import Any

from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

LETTERS = "ABCDEFGHIJKLMNOP"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


# ---- data and prompts ------------------------------------------------------------------------------------------------


def competition_math(**_: object) -> Any:
    """All subjects of MATH, training and test split."""
    from datasets import DatasetDict, concatenate_datasets, load_dataset

    parts = [load_dataset("EleutherAI/hendrycks_math", subject) for subject in SUBJECTS]
    return DatasetDict({split: concatenate_datasets([part[split] for part in parts]) for split in ("train", "test")})


class SameSubject(ContextSampler):
    """The first examples of one subject or category, which `SubjectTask` sets."""

    subject: str | None = None

    def sample(self, n: int, eval_doc: dict | None = None, df: Any = None, **_: object) -> list[dict]:
        """First `n` examples; fewer where the subject has fewer."""
        if not hasattr(self, "_by_subject"):
            self._by_subject: dict[str, list[dict]] = {}
            for doc in self.df:
                self._by_subject.setdefault(_subject(doc), []).append(doc)
        return self._by_subject.get(self.subject or "", [])[:n]


class SubjectTask(ConfigurableTask):
    """A task whose sampler is told the subject of each document: the harness keeps documents from samplers."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def fewshot_context(self, doc: dict, *args: Any, **kwargs: Any) -> Any:
        """The harness's own prompt for `doc`, with examples of its subject."""
        self.sampler.subject = _subject(doc)
        return super().fewshot_context(doc, *args, **kwargs)


def _subject(doc: dict) -> str:
    return str(doc.get("subject") or doc.get("category"))


def question_with_options(doc: dict) -> str:
    """MMLU-Pro's question with up to ten lettered options."""
    options = [f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, doc["options"], strict=False)]
    request = 'Think step by step and finish with "The answer is (X)", where X is the letter of the choice.'
    return "\n".join([doc["question"].strip(), *options, request])


def worked_answer(doc: dict) -> str:
    """MMLU-Pro's worked answer of an example, which ends with "The answer is (X)."."""
    return re.sub(r"^A: ", "", doc["cot_content"]).strip()


def function_examples() -> list[dict]:
    """Five worked examples in HumanEval's format."""
    functions = [
        ("double_all(numbers: list) -> list", "Return every number doubled.", "return [2 * n for n in numbers]"),
        ("count_vowels(text: str) -> int", "Count vowels.", 'return sum(letter in "aeiou" for letter in text.lower())'),
        (
            "running_maximum(numbers: list) -> list",
            "For each place give the largest number up to there.",
            "result = []\nfor n in numbers:\n    result.append(max(n, result[-1]) if result else n)\nreturn result",
        ),
        (
            "is_palindrome(text: str) -> bool",
            "Tell whether text reads the same backwards, ignoring case.",
            "text = text.lower()\nreturn text == text[::-1]",
        ),
        (
            "digit_sum(number: int) -> int",
            "Sum the decimal digits of a number that may be negative.",
            "return sum(int(digit) for digit in str(abs(number)))",
        ),
    ]
    return [
        {
            "prompt": f'def {signature}:\n    """{task}"""\n',
            "canonical_solution": textwrap.indent(body, "    "),
            "entry_point": signature.partition("(")[0],
            "test": "",
        }
        for signature, task, body in functions
    ]


# ---- answers ---------------------------------------------------------------------------------------------------------


def score_number(doc: dict, results: list[str]) -> dict[str, int]:
    """GSM8K: the number after "####", else the last number of the answer."""
    marked = re.findall(r"####\s*(-?[\d.,]+)", results[0])
    found = marked[:1] or re.findall(r"-?\d[\d.,]*", results[0])[-1:]
    return {"exact_match": int(bool(found) and _number(found[0]) == _number(doc["answer"].split("####")[-1]))}


def _number(text: str) -> str:
    text = text.replace(",", "").strip().rstrip(".")
    return re.sub(r"\.0+$", "", text)


def score_boxed(doc: dict, results: list[str]) -> dict[str, int]:
    """MATH: the last boxed expression, else what follows the last "answer is"."""
    found, wanted = _boxed(results[0]), _boxed(doc["solution"])
    if found is None and (stated := re.findall(r"answer is:?\s*\$?(.+?)\$?\s*\.?\s*(?:\n|$)", results[0])):
        found = stated[-1]
    return {"exact_match": int(found is not None and bool(is_equiv(found, wanted)))}


def _boxed(text: str) -> str | None:
    expression = last_boxed_only_string(text)
    return remove_boxed(expression) if expression and expression.startswith("\\boxed") else None


def score_letter(doc: dict, results: list[str]) -> dict[str, int]:
    """Multiple choice: the letter after the last "answer is", else the last option's letter that stands alone."""
    letters = LETTERS[: len(doc.get("options") or doc["choices"])]
    wanted = LETTERS[doc["answer"]] if isinstance(doc["answer"], int) else doc["answer"]
    stated = re.findall(rf"(?i:answer is):?\s*\**\(?([{letters}])\b", results[0])
    found = stated or re.findall(rf"(?<![\w'])\(?([{letters}])(?:\)|[.:,]|\s*$)", results[0])
    return {"exact_match": int(bool(found) and found[-1] == wanted)}


def all_samples(resps: list[list[str]], docs: list[dict]) -> list[list[str]]:
    """Keep all repeats of every document."""
    return [list(samples) for samples in resps]


def score_function(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """HumanEval: programs that define the function, or its body alone, against the document's tests."""
    test = f"{doc['test']}\ncheck({doc['entry_point']})"
    stub = doc["prompt"].rstrip() + "\n    pass\n\n\n"  # keeps imports and helpers of the prompt
    programs = []
    for code in map(_code, results[0]):
        whole = re.search(rf"^\s*def {re.escape(doc['entry_point'])}\b", code, re.MULTILINE)
        programs.append(stub + textwrap.dedent(code) if whole else doc["prompt"] + code)
    return _pass_at(test, programs)


def score_program(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """MBPP: programs against the document's tests."""
    return _pass_at(
        "\n".join([doc.get("test_setup_code") or "", *doc["test_list"]]), [_code(text) for text in results[0]]
    )


def _code(text: str) -> str:
    """The last code block, an unfinished one included; the whole text where there is none."""
    blocks = re.findall(r"```(?:[Pp]ython)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return blocks[-1] if blocks else text


def _pass_at(test: str, programs: list[str]) -> dict[str, float]:
    import evaluate  # here, since loading the metric needs its script and permission to run code

    scores, _ = evaluate.load("code_eval").compute(references=[test], predictions=[programs], k=[1, 10])
    return {name: float(score) for name, score in scores.items()}
