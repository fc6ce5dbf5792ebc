"""Decoding token by token: a main-path step, a diffusion solve, a choice of the output token.

- `generate`: transformers' own `generate`, with its preparation of arguments, around our decoding loop

What the loop does is in `decoding.py`.
"""

from typing import Any

import torch
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation import StopStringCriteria

from l2d.decoding import UNUSED_SETTINGS, DecodingLoop, refuse
from l2d.network.two_paths import TwoPaths
from l2d.sampler_config import SamplerConfig

_REFUSED = {
    "assistant_model": "assisted decoding is not part of the L2D sampler; leave assistant_model out",
    "past_key_values": "the sampler keeps its own cache; leave past_key_values out",
    "inputs_embeds": "the sampler needs token ids; pass input_ids",
    "custom_generate": "the L2D sampler is the generate function; leave custom_generate out",
    "position_ids": "positions follow from attention_mask; leave position_ids out",
    "noised_targets": "they are for training; leave noised_targets out",
    "state": "it is for training; leave state out",
}


def generate(
    model: Any,
    paths: TwoPaths,
    sampler: SamplerConfig,
    inputs: torch.Tensor | None = None,
    *,
    request_keys: list[bytes | str | int] | None = None,
    return_record: bool = False,
    noise: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Generate with the L2D sampler.

    Args:
        model: the `L2DForCausalLM` that owns `paths`, whose `generate` of transformers prepares the arguments.
        inputs (or `input_ids`): (B, L) prompts, left-padded; `attention_mask` (B, L) marks the padding. Without prompts
            one row begins with the start token, as in transformers.
        request_keys: identity of each row for its noise; default: its prompt, and how often it occurred before.
        return_record: return `(result, DecodeRecord)`.
        noise: (steps, B, d) start noise, already scaled, in place of the requests' own.
        kwargs: everything that transformers' `generate` takes for greedy decoding and sampling: `generation_config`,
            `max_new_tokens`, `do_sample`, `temperature`, `top_p`, `top_k`, several end tokens, `stop_strings` (with
            `tokenizer`), `stopping_criteria`, `logits_processor`, `streamer`, ... A streamer with a method `follow`
            gets the `DecodeRecord` that grows while tokens come: what a token cost is in it when `put` gets the token.

    Returns what transformers' `generate` returns: (B, L + new) token ids, or an output object on request.
    Raises `ValueError` for settings that this sampler would ignore.
    """
    refuse(kwargs, _REFUSED)
    refuse(kwargs, UNUSED_SETTINGS)  # those of a `generation_config` are checked in the loop, once it is complete
    if inputs is None:
        inputs = kwargs.pop("input_ids", None)
    mask = kwargs.get("attention_mask")
    if inputs is None and mask is None:
        pass  # an empty prompt, as pipelines hand it in: transformers begins with the start token
    elif not isinstance(inputs, torch.Tensor) or inputs.dim() != 2 or inputs.shape[1] == 0:
        raise ValueError("input_ids must be a tensor of shape (rows, length) with at least one token per row.")
    elif mask is not None and mask.shape != inputs.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and input_ids {tuple(inputs.shape)}: they must be the same."
        )
    paths.prepare_inference()
    loop = DecodingLoop(paths, sampler, request_keys, noise, kwargs.get("streamer"))
    result = GenerationMixin.generate(model, inputs, custom_generate=loop.run, **_with_stop_strings(model, kwargs))
    return (result, loop.record) if return_record else result


def _with_stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` with `stop_strings` as a stopping criterion: a custom loop gets no tokenizer."""
    kwargs = dict(kwargs)
    tokenizer, strings = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
    for config in (kwargs.get("generation_config"), model.generation_config):
        strings = strings or getattr(config, "stop_strings", None)
    if not strings:
        return kwargs
    strings = [strings] if isinstance(strings, str) else strings
    if not isinstance(strings, (list, tuple)) or not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"stop_strings={strings!r} must be a text or a list of texts, none of them empty.")
    if tokenizer is None:
        raise ValueError(f"stop_strings={strings!r} need the tokenizer: pass tokenizer=, too.")
    criteria = [*(kwargs.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
    return {**kwargs, "stop_strings": None, "stopping_criteria": StoppingCriteriaList(criteria)}
