"""What `--metadata` may set for the tasks `l2d_released_*`.

- `template_option`: `released_template`, one of the release's chat templates in place of the tokenizer's
- `row_source`: `released_rows`, whether rows that a local copy lacks are replaced
- `sampler_defaults`: what a task sets for `--model l2d`, unless model args or generation kwargs do
- `benchmark_of`: the benchmark of a task's name
"""

from typing import Any

from lm_eval_ext.arguments import UsageError
from lm_eval_ext.released.benchmarks import BENCHMARKS

PREFIX = "l2d_released"
TEMPLATES = ("fixed_date_llama3", "base_llama")
"""Llama instruct models: Llama 3.1's template with a fixed date. Llama 3.1 8B with LoRA: a plain one."""
SUBSTITUTE, RELEASED = "substitute", "released"
"""Values of `released_rows`. Substitutes: HumanEval's rows are rebuilt from openai/openai_humaneval by the description
of codeparrot/instructhumaneval, and MATH's shots are `SUBSTITUTE_SHOTS` of its test split, which are left out of the
evaluation. Results say so; they are not the released ones."""
SUBSTITUTE_SHOTS = [5, 1005, 2005, 3005, 4005]
"""Rows of five subjects with solutions of usual length."""
CODE_SCHEDULE = "polynomial_1_1.0"
"""The released temperature of the clean token along the trajectory, for code tasks."""


def template_option(metadata: dict[str, Any]) -> str | None:
    """Name of a template, `None` for the tokenizer's own."""
    return _option(metadata, "released_template", TEMPLATES)


def row_source(metadata: dict[str, Any]) -> str | None:
    """`RELEASED`, `SUBSTITUTE`, or `None`: the released rows, and substitutes for what a local copy lacks."""
    return _option(metadata, "released_rows", (RELEASED, SUBSTITUTE))


def _option(metadata: dict[str, Any], name: str, allowed: tuple[str, ...]) -> str | None:
    value = metadata.get(name)
    if value is not None and value not in allowed:
        raise UsageError(f"--metadata: {name}={value!r} is not known: use {' or '.join(allowed)}, or leave it out.")
    return value


def benchmark_of(task: str | None) -> str | None:
    """Key of `BENCHMARKS` for a task's name, `None` for other tasks."""
    name = (task or "").removesuffix("_greedy").removeprefix(f"{PREFIX}_")
    return name if (task or "").startswith(PREFIX) and name in BENCHMARKS else None


def sampler_defaults(task: str | None) -> dict[str, Any]:
    """Sampler settings by which `task` differs from the model's: the schedule of code tasks."""
    name = benchmark_of(task)
    return {"choice_temperature": CODE_SCHEDULE} if name is not None and BENCHMARKS[name].code else {}
