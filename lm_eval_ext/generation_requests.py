"""From the harness's generation requests to batches for `generate`.

- `GenerationSettings`, `parse_generation`: one set of generation kwargs, validated
- `GenerationJob`, `make_jobs`: one request with its prompt tokens and the key of its noise
- `batches`: jobs of equal settings, longest first
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from l2d.noise import request_key
from l2d.sampler_config import SamplerConfig
from lm_eval_ext.arguments import SAMPLER_ARGUMENTS, UsageError, sampler_changes


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Validated generation kwargs: sampler, stop strings (the end-of-sequence text included), the most tokens to
    generate, and what else goes to `generate`."""

    sampler: SamplerConfig
    stops: list[str]
    max_tokens: int
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GenerationJob:
    """One request: its place among all requests, prompt text and tokens, kwargs as given and parsed, noise key."""

    index: int
    context: str
    tokens: list[int]
    gen_kwargs: dict[str, Any]
    settings: GenerationSettings
    key: bytes


def parse_generation(
    gen_kwargs: dict[str, Any],
    sampler: SamplerConfig,
    guidance_classes: list[str] | None,
    max_gen_toks: int,
    eos: str | None,
) -> GenerationSettings:
    """Validate one set of generation kwargs, with the harness's own rules for sampling and its aliases.

    Names of sampler settings (`diffusion_budget`, `guidance_scale`, ...) change `sampler` for these requests; all
    others go to `generate`. Raises `UsageError`.
    """
    try:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
        stops = handle_stop_sequences(kwargs.pop("until"), eos=eos)
        sampler = sampler.replace(**sampler_changes(kwargs))
        sampler.class_index(guidance_classes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"generation settings {gen_kwargs!r}: {error}") from error
    max_tokens = kwargs.pop("max_gen_toks")
    if max_tokens < 1:
        raise UsageError(f"max_gen_toks={max_tokens} must be at least 1.")
    if "max_length" in kwargs:
        raise UsageError("generation setting 'max_length' depends on the prompt's length: set max_gen_toks instead.")
    temperature = kwargs.pop("temperature", 0.0)
    if kwargs["do_sample"]:
        if temperature <= 0:
            raise UsageError(f"temperature={temperature} cannot be sampled at: set it above 0, or do_sample=False.")
        kwargs["temperature"] = temperature
    options = {name: value for name, value in kwargs.items() if name not in SAMPLER_ARGUMENTS}
    return GenerationSettings(sampler, [stop for stop in stops if stop], max_tokens, options)


def make_jobs(
    requests: list[tuple[str, dict[str, Any]]],
    parse: Callable[[dict[str, Any]], GenerationSettings],
    encode: Callable[[str, GenerationSettings], list[int]],
) -> list[GenerationJob]:
    """One job per (prompt, kwargs). Equal ones are told apart by how many came before, which keeps the samples of one
    prompt distinct and every result independent of the order of the others."""
    parsed: dict[str, GenerationSettings] = {}
    seen: Counter[tuple[str, str]] = Counter()
    jobs = []
    for index, (context, gen_kwargs) in enumerate(requests):
        group = json.dumps(gen_kwargs, sort_keys=True, default=str)
        if group not in parsed:
            parsed[group] = parse(gen_kwargs)
        tokens = encode(context, parsed[group])
        key = request_key(tokens, seen[group, context])
        seen[group, context] += 1
        jobs.append(GenerationJob(index, context, tokens, gen_kwargs, parsed[group], key))
    return jobs


def batches(jobs: list[GenerationJob], size: int) -> Iterator[list[GenerationJob]]:
    """Batches of at most `size` jobs with the same settings, the longest prompts first."""
    groups: dict[int, list[GenerationJob]] = {}
    for job in jobs:
        groups.setdefault(id(job.settings), []).append(job)
    for group in groups.values():
        group.sort(key=lambda job: (-len(job.tokens), job.context))
        for start in range(0, len(group), size):
            yield group[start : start + size]
