"""Decoding token by token: a main-path step, a diffusion solve, a choice of the output token.

- `generate`: transformers' own `generate`, with its preparation of arguments, around our decoding loop

What the loop does is in `decoding.py`.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin

from l2d.decoding import DecodingLoop
from l2d.sampler_config import SamplerConfig

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM

_REFUSED = {
    "num_beams": "beam search is not part of the L2D sampler; leave num_beams at 1",
    "assistant_model": "assisted decoding is not part of the L2D sampler; leave assistant_model out",
    "past_key_values": "the sampler keeps its own cache; leave past_key_values out",
    "inputs_embeds": "the sampler needs token ids; pass input_ids",
    "custom_generate": "the L2D sampler is the generate function; leave custom_generate out",
    "prompt_lookup_num_tokens": "the L2D sampler drafts with the base; set draft_tokens in sampler instead",
    "guidance_scale": "guidance belongs to the L2D sampler; set guidance_scale and guidance_class in sampler instead",
    "output_attentions": "the sampler keeps no attention weights; leave output_attentions out",
    "output_hidden_states": "the sampler keeps no hidden states; leave output_hidden_states out",
}


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
        given = kwargs.get(name)
        if given is not None and given is not False and not (name in ("num_beams", "guidance_scale") and given == 1):
            raise ValueError(f"{name} cannot be used: {reason}.")
    if inputs is None:
        inputs = kwargs.pop("input_ids", None)
    if inputs is None or inputs.dim() != 2 or inputs.shape[1] == 0:
        raise ValueError("input_ids must be a tensor of shape (rows, length) with at least one token per row.")
    sampler = model.sampler(sampler)
    if noise is not None and sampler.votes > 1:
        raise ValueError(f"noise gives one start per token, and votes={sampler.votes} need several: leave votes at 1.")
    model.prepare_inference()
    loop = DecodingLoop(model, sampler, request_keys, noise, kwargs.get("streamer"))
    result = GenerationMixin.generate(model, inputs, custom_generate=loop.run, **{**kwargs, "use_cache": True})
    return (result, loop.record) if return_record else result
