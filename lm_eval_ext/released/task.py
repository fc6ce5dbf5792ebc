"""The harness's task class for the released protocol.

- `ReleasedTask`: one benchmark; its YAML names it under `metadata: benchmark`, and holds lengths and sampling

"""

import functools
import logging
from collections.abc import Iterator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import create_iterator

from lm_eval_ext.arguments import UsageError
from lm_eval_ext.harness import special_tokens
from lm_eval_ext.released.answers import judge
from lm_eval_ext.released.benchmarks import BENCHMARKS, KS, MAX_TOKENS, Row, is_shot, messages
from lm_eval_ext.released.math_answers import RAISED
from lm_eval_ext.released.options import SUBSTITUTE, row_source, template_option
from lm_eval_ext.released.programs import assemble, pass_rates, passes
from lm_eval_ext.released.rendering import fits, render, template_text
from lm_eval_ext.released.rows import load

special_tokens.install(HFLM)
eval_logger = logging.getLogger("lm_eval.tasks.l2d_released")


class ReleasedTask(ConfigurableTask):
    """A benchmark as the release evaluates it, for any model of the harness.

    Metrics: `accuracy` and `format_accuracy`, or `pass@k`; `left_out` counts the problems that are too long and so in
    no denominator, `raised` the answers on which the release aborts, which count as wrong.
    """

    def __init__(self, config: dict[str, Any]):
        options = config["metadata"]
        self.name = options["benchmark"]
        self.benchmark = BENCHMARKS[self.name]
        self.template = template_option(options)
        self.rows = load(self.name, row_source(options))
        if self.rows.substituted:
            config = {**config, "metadata": {**options, "released_rows": SUBSTITUTE}}  # so results say it, too
            eval_logger.warning(
                "l2d_released_%s: %s here, and scores are not the released ones; see released_rows in docs/released.md",
                self.name,
                "rows are rebuilt from openai/openai_humaneval" if self.name == "humaneval" else "shots are test rows",
            )
        self.left_out = 0
        self._numbers: list[int] = []  # rows that are asked, or with --samples positions in that list
        self._lm: Any = None
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    # ---- rows --------------------------------------------------------------------------------------------------------

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take the rows, which are loaded already."""
        self.dataset = {"test": self.rows.test}

    def fewshot_docs(self) -> None:
        """None: shots are part of the conversation, not the harness's."""

    def doc_to_text(self, doc: Row, doc_to_text: Any = None) -> str:
        """The question."""
        return self.benchmark.question(doc)

    def doc_to_target(self, doc: Row, doc_to_target: Any = None) -> str:
        """The reference."""
        return self.benchmark.reference(doc)

    def doc_iterator(
        self, *, rank: int = 0, limit: int | None = None, world_size: int = 1, samples: list[int] | None = None
    ) -> Iterator[tuple[int, Row]]:
        """The problems that are asked, by their row number in the test split (with `samples` their place there)."""
        numbered = (
            (number, self.rows.test[samples[number] if samples else number])
            for number in self._numbers[: limit or None]
        )
        return create_iterator(numbered, rank=rank, limit=None, world_size=world_size)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def build_all_requests(self, *, limit: int | None = None, samples: list[int] | None = None, **kwargs: Any) -> None:
        """Choose the problems that fit, the first `limit` of them, and build their requests."""
        chat_template = kwargs.get("chat_template")
        if chat_template is None:
            raise UsageError(f"--tasks {self.config.task} needs --apply_chat_template: the protocol has no other form.")
        self._lm = getattr(chat_template, "__self__", None)
        if not hasattr(self._lm, "tok_encode"):
            raise UsageError(
                f"--tasks {self.config.task} leaves out problems of more than {MAX_TOKENS} tokens, and this model has "
                "no tokenizer here to count them: use a model that has one, such as --model hf."
            )
        self.left_out, self._numbers = 0, []
        for place, number in enumerate(samples or range(len(self.rows.test))):
            if limit and not samples and len(self._numbers) == limit:
                break
            row = self.rows.test[number]
            if self.rows.is_left_out(number) or is_shot(self.benchmark, row, self.rows.shots(row)):
                continue
            if self._fits(row, chat_template):
                self._numbers.append(place)
            else:
                self.left_out += 1
        if not self._numbers:
            raise UsageError(
                f"--tasks {self.config.task}: none of {self.left_out} problems has at most {MAX_TOKENS} tokens with "
                "its shots and reference, so none is left to evaluate: use a model whose tokenizer makes fewer tokens."
            )
        super().build_all_requests(limit=limit, samples=samples, **kwargs)

    def _fits(self, row: Row, chat_template: Any) -> bool:
        prompt = self._lm.tok_encode(self._prompt(row, chat_template))
        return fits(len(prompt), len(self._lm.tok_encode(self.benchmark.reference(row), add_special_tokens=False)))

    def _prompt(self, row: Row, chat_template: Any) -> str:
        conversation = messages(self.benchmark, row, self.rows.shots(row))
        open_turn = self.benchmark.opening is not None
        if self.template is not None:
            bos = getattr(self._lm.tokenizer, "bos_token", None) or ""
            return render(template_text(self.template), conversation, open_turn, bos_token=bos)
        prompt = chat_template(conversation, add_generation_prompt=not open_turn)
        return prompt.rstrip() if open_turn else prompt

    def fewshot_context(self, doc: Row, *args: Any, **kwargs: Any) -> str:
        """The rendered conversation of `doc`."""
        return self._prompt(doc, kwargs["chat_template"])

    def construct_requests(self, doc: Row, ctx: str, **kwargs: Any) -> Instance:
        """The request; models of the harness's Hugging Face class stop at the tokenizer's end token alone."""
        instance = super().construct_requests(doc, ctx, **kwargs)
        if isinstance(self._lm, HFLM):
            context, settings = instance.arguments
            instance.arguments = (context, {**settings, "eos_token_id": self._lm.tokenizer.eos_token_id})
        return instance

    # ---- scores ------------------------------------------------------------------------------------------------------

    def process_results(self, doc: Row, results: list[list[str]]) -> dict[str, float]:
        """Metrics of one problem, from all samples of its answer."""
        if "bypass" in self._metric_fn_list:  # --predict_only
            return {"bypass": 0}
        (samples,) = results
        if self.benchmark.code:
            passing = sum(passes([assemble(self.name, doc, sample) for sample in samples]))
            return {**pass_rates([(len(samples), passing)]), "left_out": 0}
        scores = {"accuracy": 0.0, "format_accuracy": 0.0, "left_out": 0}
        raised = {"raised": 0} if self.name == "math" else {}
        try:
            verdict = judge(self.name, doc, samples[0])
        except RAISED:
            if self.name != "math":
                raise
            return {**scores, "raised": 1}
        return {
            **scores,
            **raised,
            "accuracy": float(verdict.correct),
            "format_accuracy": float(verdict.answer is not None),
        }

    def aggregation(self) -> dict[str, Any]:
        """Means, and the two counts."""
        means = dict.fromkeys(["accuracy", "format_accuracy", "bypass", *(f"pass@{k}" for k in KS)], mean)
        return {**means, "raised": sum, "left_out": functools.partial(_constant, self)}

    def higher_is_better(self) -> dict[str, bool]:
        """Of every metric."""
        return {name: name not in ("raised", "left_out") for name in self.aggregation()}


def _constant(task: ReleasedTask, values: list[int]) -> int:
    return task.left_out
