"""Decoding token by token: a main-path step, a diffusion solve, a choice of the output token.

- `generate`: transformers' own `generate`, with its preparation of arguments, around our decoding loop
- `DecodeRecord`: evaluations asked for and made, rounds and changes, for every generated token

All randomness belongs to (seed, request, position), so a row's tokens do not depend on batch-mates or their order. A
token's noise does not depend on the budget either: budgets are compared on the same noise.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from l2d.evaluator import SiteSolution
from l2d.noise import RequestNoise, default_keys, draw_token
from l2d.sampler_config import SamplerConfig
from l2d.sampling import solve_sites
from l2d.scoring import make_sites

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM

_REFUSED = {
    "num_beams": "beam search is not part of the L2D sampler; leave num_beams at 1",
    "assistant_model": "assisted decoding is not part of the L2D sampler; leave assistant_model out",
    "past_key_values": "the sampler keeps its own cache; leave past_key_values out",
    "inputs_embeds": "the sampler needs token ids; pass input_ids",
    "custom_generate": "the L2D sampler is the generate function; leave custom_generate out",
}


@dataclasses.dataclass
class DecodeRecord:
    """Cost of every generated token: `asked[row][i]` and so on for token i of a row.

    asked: evaluations asked for (T); computed: queries to the network; rounds: batched passes of the path; changes: how
    often the chosen token changed along the trajectory; capped: solves that ran into `max_evaluations`.
    """

    asked: list[list[int]]
    computed: list[list[int]]
    rounds: list[list[int]]
    changes: list[list[int]]
    capped: int = 0

    @classmethod
    def empty(cls, rows: int) -> "DecodeRecord":
        """A record of no tokens for `rows` rows."""
        return cls(*([[] for _ in range(rows)] for _ in range(4)))

    def add(self, rows: list[int], sampler: SamplerConfig, solved: SiteSolution) -> None:
        """Append one token to each of `rows`."""
        columns = (solved.computed.tolist(), solved.rounds.tolist(), solved.changes.tolist())
        for row, computed, rounds, changes in zip(rows, *columns, strict=True):
            self.asked[row].append(computed if sampler.adaptive else sampler.budget)
            self.computed[row].append(computed)
            self.rounds[row].append(rounds)
            self.changes[row].append(changes)
        self.capped += int(solved.capped.sum())


def generate(
    model: "L2DForCausalLM",
    inputs: torch.Tensor | None = None,
    *,
    sampler: SamplerConfig | dict[str, Any] | None = None,
    request_keys: list[bytes | str | int] | None = None,
    return_record: bool = False,
    noise: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Generate with the L2D sampler.

    Args:
        inputs (or `input_ids`): (B, L) prompts, left-padded; `attention_mask` (B, L) marks the padding.
        sampler: overrides of the checkpoint's sampler settings; `{"budget": 1}` is the base model.
        request_keys: identity of each row for its noise; default: its prompt, and how often it occurred before.
        return_record: return `(result, DecodeRecord)`.
        noise: (steps, B, d) start noise, already scaled, in place of the requests' own.
        kwargs: everything that transformers' `generate` takes for greedy decoding and sampling: `generation_config`,
            `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`, several end tokens, `stopping_criteria`,
            `logits_processor`, `streamer`, ...

    Returns what transformers' `generate` returns: (B, L + new) token ids, or an output object on request.
    Raises `ValueError` for settings that this sampler would ignore.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None and not (name == "num_beams" and kwargs[name] == 1):
            raise ValueError(f"{name} cannot be used: {reason}.")
    if inputs is None:
        inputs = kwargs.pop("input_ids", None)
    if inputs is None or inputs.dim() != 2 or inputs.shape[1] == 0:
        raise ValueError("input_ids must be a tensor of shape (rows, length) with at least one token per row.")
    sampler = model.sampler(sampler)
    model.prepare_inference()
    loop = _DecodingLoop(sampler, request_keys, noise, inputs, kwargs.get("streamer"))
    result = GenerationMixin.generate(model, inputs, custom_generate=loop.run, use_cache=True, **kwargs)
    return (result, loop.record) if return_record else result


class _DecodingLoop:
    """State of one call of `generate`."""

    def __init__(
        self,
        sampler: SamplerConfig,
        request_keys: list[bytes | str | int] | None,
        noise: torch.Tensor | None,
        prompts: torch.Tensor,
        streamer: Any,
    ):
        self.sampler, self.given_noise = sampler, noise
        self.record = DecodeRecord.empty(prompts.shape[0])
        self.request_keys = request_keys
        self.streamer = streamer  # transformers does not hand it to a custom loop

    def _prepare(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        keys = self.request_keys
        if keys is None:
            rows = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
            keys = default_keys([[t for t, m in zip(*row, strict=True) if m] for row in rows])
        if len(keys) < input_ids.shape[0] and input_ids.shape[0] % len(keys) == 0:  # num_return_sequences
            copies = input_ids.shape[0] // len(keys)
            keys = [f"{key!r}#{copy}" for key in keys for copy in range(copies)]
        if len(keys) != input_ids.shape[0]:
            raise ValueError(
                f"request_keys has {len(keys)} entries for {input_ids.shape[0]} rows: give one key per row."
            )
        self.noises = [RequestNoise(self.sampler.seed, key) for key in keys]
        self.record = DecodeRecord.empty(input_ids.shape[0])

    @torch.no_grad()
    def run(
        self,
        model: "L2DForCausalLM",
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop that transformers' `generate` calls after it prepared everything."""
        if generation_config.num_beams != 1:
            raise ValueError(f"num_beams={generation_config.num_beams} cannot be used: {_REFUSED['num_beams']}.")
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._prepare(input_ids, attention_mask)
        cache = DynamicCache()
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        lengths = attention_mask.sum(1)
        new_ids, positions = input_ids, (attention_mask.cumsum(1) - 1).clamp(min=0)
        kept_scores, kept_logits, step = [], [], 0
        while True:
            state = model.main_path(new_ids, attention_mask, positions, cache).last()
            logits = self._token_logits(model, state, lengths, unfinished, step)
            scores = logits_processor(input_ids, logits)
            token = self._choose(scores, generation_config.do_sample, lengths)
            if generation_config._eos_token_tensor is not None or generation_config._pad_token_tensor is not None:
                pad = generation_config._pad_token_tensor
                token = torch.where(unfinished, token, token if pad is None else pad)
            if generation_config.output_scores:
                kept_scores.append(scores)
            if generation_config.output_logits:
                kept_logits.append(logits)
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            if not bool(unfinished.any()):
                break
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(token), 1)], dim=1)
            new_ids, positions = token[:, None], lengths[:, None]
            lengths, step = lengths + 1, step + 1
        if self.streamer is not None:
            self.streamer.end()
        return _package(input_ids, generation_config, kept_scores, kept_logits, cache)

    def _token_logits(
        self, model: "L2DForCausalLM", state: Any, lengths: torch.Tensor, unfinished: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Logits (B, V) float32 of the next token; rows that are finished cost nothing and get zeros."""
        rows = torch.nonzero(unfinished, as_tuple=True)[0]
        active = rows.tolist()
        positions = lengths[rows].tolist()
        sites = make_sites(
            model, self.sampler, rows, torch.zeros_like(rows), positions, [self.noises[row] for row in active]
        )
        if self.given_noise is not None and not self.sampler.is_base:
            sites.noise = self.given_noise[step, rows.to(self.given_noise.device)].to(rows.device).double()
        site_class = self.sampler.class_index(model.config.guidance_classes)
        solved = solve_sites(model, state, sites, self.sampler, site_class)
        self.record.add(active, self.sampler, solved)
        if len(active) == len(unfinished):
            return self._logits(model, solved).float()
        logits = self._logits(model, solved).float()
        return logits.new_zeros(len(unfinished), logits.shape[-1]).index_copy_(0, rows, logits)

    @staticmethod
    def _logits(model: "L2DForCausalLM", solved: SiteSolution) -> torch.Tensor:
        if solved.logits is not None:
            return solved.logits
        return model._decoder.logits(solved.hidden[:, None])[:, 0]

    def _choose(self, scores: torch.Tensor, do_sample: bool, lengths: torch.Tensor) -> torch.Tensor:
        if not do_sample:
            return scores.argmax(-1)
        uniforms = [noise.output(place) for noise, place in zip(self.noises, lengths.tolist(), strict=True)]
        uniform = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)
        return draw_token(torch.softmax(scores, dim=-1), uniform)


def _package(input_ids: torch.Tensor, generation_config: Any, scores: list, logits: list, cache: DynamicCache) -> Any:
    if not generation_config.return_dict_in_generate:
        return input_ids
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=tuple(scores) if generation_config.output_scores else None,
        logits=tuple(logits) if generation_config.output_logits else None,
        past_key_values=cache,
    )
