"""Which guidance class a task asks for, for `guidance_class=auto`.

- `TASK_CLASSES`: patterns of task names -> class, the first match counts
- `class_of_task`: the class of one request, from its task's name and its document

Classes are those of the paper's training data: math, coding, general_qa.
"""

import re
from typing import Any

from lm_eval_ext.arguments import AUTO, UsageError
from lm_eval_ext.released.benchmarks import BENCHMARKS, mmlu_class
from lm_eval_ext.released.options import benchmark_of

TASK_CLASSES: tuple[tuple[str, str], ...] = (
    (r"mmlu", "general_qa"),
    (r"gsm8k|gsm_plus|mgsm|math|asdiv|svamp|mawps|aime|arithmetic", "math"),
    (r"humaneval|mbpp|apps|ds1000|code", "coding"),
    (r"arc_|^arc$|ai2_arc|hellaswag|piqa|winogrande|boolq|openbookqa|truthfulqa|triviaqa|nq_open|gpqa|bbh|agieval|squad"
     r"|sciq|commonsense_qa|social_iqa|race|wikitext|lambada|drop", "general_qa"),
)  # fmt: skip
"""Pattern anywhere in the task's name -> class. MMLU and MMLU-Pro go by subject, as in the release."""


def class_of_task(task: str | None, doc: Any, classes: list[str]) -> str | None:
    """Class for a request of `task` about `doc`, one of the model's `classes`; `None` for a task of the released
    protocol that is never guided.

    Raises `UsageError` for a task that the tables do not know, or a class that the model does not have.
    """
    benchmark = BENCHMARKS.get(benchmark_of(task) or "")
    name = benchmark.guidance(doc) if benchmark else _known_class(task or "", doc)
    if name not in classes and not (benchmark and name is None):
        known = "no class" if name is None else f"the class {name!r}, which this model does not have,"
        raise UsageError(
            f"guidance_class={AUTO} has {known} for task {task!r}: give guidance_class, one of: {', '.join(classes)}."
        )
    return name


def _known_class(task: str, doc: Any) -> str | None:
    if "mmlu" in task:
        doc = doc if isinstance(doc, dict) else {}
        subject = str(doc.get("subject") or doc.get("category") or _subject_in_name(task)).replace(" ", "_").lower()
        return "math" if subject == "math" else mmlu_class(subject)
    return next((name for pattern, name in TASK_CLASSES if re.search(pattern, task)), None)


def _subject_in_name(task: str) -> str:
    """`mmlu_abstract_algebra_generative` -> `abstract_algebra`."""
    return re.sub(r"^.*mmlu(_pro)?(_plus)?_?|_(generative|continuation|cot|flan.*)$", "", task)
