"""Scoring requests of the harness: log-probabilities of continuations and of whole texts.

- `AnswersScoring`: the part of `L2DLM` that is `loglikelihood` and `loglikelihood_rolling`
- `ScoringRequest`, `ScoringJob`: one continuation, and where it comes from
"""

import dataclasses
import logging
import time
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from l2d.sampler_config import SamplerConfig
from l2d.sampling.noise import request_key
from lm_eval_ext.arguments import UsageError
from lm_eval_ext.requests.compute_record import QUANTITIES, Source

logger = logging.getLogger(__name__)

ScoringRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context and continuation text, or `None` for a window of a longer text; context tokens; continuation tokens)"""


@dataclasses.dataclass(frozen=True)
class ScoringJob:
    """A scoring request, where it comes from, and its guidance class as far as that depends on the task."""

    request: ScoringRequest
    source: Source
    guidance_class: str | int | None

    @property
    def order(self) -> tuple:
        """Longest first; equal requests stay together."""
        tokens = self.request[1] + self.request[2]
        return (-len(tokens), tokens)


class AnswersScoring(HFLM):
    """`loglikelihood` and `loglikelihood_rolling` for `L2DLM`; budget 1 leaves them to the harness's own class."""

    _scored: list[Source] | None = None  # where the next requests to be scored come from
    _windows: Any = None  # the bar of a rolling task at budget 1, for which the harness would begin one per batch

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation of each context."""
        self._scored = self._sources(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows that each score what no other does."""
        listed = self._sources(requests)
        windows, self._scored = [], []
        for source in listed:
            tokens = self.tok_encode(source.instance.args[0])
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            cut = [(None, *make_disjoint_window(part)) for part in parts]
            windows += cut
            self._scored += [source] * len(cut)
        if self.sampler.is_base:
            return self._rolling_base(requests, listed, len(windows), disable_tqdm)
        totals = dict.fromkeys(map(id, listed), 0.0)
        owners = list(self._scored)
        answers = self._loglikelihood_tokens(windows, disable_tqdm, kind="loglikelihood_rolling")
        for owner, (logprob, _) in zip(owners, answers, strict=True):
            totals[id(owner)] += logprob
        for source in listed:
            self.cache_hook.add_partial("loglikelihood_rolling", source.instance.args, totals[id(source)])
        return [totals[id(source)] for source in listed]

    def _rolling_base(
        self, requests: list[Instance], listed: list[Source], windows: int, disable_tqdm: bool
    ) -> list[float]:
        self._scored, start = None, time.perf_counter()
        silent = disable_tqdm or self.rank != 0
        self._windows = tqdm(total=windows, disable=silent, desc="Running loglikelihood_rolling requests")
        try:
            answers = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self._windows.close()
            self._windows = None
        counts = [len(self.tok_encode(request.args[0])) for request in requests]
        self._record_base(listed, counts, time.perf_counter() - start)
        return answers

    def _record_base(self, listed: list[Source], counts: list[int], seconds: float) -> None:
        ones, zeros = [[1] * count for count in counts], [[0] * count for count in counts]
        self.run_record.add_batch(listed, ones, zeros, zeros, seconds)

    def _loglikelihood_tokens(
        self,
        requests: list[ScoringRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        kind: str = "loglikelihood",
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation; only continuation positions are solved."""
        listed, self._scored = self._scored, None
        for texts, context, continuation in requests:
            if not context or not continuation:
                raise UsageError(
                    f"a {'continuation' if context else 'context'} has no tokens (both: {texts!r}): "
                    "correct the task, so that none of its contexts and choices is blank."
                )
        if self.sampler.is_base:
            start = time.perf_counter()
            silent = disable_tqdm or self._windows is not None
            answers = super()._loglikelihood_tokens(requests, disable_tqdm=silent, override_bs=override_bs)
            if self._windows is not None:
                self._windows.update(len(requests))
            if listed is not None:
                counts = [len(continuation) for _, _, continuation in requests]
                self._record_base(listed, counts, time.perf_counter() - start)
            return answers
        if listed is None:
            listed = [Source(Instance("loglikelihood", {}, texts or ("", ""), 0), 0, False) for texts, _, _ in requests]
        jobs = [ScoringJob(*values, self._guidance(values[1])) for values in zip(requests, listed, strict=True)]
        order = Collator(list(enumerate(jobs)), sort_fn=lambda numbered: numbered[1].order)
        size = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size(sorted(requests, key=lambda request: -len(request[1] + request[2])))
        silent = disable_tqdm or self.rank != 0
        progress = tqdm(total=len(requests), disable=silent, desc=f"Running {kind} requests")
        answers = []
        for batch in order.get_batched(n=size):
            for (_, job), answer in zip(batch, self._score_mixed([job for _, job in batch]), strict=True):
                answers.append(answer)
                if job.request[0] is not None:
                    self.cache_hook.add_partial("loglikelihood", job.request[0], answer)
                progress.update(1)
        progress.close()
        return order.get_original(answers)

    def _score_mixed(self, batch: list["ScoringJob"]) -> list[tuple[float, bool]]:
        """Answers of a batch whose requests may ask for several guidance classes."""
        answers: list[Any] = [None] * len(batch)
        for chosen in dict.fromkeys(job.guidance_class for job in batch):
            members = [number for number, job in enumerate(batch) if job.guidance_class == chosen]
            sampler = self.sampler if chosen is None else self.sampler.replace(guidance_class=chosen)
            jobs = [batch[number] for number in members]
            scores = self._score([job.request for job in jobs], sampler, [job.source for job in jobs])
            for number, score in zip(members, scores, strict=True):
                answers[number] = score
        return answers

    def _score(
        self, batch: list[ScoringRequest], sampler: SamplerConfig, listed: list[Source] | None
    ) -> list[tuple[float, bool]]:
        start = time.perf_counter()
        longest = max(len(continuation) for _, _, continuation in batch)
        if longest > self.max_length:
            raise UsageError(f"max_length={self.max_length} is below a continuation of {longest} tokens: raise it.")
        texts = [context + continuation for _, context, continuation in batch]
        rows = [tokens[-(self.max_length + 1) :] for tokens in texts]
        if any(len(row) < len(tokens) for row, tokens in zip(rows, texts, strict=True)):
            logger.warning("Contexts are cut from the left to max_length=%d.", self.max_length)
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        column = torch.arange(width, device=self.device)
        ends = torch.tensor([len(row) for row in rows], device=self.device)[:, None]
        counts = torch.tensor([len(continuation) for _, _, continuation in batch], device=self.device)[:, None]
        scored = (column >= ends - counts) & (column < ends)  # (B, S)
        output = self.model.score(
            ids,
            (column < ends).long(),
            continuation_mask=scored,
            sampler=sampler,
            request_keys=[_scoring_key(request) for request in batch],
        )
        totals = output.logprobs.masked_fill(~scored, 0.0).sum(-1).tolist()
        greedy = (output.greedy | ~scored).all(-1).tolist()
        if listed is not None:
            marks = scored.tolist()
            spent = (
                [[v for v, m in zip(*row, strict=True) if m] for row in zip(values.tolist(), marks, strict=True)]
                for values in (getattr(output, name) for name in QUANTITIES)
            )
            self.run_record.add_batch(listed, *spent, seconds=time.perf_counter() - start)
            self.run_record.capped_tokens += output.capped
        return list(zip(totals, greedy, strict=True))


def _scoring_key(request: ScoringRequest) -> bytes:
    """Key of a continuation's noise: its context, so that the choices of one question share their noise. Windows of a
    longer text are keyed by all their tokens, since documents have no context."""
    texts, context, continuation = request
    return request_key(context if texts is not None else context + continuation)
