"""The paper's protocol as tasks: prompts, extraction and scores on made-up rows with the real data sets' columns.

Run: `python -m pytest tests/lm_eval_ext/test_paper.py`
"""

import importlib.util
from zlib import crc32

import datasets
import evaluate
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.conftest import REPOSITORY
from tests.integration.oracle import Oracle

PAPER = REPOSITORY / "lm_eval_ext" / "tasks" / "paper"
TASKS = ["gsm8k", "math", "humaneval", "mbpp", "mmlu", "mmlu_pro"]
SUBJECTS = ["anatomy", "college_mathematics"]


def made_up(path: str, name: str | None = None, **_):
    """Rows with the columns of the real data sets, and what a right answer to each is (`right`)."""
    numbers, rows = range(12), {}
    if path.endswith("gsm8k"):
        table = [dict(question=f"What is {n} + 1000?", answer=f"{n}+1000\n#### {1000 + n:,}") for n in numbers]
        rows = {"train": table, "test": [{**row, "right": f"It is\n#### {1000 + n}."} for n, row in enumerate(table)]}
    elif path.endswith("hendrycks_math"):
        table = [
            dict(problem=f"{name} {n}: half of {n}?", solution=f"So $\\boxed{{\\frac{{{n}}}{{2}}}}$.") for n in numbers
        ]
        rows = {
            "train": table[6:],
            "test": [{**r, "right": f"Thus \\boxed{{\\frac{n}2}}"} for n, r in enumerate(table[:2])],
        }
        rows = {split: [{**row, "type": name, "level": "Level 1"} for row in part] for split, part in rows.items()}
    elif path.endswith("openai_humaneval"):
        table = [
            dict(
                task_id=f"HumanEval/{n}",
                prompt=f'import math\n\n\ndef plus_{n}(x: int) -> int:\n    """Add {n}."""\n',
                canonical_solution=f"    return x + {n}\n",
                test=f"def check(candidate):\n    assert candidate(math.floor(1.5)) == {n + 1}\n",
                entry_point=f"plus_{n}",
                right=f"Sure:\n```python\ndef plus_{n}(x):\n    return x + {n}\n```\nDone."
                if n
                else "    return x + 0\n",
            )
            for n in numbers
        ]
        rows = {"test": table}
    elif path.endswith("mbpp"):
        table = [dict(text=f"Write a function to add {n}.", code=f"def f(x):\r\n  return x + {n}", test_setup_code="",
                      test_list=[f"assert f({m}) == {m + n}" for m in range(3)]) for n in numbers]  # fmt: skip
        rows = {"prompt": table, "test": [{**row, "right": f"```python\n{row['code']}\n```"} for row in table]}
    elif path.endswith("mmlu"):
        table = [dict(question=f"Pick {n % 4} {s}", subject=s, choices=list("wxyz"), answer=n % 4)
                 for n in numbers for s in SUBJECTS]  # fmt: skip
        rows = {"dev": table, "test": [{**row, "right": f"The answer is ({'ABCD'[row['answer']]})."} for row in table]}
    elif path.endswith("MMLU-Pro"):
        table = [
            dict(question=f"Pick {n}", category=s, options=[f"option {m}" for m in numbers[:10]],
                 answer="ABCDEFGHIJ"[n % 10], cot_content=f"A: Let's think. The answer is ({'ABCDEFGHIJ'[n % 10]}).")
            for n in numbers for s in ("law", "computer science")
        ]  # fmt: skip
        rows = {"validation": table, "test": [{**row, "right": f"**Answer is {row['answer']}**"} for row in table]}
    return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in rows.items()})


def knows(doc):
    """Whether the oracle answers this document."""
    return crc32(doc["right"].encode() + str(doc.get("question", "")).encode()) % 2 == 0


def answer(doc, repeat):
    """Right for about every other document; in code, for the first two repeats of it."""
    good = knows(doc) and repeat < 2
    return doc["right"] if good else "I do not know."


@pytest.fixture(scope="module")
def run(l2d_dir):
    """The oracle, and what the harness makes of its answers to both groups."""
    metric = evaluate.load(str(REPOSITORY / "tests" / "integration" / "code_eval"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", made_up)
        patch.setattr(evaluate, "load", lambda name: metric)
        oracle = Oracle(answer, pretrained=str(l2d_dir), device="cpu", batch_size=8)
        results = simple_evaluate(
            oracle, tasks=["l2d_paper", "l2d_paper_greedy"], limit=10, apply_chat_template=True,
            fewshot_as_multiturn=True, confirm_run_unsafe_code=True, bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(PAPER), include_defaults=False),
        )  # fmt: skip
    return oracle, results


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("twin", ["", "_greedy"])
def test_scores_are_those_of_the_answers(run, task, twin):
    name, (_, results) = f"l2d_paper_{task}{twin}", run
    samples = results["samples"][name]
    right = [knows(sample["doc"]) for sample in samples]
    assert 0 < sum(right) < len(right)
    metrics = {key.partition(",")[0]: value for key, value in results["results"][name].items()}
    share = sum(right) / len(right)
    if task not in ("humaneval", "mbpp"):
        assert metrics["exact_match"] == share
    elif twin:
        assert metrics["pass@1"] == share
        assert "pass@10" not in metrics
    else:
        assert metrics["pass@1"] == pytest.approx(share * 2 / 10)
        assert metrics["pass@10"] == share
    assert results["n-shot"][name] == 5
    kwargs = results["configs"][name]["generation_kwargs"]
    assert (kwargs["do_sample"], kwargs["temperature"]) == ((False, 0.0) if twin else (True, 1.0))


def test_prompts_are_conversations_of_five_examples(run):
    oracle, _ = run
    for context in oracle.contexts:
        assert context.count("<|user|>") == 6
        assert context.count("<|assistant|>") == 6
        assert context.endswith("<|assistant|>\n")
        assert "<|system|>" not in context  # some chat templates refuse it
        assert "\r" not in context
    (prompt,) = {context for context in oracle.contexts if "Pick 0 anatomy\n" in context.split("<|user|>")[-1]}
    assert "college_mathematics" not in prompt
    assert "The answer is (B)</s>" in prompt.replace("<|assistant|>\n ", "<|assistant|>\n")


@pytest.fixture(scope="module")
def protocol():
    """The tasks' module, which the harness loads from its file."""
    spec = importlib.util.spec_from_file_location("protocol", PAPER / "protocol.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers(protocol):
    doc = {"answer": "so\n#### 1,234"}
    for text in ("#### 1234", "#### 1,234.", "It is $1,234.00", "first 5, then 1234", "#### 1234 and not 7"):
        assert protocol.score_number(doc, [text]) == {"exact_match": 1}, text
    for text in ("", "none", "1234 or 7", "#### 12", "-1234"):
        assert protocol.score_number(doc, [text]) == {"exact_match": 0}, text


def test_boxed_answers(protocol):
    doc = {"solution": "Hence $\\boxed{\\frac{1}{2}}$."}
    for text in ("$\\boxed{\\frac12}$", "\\boxed{3} no, \\boxed{\\frac{1}{2}}", "The answer is $\\frac{1}{2}$."):
        assert protocol.score_boxed(doc, [text]) == {"exact_match": 1}, text
    for text in ("", "\\boxed{2}", "\\boxed{", "\\frac{1}{2}"):
        assert protocol.score_boxed(doc, [text]) == {"exact_match": 0}, text


def test_letters(protocol):
    doc = {"answer": 1, "choices": list("wxyz")}
    right = (
        "The answer is (B).",
        "answer is B",
        "**Answer is: B**",
        "B",
        "(B)",
        "B. x",
        "The answer is A. No: the answer is B",
    )
    for text in right:
        assert protocol.score_letter(doc, [text]) == {"exact_match": 1}, text
    for text in ("", "The answer is a bit of B2", "A", "Because", "The answer is (C), not B.", "I"):
        assert protocol.score_letter(doc, [text]) == {"exact_match": 0}, text


def test_code_blocks(protocol):
    for text in (
        "```python\nx = 1\n```",
        "so\n```\nx = 1\n``` done",
        "```python\ny\n```\n```python\nx = 1\n",
        "x = 1\n",
    ):
        assert protocol._code(text).strip() == "x = 1"
