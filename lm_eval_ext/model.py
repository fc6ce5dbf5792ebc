"""The harness's model class for L2D checkpoints: `lm_eval --model l2d --model_args pretrained=DIR,diffusion_budget=15`.

- `L2DLM`: `generate_until`, `loglikelihood` and `loglikelihood_rolling` at any budget; at budget 1 exactly `--model hf`
  with the base

All noise is a function of (seed, request), so that results depend neither on batch size nor on order.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, has_bos_prefix, postprocess_generated_text, resolve_max_length
from lm_eval.models.utils_hf import clear_torch_cache, get_dtype
from tqdm import tqdm
from transformers import AutoTokenizer, StoppingCriteriaList

from l2d import L2DConfig, L2DForCausalLM
from l2d.config import base_config_from_dict
from l2d.fingerprint import fingerprint
from l2d.noise import request_key
from lm_eval_ext.arguments import UsageError, parse_arguments
from lm_eval_ext.cache import claim_cache
from lm_eval_ext.generation_requests import (
    GenerationJob,
    GenerationSettings,
    batches,
    make_jobs,
    parse_generation,
)
from lm_eval_ext.record import RunRecord
from lm_eval_ext.stopping import TextStop, after_last

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
PROBED_PLACES = 8
"""Scored tokens per row when a batch size is tried."""
PERFORMANCE_ONLY = ("device", "batch_size", "max_batch_size", "parallelize", "max_memory_per_gpu", "max_cpu_memory")
"""Arguments that change no answer."""
ScoringRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context and continuation text, or `None` for a window of a longer text; context tokens; continuation tokens)"""


@register_model("l2d")
class L2DLM(HFLM):
    """An L2D checkpoint in the harness.

    Args:
        pretrained: folder of the checkpoint, or an `L2DForCausalLM` (then give `tokenizer`, too).
        arguments: all others by name; `lm_eval_ext.arguments.ARGUMENTS` lists them.

    Raises `UsageError` (a `ValueError` that needs no traceback) for everything that the user can mend.
    """

    def __init__(self, pretrained: str | L2DForCausalLM | None = None, **arguments: Any):
        self.settings = parse_arguments({"pretrained": pretrained, **arguments})
        self.sampler = self.settings.sampler
        self.run_record = RunRecord()
        harness = dict(self.settings.harness)
        harness.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        if harness["device"].startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"device={harness['device']!r} is not there: this machine shows no CUDA device; use cpu.")
        if harness["device"] == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else each process would do all the work
        super().__init__(pretrained=self.settings.pretrained, **harness)
        if hasattr(self, "accelerator"):  # HFLM takes the local index, and none at all without several GPUs
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    # ---- loading -------------------------------------------------------------------------------------------------

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        self._config = L2DConfig.from_pretrained(pretrained)

    def _get_backend(self, *args: Any, **kwargs: Any) -> None:
        self.backend = "causal"
        self.AUTO_MODEL_CLASS = L2DForCausalLM

    def _create_tokenizer(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        trust_remote_code: bool | None = False,
        use_fast_tokenizer: bool | None = True,
        add_bos_token: bool | None = None,
        **ignored: Any,
    ) -> None:
        """The checkpoint's own tokenizer where it has one, else the base's, of the class that suits the base."""
        if tokenizer is not None and not isinstance(tokenizer, str):
            self.tokenizer = tokenizer
            return
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        if tokenizer is None:
            base_name = self.settings.base or self._config.base_name_or_path
            own = isinstance(pretrained, str) and any((Path(pretrained) / name).is_file() for name in TOKENIZER_FILES)
            tokenizer = pretrained if own else base_name
            options["config"] = base_config_from_dict(self._config.base_config)
            options["config"]._name_or_path = base_name  # both help to choose the class
        with _one_line(f"tokenizer={tokenizer!r} cannot be loaded"):
            self.tokenizer = AutoTokenizer.from_pretrained(
                tokenizer, trust_remote_code=trust_remote_code, use_fast=use_fast_tokenizer, **options
            )

    def _create_model(
        self,
        pretrained: str,
        dtype: Any = "auto",
        parallelize: bool | None = False,
        gpus: int | None = None,
        max_memory_per_gpu: int | str | None = None,
        max_cpu_memory: int | str | None = None,
        offload_folder: str | None = None,
        trust_remote_code: bool | None = False,
        attn_implementation: str | None = None,
        **ignored: Any,
    ) -> None:
        """Load base and path; what `HFLM` would also pass (adapters, quantization) is not among our arguments."""
        options = {"trust_remote_code": trust_remote_code or None, "attn_implementation": attn_implementation}
        if parallelize:
            options |= self._get_accelerate_args(
                parallelize, "auto", max_memory_per_gpu, max_cpu_memory, offload_folder, gpus
            )
        options = {name: value for name, value in options.items() if value is not None}
        with _one_line():
            self._model = L2DForCausalLM.from_pretrained(
                pretrained, base=self.settings.base, dtype=get_dtype(dtype), **options
            )
        if not parallelize:
            self._model.to(self.device)

    @property
    def max_length(self) -> int:
        """Longest input in tokens: as given, else what the base takes."""
        return self._max_length or resolve_max_length(
            self.model.base.config, self.tokenizer, default=self._DEFAULT_MAX_LENGTH
        )

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate for every (prompt, kwargs) until a stop string, an end token or `max_gen_toks`."""
        jobs = make_jobs([request.args for request in requests], self._parse_generation, self._encode_prompt)
        texts = [""] * len(jobs)
        progress = tqdm(total=len(jobs), disable=disable_tqdm or self.rank != 0, desc="Running generate_until requests")
        for batch in batches(jobs, self._generation_batch_size(jobs)):
            for job, text in zip(batch, self._generate(batch), strict=True):
                texts[job.index] = text
                self.cache_hook.add_partial("generate_until", (job.context, job.gen_kwargs), text)
                progress.update(1)
        progress.close()
        return texts

    def _parse_generation(self, gen_kwargs: dict[str, Any]) -> GenerationSettings:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        classes = self.model.config.guidance_classes
        settings = parse_generation(gen_kwargs, self.sampler, classes, self.max_gen_toks, eos)
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

    def _generate(self, batch: list[GenerationJob], max_tokens: int | None = None) -> list[str]:
        """Texts of a batch of jobs with equal settings."""
        settings, width = batch[0].settings, max(len(job.tokens) for job in batch)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(job.tokens)) + job.tokens for job in batch], device=self.device)
        mask = torch.tensor([[0] * (width - len(job.tokens)) + [1] * len(job.tokens) for job in batch])
        sequences, record = self.model.generate(
            input_ids=ids,
            attention_mask=mask.to(self.device),
            sampler=settings.sampler,
            request_keys=[job.key for job in batch],
            return_record=True,
            max_new_tokens=max_tokens or settings.max_tokens,
            pad_token_id=pad,
            eos_token_id=self._end_tokens(),
            stopping_criteria=StoppingCriteriaList(
                [TextStop(self.tokenizer, settings.stops, width, self.think_end_token)]
            ),
            **settings.options,
        )
        if max_tokens is None:
            self.run_record.add(record.asked, record.computed, record.rounds, generated=True)
            self.run_record.capped_tokens += record.capped
        lengths = [len(asked) for asked in record.asked]
        answers = [row[width : width + length] for row, length in zip(sequences.tolist(), lengths, strict=True)]
        return [self._text(answer, settings.stops) for answer in answers]

    def _end_tokens(self) -> list[int]:
        """End tokens of the model's generation config, and the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return sorted({end for end in [*ends, self.eot_token_id] if end is not None})

    def _text(self, tokens: list[int], stops: list[str]) -> str:
        """Text of generated tokens, cut at the first stop string."""
        think_end = self.think_end_token
        answer = after_last(tokens, think_end) if isinstance(think_end, int) else None
        text = self.tok_decode(tokens) if answer is None else self.tok_decode(answer).lstrip()
        return postprocess_generated_text(text, stops, think_end if isinstance(think_end, str) else None)

    # ---- scoring -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[ScoringRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation; only continuation positions are solved."""
        if self.sampler.is_base:
            for _, _, continuation in requests:
                ones, zeros = [1] * len(continuation), [0] * len(continuation)
                self.run_record.add([ones], [zeros], [zeros], generated=False)
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        order = Collator(requests, sort_fn=lambda request: (-len(request[1] + request[2]), request[1] + request[2]))
        size = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size(sorted(requests, key=lambda request: -len(request[1] + request[2])))
        progress = tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        )
        answers = []
        for batch in order.get_batched(n=size):
            for (texts, _, _), answer in zip(batch, self._score(batch), strict=True):
                answers.append(answer)
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
                progress.update(1)
        progress.close()
        return order.get_original(answers)

    def _score(self, batch: list[ScoringRequest], recorded: bool = True) -> list[tuple[float, bool]]:
        longest = max(len(continuation) for _, _, continuation in batch)
        if longest > self.max_length:
            raise UsageError(f"max_length={self.max_length} is below a continuation of {longest} tokens: raise it.")
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in batch]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        place = torch.arange(width, device=self.device)
        ends = torch.tensor([len(row) for row in rows], device=self.device)[:, None]
        counts = torch.tensor([len(continuation) for _, _, continuation in batch], device=self.device)[:, None]
        scored = (place >= ends - counts) & (place < ends)  # (B, S)
        output = self.model.score(
            ids,
            (place < ends).long(),
            continuation_mask=scored,
            sampler=self.sampler,
            request_keys=[_scoring_key(request) for request in batch],
        )
        if recorded:
            spent = [getattr(output, name)[scored].tolist() for name in ("asked", "computed", "rounds")]
            self.run_record.add(*([values] for values in spent), generated=False)
            self.run_record.capped_tokens += output.capped
        totals = output.logprobs.masked_fill(~scored, 0.0).sum(-1).tolist()
        greedy = (output.greedy | ~scored).all(-1).tolist()
        return list(zip(totals, greedy, strict=True))

    # ---- batch size ----------------------------------------------------------------------------------------------

    def _generation_batch_size(self, jobs: list[GenerationJob]) -> int:
        if self.batch_size != "auto" or not jobs:
            return self.batch_size
        longest = max(jobs, key=lambda job: len(job.tokens) + job.settings.max_tokens)
        return self._largest_batch(lambda size: self._generate([longest] * size, max_tokens=2), len(jobs))

    def _detect_batch_size(self, requests: list[ScoringRequest] | None = None, pos: int = 0) -> int:
        """Batch size that fits the request at `pos`, or windows of full length where no requests are given."""
        tokens = requests[pos][1] + requests[pos][2] if requests else [0] * (self.max_length + 1)
        tokens = tokens[-(self.max_length + 1) :]

        def attempt(size: int) -> None:
            if self.sampler.is_base:
                self._model_call(torch.tensor([tokens[:-1]] * size, device=self.device)).log_softmax(-1)
            else:  # a few places show the peak: the diffusion path works through any number of them in portions
                places = max(1, min(PROBED_PLACES, len(tokens) - 1))
                self._score([(None, tokens[:-places], tokens[-places:])] * size, recorded=False)

        return self._largest_batch(attempt, len(requests) if requests else self.max_batch_size)

    def _largest_batch(self, attempt: Callable[[int], Any], useful: int) -> int:
        """Largest batch size, at most `useful`, at which `attempt` does not run out of memory on any process."""

        @find_executable_batch_size(starting_batch_size=max(1, min(self.max_batch_size, useful)))
        def run(batch_size: int) -> int:
            attempt(batch_size)
            return batch_size

        size = run()
        if self.world_size > 1:
            size = int(self.all_gather(torch.tensor([size], device=self.device)).min())
        clear_torch_cache()
        logger.info("batch_size=auto: %d", size)
        return size

    # ---- records -------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for the other processes, and collect what they spent: every process comes here after its requests."""
        super().barrier()
        if self.world_size > 1:
            records = self.gather_object(self.run_record, dst=0)
            self.run_record = RunRecord()
            for record in records or []:
                self.run_record.merge(record)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take the harness's response cache, unless it holds answers of other settings."""
        if cache_hook.dbdict is not None:
            identity = self._identity()
            sampler = {name: value for name, value in identity["sampler"].items() if name != "speculation"}
            others = {name: str(v) for name, v in self.settings.harness.items() if name not in PERFORMANCE_ONLY}
            weights = {name: identity[name] for name in ("base_fingerprint", "checkpoint_fingerprint", "dtype")}
            claim_cache(cache_hook.dbdict, {**sampler, **others, **weights, "max_length": self.max_length})
        super().set_cache_hook(cache_hook)

    def _identity(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "sampler": self.sampler.to_dict(),
            "variant": config.variant,
            "base": self.settings.base or config.base_name_or_path,
            "base_fingerprint": config.base_fingerprint,
            "checkpoint_fingerprint": fingerprint(self.model),
            "dtype": str(self.model.base.dtype),
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the results file tells of the model: under `l2d` the settings, fingerprints and compute spent."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.base.dtype),
            "model_revision": self.model.config.base_revision,
            "l2d": {**self._identity(), "world_size": self.world_size, **self.run_record.summary()},
        }


def _scoring_key(request: ScoringRequest) -> bytes:
    """Key of a continuation's noise: its context, so that the choices of one question share their noise. Windows of a
    longer text are keyed by all their tokens, since documents have no context."""
    texts, context, continuation = request
    return request_key(context if texts is not None else context + continuation)


@contextlib.contextmanager
def _one_line(prefix: str = "") -> Iterator[None]:
    """Turn what loading raises about missing, foreign or damaged files into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        logger.debug("loading failed", exc_info=error)
        text = " ".join(str(error).split())
        raise UsageError(f"{prefix}: {text}" if prefix else text) from error
