"""From the harness's generation requests to batches for `generate`.

- `GenerationSettings`, `parse_generation`: one set of generation kwargs, validated
- `GenerationJob`, `make_jobs`: one request with its prompt tokens and the key of its noise
- `batches`: jobs of equal settings, longest first
"""

import bisect
import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from l2d.sampler_config import SamplerConfig
from l2d.sampling.noise import request_key
from lm_eval_ext.arguments import SAMPLER_ARGUMENTS, SEARCH, UsageError, sampler_changes, token_search
from lm_eval_ext.generation_names import check_settings
from lm_eval_ext.harness.special_tokens import SETTING
from lm_eval_ext.requests.compute_record import Source

Claim = tuple[str, tuple]
"""(digest of a prompt and its kwargs, rank of the request among all that share it)"""


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Validated generation kwargs: sampler, stop strings (the end-of-sequence text included), the most tokens to
    generate, what else goes to `generate`, the search over tokens, and whether special tokens stay in the text."""

    sampler: SamplerConfig
    stops: list[str]
    max_tokens: int
    options: dict[str, Any]
    search: str | None = None
    special_tokens: bool = False


@dataclasses.dataclass(frozen=True)
class GenerationJob:
    """One request: its index among all requests, where it comes from, prompt tokens, settings, noise key."""

    index: int
    source: Source
    tokens: list[int]
    settings: GenerationSettings
    key: bytes

    @property
    def context(self) -> str:
        """Prompt text."""
        return self.source.instance.args[0]

    @property
    def gen_kwargs(self) -> dict[str, Any]:
        """Generation kwargs of the request."""
        return self.source.instance.args[1]


def parse_generation(
    gen_kwargs: dict[str, Any],
    sampler: SamplerConfig,
    guidance_classes: list[str] | None,
    max_gen_toks: int,
    eos: str | None,
    search: str | None = None,
) -> GenerationSettings:
    """Validate one set of generation kwargs, with the harness's own rules for sampling and its aliases.

    Names of sampler settings (`diffusion_budget`, `guidance_scale`, ...) and `token_search` change `sampler` and
    `search` for these requests; all others go to `generate`. Raises `UsageError`.
    """
    check_settings(gen_kwargs)
    try:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
        stops = handle_stop_sequences(kwargs.pop("until"), eos=eos)
        sampler = sampler.replace(**sampler_changes(kwargs))
        sampler.class_index(guidance_classes)
        search = token_search(kwargs.pop(SEARCH, search))
    except (TypeError, ValueError) as error:
        raise UsageError(f"generation settings {gen_kwargs!r}: {error}") from error
    max_tokens = kwargs.pop("max_gen_toks")
    if max_tokens < 1:
        raise UsageError(f"max_gen_toks={max_tokens} must be at least 1.")
    skipped = kwargs.pop(SETTING, True)
    if not isinstance(skipped, bool):
        raise UsageError(f"{SETTING}={skipped!r} must be true or false.")
    temperature = kwargs.pop("temperature", 0.0)
    if kwargs["do_sample"]:
        if temperature <= 0:
            raise UsageError(f"temperature={temperature} cannot be sampled at: set it above 0, or do_sample=False.")
        kwargs["temperature"] = temperature
    options = {name: value for name, value in kwargs.items() if name not in SAMPLER_ARGUMENTS}
    if search is not None and search.startswith("beam") and options != {"do_sample": False}:
        raise UsageError(f"{SEARCH}={search} takes no {_named(options)}: leave it out, or use best_of_N.")
    return GenerationSettings(sampler, [stop for stop in stops if stop], max_tokens, options, search, not skipped)


def make_jobs(
    requests: list[Source],
    parse: Callable[[dict[str, Any], Source], GenerationSettings],
    group: Callable[[Source], Any],
    encode: Callable[[str, GenerationSettings], list[int]],
    gather: Callable[[list[Claim]], list[Claim]] | None,
) -> list[GenerationJob]:
    """One job per request.

    Equal requests are told apart by their order by document and repeat, which keeps the samples of one prompt distinct
    and every result independent of the order of the requests and of the number of processes.

    Args:
        parse: settings for kwargs and source; called once per kwargs and `group(source)`.
        gather: the claims of all processes; `None` where not all requests come here (a response cache answers some):
            then repeats of one request are told apart and equal requests are not.
    """
    parsed: dict[str, GenerationSettings] = {}
    claims = [_claim(position, source) for position, source in enumerate(requests)]
    ranks: dict[str, list[tuple]] = defaultdict(list)
    if gather is not None:
        for digest, rank in gather([c for c, s in zip(claims, requests, strict=True) if not s.padding]):
            ranks[digest].append(rank)
        for shared in ranks.values():
            shared.sort()
    jobs = []
    for index, (source, (digest, rank)) in enumerate(zip(requests, claims, strict=True)):
        context, gen_kwargs = source.instance.args
        name = json.dumps([gen_kwargs, group(source)], sort_keys=True, default=str)
        if name not in parsed:
            parsed[name] = parse(gen_kwargs, source)
        tokens = encode(context, parsed[name])
        occurrence = source.repeat if gather is None else bisect.bisect_left(ranks[digest], rank)
        jobs.append(GenerationJob(index, source, tokens, parsed[name], request_key(tokens, occurrence)))
    return jobs


def _claim(position: int, source: Source) -> Claim:
    instance = source.instance
    context, gen_kwargs = instance.args
    content = json.dumps([context, gen_kwargs], sort_keys=True, default=str)
    doc = position if instance.doc_id is None else instance.doc_id
    rank = (instance.task_name or "", doc, instance.idx, source.repeat, position)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest(), rank


def batches(jobs: list[GenerationJob], size: int) -> Iterator[list[GenerationJob]]:
    """Batches of at most `size` jobs with the same settings, the longest prompts first."""
    groups: dict[int, list[GenerationJob]] = {}
    for job in jobs:
        groups.setdefault(id(job.settings), []).append(job)
    for group in groups.values():
        group.sort(key=lambda job: (-len(job.tokens), job.context))
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _named(options: dict[str, Any]) -> str:
    return ", ".join(name for name, value in options.items() if (name, value) != ("do_sample", False))
