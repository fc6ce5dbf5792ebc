"""The harness's model class for L2D checkpoints: `lm_eval --model l2d --model_args pretrained=DIR,diffusion_budget=15`.

- `L2DLM`: `generate_until`, `loglikelihood` and `loglikelihood_rolling` at any budget; at budget 1 exactly `--model hf`
  with the base

All noise is a function of (seed, request), so that results depend neither on batch size nor on order.
"""

import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from lm_eval.models.utils_hf import clear_torch_cache, get_dtype
from lm_eval.utils import simple_parse_args_string

from l2d import L2DForCausalLM
from l2d.checkpoint.loading import config_from, load_tokenizer
from l2d.checkpoint.opening import Checkpoint
from l2d.integrity import fingerprint
from l2d.network.onednn import slow_dtype
from l2d.sampler_config import SamplerConfig
from l2d.settings import declared
from lm_eval_ext.argument_table import help_text
from lm_eval_ext.arguments import AUTO, PLACEMENT, one_line, parse_arguments, sampler_changes
from lm_eval_ext.harness import compute_files
from lm_eval_ext.harness.preflight import check_device, take_opened
from lm_eval_ext.harness.response_cache import claim_cache
from lm_eval_ext.released.options import sampler_defaults
from lm_eval_ext.requests.compute_record import RunInfo, RunRecord, Source, sources
from lm_eval_ext.requests.generate_until import AnswersGeneration
from lm_eval_ext.requests.guidance import class_of_task
from lm_eval_ext.requests.jobs import GenerationJob
from lm_eval_ext.requests.loglikelihood import AnswersScoring, ScoringRequest

logger = logging.getLogger(__name__)

PROBED_POSITIONS = 8
"""Scored tokens per row when a batch size is tried."""
PERFORMANCE_ONLY = (*PLACEMENT, *(name for name, one in declared(SamplerConfig).items() if not one.changes_answers))
"""Arguments that change no answer."""

compute_files.install()


@register_model("l2d")
class L2DLM(AnswersGeneration, AnswersScoring, HFLM):
    """An L2D checkpoint in the harness.

    Args:
        pretrained: folder or hub name of the checkpoint, or an `L2DForCausalLM` (then give `tokenizer`, too).
        arguments: all others by name; `lm_eval_ext.arguments.ARGUMENTS` lists them.

    Raises `UsageError` (a `ValueError` that needs no traceback) for everything that the user can correct.
    """

    def __init__(self, pretrained: str | L2DForCausalLM | None = None, **arguments: Any):
        if "help" in arguments or pretrained == "help":
            print(help_text())
            raise SystemExit(0)
        self.settings = parse_arguments(take_opened({"pretrained": pretrained, **arguments}))
        self.sampler = self.settings.sampler
        self.chosen = sampler_changes(arguments)  # what no task's default replaces
        self.run_record = RunRecord()
        self._padded: list[Instance] = []  # requests that the harness repeats to even out the processes
        harness = dict(self.settings.harness)
        compiled = harness.pop("compile_path", False)
        harness.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        check_device(harness)
        if harness["device"] == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else each process would do all the work
        with one_line():
            folder = None if self.settings.checkpoint is None else self.settings.checkpoint.folder
        super().__init__(pretrained=folder or self.settings.model, **harness)
        if hasattr(self, "accelerator"):  # HFLM takes the local index, and none at all without several GPUs
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        if compiled:
            with one_line():
                self.model.compile_path()

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "L2DLM":
        """Model for the command line; `--device` and `--batch_size` yield to model args of the same name."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**options, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "L2DLM":
        """The same for model args in one string."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- loading -------------------------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Checkpoint:
        if self.settings.checkpoint is None:  # a model was handed over, and the harness loads nothing
            raise ValueError("pretrained names no checkpoint: give a folder or hub name to load one.")
        return self.settings.checkpoint

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        with one_line():
            self._config = config_from(self._checkpoint)
        self._config._name_or_path = self._checkpoint.name  # the harness's label of a model object

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
        """The checkpoint's own tokenizer where it has one, else the base's; or the one named by `tokenizer`."""
        if tokenizer is not None and not isinstance(tokenizer, str):
            self.tokenizer = tokenizer
            return
        options: dict[str, Any] = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        options |= {"trust_remote_code": trust_remote_code, "use_fast": use_fast_tokenizer}
        with one_line():
            source = tokenizer or self.settings.checkpoint or str(self._config.base_name_or_path)
            self.tokenizer = load_tokenizer(source, **options)

    def _create_model(
        self,
        pretrained: str,
        dtype: Any = "auto",
        parallelize: bool | None = False,
        gpus: int | None = None,
        max_memory_per_gpu: int | str | None = None,
        trust_remote_code: bool | None = False,
        attn_implementation: str | None = None,
        **ignored: Any,
    ) -> None:
        """Load base and path; what `HFLM` would also pass (adapters, quantization) is not among our arguments."""
        options = {"trust_remote_code": trust_remote_code or None, "attn_implementation": attn_implementation}
        if parallelize:
            options |= self._get_accelerate_args(parallelize, "auto", max_memory_per_gpu, None, None, gpus)
        options = {name: value for name, value in options.items() if value is not None}
        with one_line():
            self._model = L2DForCausalLM.from_pretrained(self._checkpoint, dtype=get_dtype(dtype), **options)
        if not parallelize:
            self._model.to(self.device)
        if slow_dtype(self._model.base.dtype, self._model.device):
            logger.warning(
                "dtype=%s: this processor has no instructions for it; dtype=float32 is several times as fast.",
                str(self._model.base.dtype).removeprefix("torch."),
            )

    @property
    def max_length(self) -> int:
        """Longest input in tokens: `max_length`, else what the base takes."""
        return self._max_length or resolve_max_length(
            self.model.base.config, self.tokenizer, default=self._DEFAULT_MAX_LENGTH
        )

    # ---- requests -----------------------------------------------------------------------------------------------

    def _sources(self, requests: list[Instance]) -> list[Source]:
        listed = sources(requests)
        self._padded += [source.instance for source in listed if source.padding]
        return listed

    def _guidance(self, source: Source) -> str | int | None:
        """Guidance class of a request, as far as it depends on the task."""
        return self._by_task(source).get("guidance_class")

    def _by_task(self, source: Source) -> dict[str, Any]:
        """Sampler settings of a request that depend on its task: those that neither model args nor its generation
        kwargs set, and the class of `guidance_class=auto`, without which a task is not guided.
        """
        kwargs = source.instance.args[1] if source.instance.request_type == "generate_until" else {}
        task = source.instance.task_name
        chosen = {
            name: value for name, value in sampler_defaults(task).items() if name not in {**self.chosen, **kwargs}
        }
        classes = self.model.config.guidance_classes
        if classes and kwargs.get("guidance_class", self.sampler.guidance_class) == AUTO:
            chosen["guidance_class"] = class_of_task(task, source.instance.doc, classes)
            if chosen["guidance_class"] is None:
                chosen["guidance_scale"] = 1.0
        return chosen

    # ---- batch size ----------------------------------------------------------------------------------------------

    def _generation_batch_size(self, jobs: list[GenerationJob]) -> int:
        if self.batch_size != "auto" or not jobs:
            return self.batch_size
        longest = max(jobs, key=lambda job: len(job.tokens) + job.settings.max_tokens)
        return self._largest_batch(lambda size: self._generate(self._probes(longest, size), recorded=False), len(jobs))

    def _probes(self, longest: GenerationJob, size: int) -> list[GenerationJob]:
        """Copies of a job that are as long as its answer may get, to see what fits into memory in two steps."""
        settings = longest.settings
        length = len(longest.tokens) + max(0, settings.max_tokens - 2)
        tokens = (longest.tokens * (1 + length // len(longest.tokens)))[:length]
        settings = dataclasses.replace(settings, max_tokens=min(2, settings.max_tokens))
        return [dataclasses.replace(longest, tokens=tokens, settings=settings)] * size

    def _detect_batch_size(self, requests: list[ScoringRequest] | None = None, pos: int = 0) -> int:
        """Batch size that fits the request at `pos`, or windows of full length without requests."""
        tokens = requests[pos][1] + requests[pos][2] if requests else [0] * (self.max_length + 1)
        tokens = tokens[-(self.max_length + 1) :]

        def attempt(size: int) -> None:
            if self.sampler.is_base:
                self._model_call(torch.tensor([tokens[:-1]] * size, device=self.device)).log_softmax(-1)
            else:  # a few positions show the peak: the diffusion path evaluates any number of them in parts
                count = max(1, min(PROBED_POSITIONS, len(tokens) - 1))
                guided = self.sampler.guidance_class == AUTO
                sampler = self.sampler.replace(guidance_class=0) if guided else self.sampler
                self._score([(None, tokens[:-count], tokens[-count:])] * size, sampler, None)

        return self._largest_batch(attempt, len(requests) if requests else self.max_batch_size)

    def _largest_batch(self, attempt: Callable[[int], Any], useful: int) -> int:
        """Largest batch size, at most `useful`, at which `attempt` does not run out of memory on any process."""

        @find_executable_batch_size(starting_batch_size=max(1, min(self.max_batch_size, useful)))
        def run(batch_size: int) -> int:
            attempt(batch_size)
            return batch_size

        size = run()
        if self.world_size > 1 and self.cache_hook.dbdict is None:  # with a cache a process may have nothing to do
            size = int(self.all_gather(torch.tensor([size], device=self.device)).min())
        clear_torch_cache()
        logger.info("batch_size=auto: %d", size)
        return size

    # ---- records -------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for the other processes, and collect what they spent: every process comes here after its requests.

        The harness pads the lists of requests with copies: their answers, which it has stored by now, are dropped.
        """
        super().barrier()
        for instance in self._padded:
            del instance.resps[instance.repeats :]
        self._padded = []
        if self.world_size > 1:
            self.run_record.peak_memory_bytes = _peak_memory()
            records = self.gather_object(self.run_record, dst=0)
            self.run_record = RunRecord()
            for record in records or []:
                self.run_record.merge(record)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take the harness's response cache, unless it holds answers of other settings."""
        if cache_hook.dbdict is not None:
            identity = self._identity()
            sampler = {name: value for name, value in identity["sampler"].items() if name not in PERFORMANCE_ONLY}
            others = {name: str(v) for name, v in self.settings.harness.items() if name not in PERFORMANCE_ONLY}
            weights = {name: identity[name] for name in ("base_fingerprint", "checkpoint_fingerprint", "dtype")}
            sampler["token_search"] = identity["token_search"]
            claim_cache(cache_hook.dbdict, {**sampler, **others, **weights, "max_length": self.max_length})
        super().set_cache_hook(cache_hook)

    def _identity(self) -> dict[str, Any]:
        config, checkpoint = self.model.config, self.settings.checkpoint
        return {
            "sampler": self.sampler.to_dict(),
            "token_search": self.settings.token_search,
            "variant": config.variant,
            "carried_state": config.carried_state,
            "noise_free": config.noise_free,
            "warm_start": config.warm_start,
            "revision": checkpoint.revision if checkpoint is not None else None,
            "commit": checkpoint.commit if checkpoint is not None else None,
            "base": (checkpoint.base if checkpoint is not None else None) or config.base_name_or_path,
            "base_fingerprint": config.base_fingerprint,
            "checkpoint_fingerprint": fingerprint(self.model),
            "dtype": str(self.model.base.dtype),
            "trained_parameters": sum(parameter.numel() for _, parameter in self.model.trained_parameters()),
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the results file tells of the model: under `l2d` the settings, fingerprints and compute spent.

        The harness asks at the end of a run: what is spent from then on counts for the next one.
        """
        record, self.run_record = self.run_record, RunRecord()
        record.peak_memory_bytes = max(record.peak_memory_bytes, _peak_memory())
        info = RunInfo({**self._identity(), "world_size": self.world_size, **record.summary()})
        info["command"], info.requests = shlex.join(sys.argv), record.requests
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.base.dtype),
            "model_revision": self.model.config.base_revision,
            "l2d": info,
        }


def _peak_memory() -> int:
    """Largest memory use of this process so far in bytes: on GPUs that of the tensors, else of everything."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
