"""Generation requests of the harness, answered by `generate` or by a search over tokens.

- `AnswersGeneration`: the part of `L2DLM` that is `generate_until`
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from tqdm import tqdm
from transformers import LogitsProcessorList, StoppingCriteriaList

from l2d.sampling.stop_strings import TextStop, after_last
from lm_eval_ext.arguments import AUTO, SEARCH, UsageError, one_line
from lm_eval_ext.generation_names import check_beams
from lm_eval_ext.harness.special_tokens import whole_text
from lm_eval_ext.requests.compute_record import QUANTITIES, Source
from lm_eval_ext.requests.jobs import (
    Claim,
    GenerationJob,
    GenerationSettings,
    batches,
    make_jobs,
    parse_generation,
)
from lm_eval_ext.requests.token_search import Candidate, TokenLikelihood, beam_search, best

logger = logging.getLogger(__name__)
_OF_SETTINGS = (AttributeError, IndexError, OSError, TypeError, ValueError)
"""What transformers raises for values that suit none of its settings."""


class AnswersGeneration(HFLM):
    """`generate_until` for `L2DLM`, which brings the model, the tokenizer and the record."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate for every (prompt, kwargs) until a stop string, an end token or `max_gen_toks`."""
        listed = self._sources(requests)
        self._check_cached_repeats(listed)
        jobs = make_jobs(listed, self._parse_generation, self._by_task, self._encode_prompt, self._gather_claims())
        texts = [""] * len(jobs)
        own = [job for job in jobs if not job.source.padding]
        self._record_samplers(own)
        progress = tqdm(total=len(jobs), disable=disable_tqdm or self.rank != 0, desc="Running generate_until requests")
        for batch in batches(own, self._generation_batch_size(own)):
            for job, text in zip(batch, self._generate(batch), strict=True):
                texts[job.index] = text
                self.cache_hook.add_partial("generate_until", (job.context, job.gen_kwargs), text)
                progress.update(1)
        progress.close()
        return texts

    def _record_samplers(self, jobs: list[GenerationJob]) -> None:
        """Note what each task's generation kwargs changed of the model args' sampler and search."""
        usual = {**self.sampler.to_dict(), SEARCH: self.settings.token_search}
        for job in {(job.source.instance.task_name, id(job.settings)): job for job in jobs}.values():
            used = {**job.settings.sampler.to_dict(), SEARCH: job.settings.search}
            if self._guidance(job.source) is not None:
                used["guidance_class"] = AUTO
            if job.source.instance.task_name is not None:
                changes = {name: value for name, value in used.items() if value != usual[name]}
                self.run_record.add_sampler(job.source.instance.task_name, changes)

    def _check_cached_repeats(self, listed: list[Source]) -> None:
        """The harness's cache has one answer per prompt: refuse it where a prompt is to have several."""
        for source in listed if self.cache_hook.dbdict is not None else ():
            if source.repeat and not source.padding and not source.instance.args[1].get("do_sample", False):
                raise UsageError(
                    f"--use_cache keeps one answer per prompt, and task {source.instance.task_name!r} asks for "
                    f"{source.instance.repeats}: leave --use_cache out, or set do_sample=True."
                )

    def _gather_claims(self) -> Callable[[list[Claim]], list[Claim]] | None:
        """How to learn of all processes' requests; `None` with a cache, which hands in only those it cannot answer."""
        if self.cache_hook.dbdict is not None:
            return None
        if self.world_size == 1:
            return lambda claims: claims

        def gather(claims: list[Claim]) -> list[Claim]:
            everyone: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(everyone, claims)
            return [claim for part in everyone for claim in part]

        return gather

    def _parse_generation(self, gen_kwargs: dict[str, Any], source: Source) -> GenerationSettings:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        arguments = (self.model.config.guidance_classes, self.max_gen_toks, eos, self.settings.token_search)
        by_task = self._by_task(source)
        own = {name: value for name, value in gen_kwargs.items() if name not in by_task}
        settings = parse_generation(own, self.sampler.replace(**by_task), *arguments)
        try:
            self.model.config.check_sampler(settings.sampler)
        except ValueError as error:
            raise UsageError(f"generation settings {gen_kwargs!r}: {error}") from error
        check_beams(settings.search, self.model.generation_config.to_dict())
        if settings.max_tokens >= self.max_length:
            raise UsageError(f"max_gen_toks={settings.max_tokens} must be below max_length={self.max_length}.")
        return settings

    def _encode_prompt(self, text: str, settings: GenerationSettings) -> list[int]:
        """Tokens of a prompt, cut from the left to leave room for the answer; each prompt by itself."""
        special: dict[str, bool] = {}
        if has_bos_prefix(text, self.tokenizer.bos_token):
            special = {"add_special_tokens": False}
        elif self.add_bos_token is not None:
            special = {"add_special_tokens": self.add_bos_token}
        tokens = self.tokenizer(text, truncation=self.truncation, **special)["input_ids"] or [self.prefix_token_id]
        room = self.max_length - settings.max_tokens
        if len(tokens) > room:
            logger.warning("A prompt of %d tokens is cut to its last %d.", len(tokens), room)
        return tokens[-room:]

    def _generate(self, batch: list[GenerationJob], recorded: bool = True) -> list[str]:
        """Texts of a batch of jobs with equal settings."""
        settings, start = batch[0].settings, time.perf_counter()
        answers = self._answers(batch, settings)
        if recorded:
            costs = ([getattr(answer, name) for answer in answers] for name in QUANTITIES)
            counts = [len(answer.tokens) for answer in answers]
            self.run_record.capped_tokens += sum(answer.capped for answer in answers)
            spent = time.perf_counter() - start
            self.run_record.add_batch([job.source for job in batch], *costs, seconds=spent, answers=counts)
        return [self._text(answer.tokens, settings) for answer in answers]

    def _answers(self, batch: list[GenerationJob], settings: GenerationSettings) -> list[Candidate]:
        if settings.search is None:
            return self._decode(batch, settings)
        kind, _, width = settings.search.rpartition("_")
        if kind == "best_of":
            sampled = {"temperature": 1.0, **settings.options, "do_sample": True}
            drawn = dataclasses.replace(settings, options=sampled)
            passes = [self._decode(batch, drawn, candidate) for candidate in range(int(width))]
            return [best(list(candidates)) for candidates in zip(*passes, strict=True)]
        answers, together = [], max(1, len(batch) // int(width))  # beams of a few requests fill a batch
        for first in range(0, len(batch), together):
            answers += self._beams(batch[first : first + together], settings, int(width))
        return answers

    def _decode(
        self, batch: list[GenerationJob], settings: GenerationSettings, candidate: int | None = None
    ) -> list[Candidate]:
        """Answers by `generate`; with `candidate` the one of that number, and its likelihood."""
        width, pad = max(len(job.tokens) for job in batch), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(job.tokens)) + job.tokens for job in batch], device=self.device)
        mask = torch.tensor([[0] * (width - len(job.tokens)) + [1] * len(job.tokens) for job in batch])
        likelihood = None if candidate is None else TokenLikelihood()
        with one_line(f"generation settings {batch[0].gen_kwargs!r}", _OF_SETTINGS):
            sequences, record = self.model.generate(
                input_ids=ids,
                attention_mask=mask.to(self.device),
                sampler=settings.sampler,
                request_keys=[job.key + (b"#%d" % candidate if candidate else b"") for job in batch],
                return_record=True,
                max_new_tokens=settings.max_tokens,
                pad_token_id=pad,
                num_return_sequences=1,
                return_dict_in_generate=False,
                stopping_criteria=StoppingCriteriaList([self._text_stop(settings, width)]),
                logits_processor=None if likelihood is None else LogitsProcessorList([likelihood]),
                **{"eos_token_id": self._end_tokens(), "tokenizer": self.tokenizer, **settings.options},
            )
        lengths = [len(nfe_requested) for nfe_requested in record.nfe_requested]
        sums = [0.0] * len(batch) if likelihood is None else likelihood.sums(sequences, lengths)
        answers = [row[width : width + length] for row, length in zip(sequences.tolist(), lengths, strict=True)]
        columns = zip(answers, sums, record.nfe_requested, record.nfe_computed, record.passes, strict=True)
        candidates = [Candidate(*values) for values in columns]
        candidates[0].capped = record.capped  # known of the batch alone
        return candidates

    def _beams(self, batch: list[GenerationJob], settings: GenerationSettings, width: int) -> list[Candidate]:
        return beam_search(
            self.model,
            [job.tokens for job in batch],
            [job.key for job in batch],
            settings.sampler,
            width,
            settings.max_tokens,
            self._end_tokens(),
            self._text_stop(settings, 0).reached,
            self.tokenizer.pad_token_id,
        )

    def _text_stop(self, settings: GenerationSettings, prompt_length: int) -> TextStop:
        return TextStop(self.tokenizer, settings.stops, prompt_length, self.think_end_token)

    def _end_tokens(self) -> list[int]:
        """End tokens of the model's generation config, and the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({end for end in [*ends, self.eot_token_id] if end is not None})

    def _text(self, tokens: list[int], settings: GenerationSettings) -> str:
        """Text of generated tokens, cut at the first stop string."""
        think_end = self.think_end_token
        answer = after_last(tokens, think_end) if isinstance(think_end, int) else None
        tokens = tokens if answer is None else answer
        text = whole_text(self.tokenizer, tokens) if settings.special_tokens else self.tok_decode(tokens)
        text = text.lstrip() if isinstance(think_end, int) else text
        return postprocess_generated_text(text, settings.stops, think_end if isinstance(think_end, str) else None)
