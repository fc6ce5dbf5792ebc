"""One implementation for every base: the twin of each known architecture, checked against that base's own forward.

With gates 1, scales and shifts 0 and the token embeddings as input, the diffusion stream must be the main path's. With
keys and values of other positions it must not be.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from l2d import L2DConfig, L2DForCausalLM
from l2d.attention import QueryLayout

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    initializer_range=0.2,
)
KNOWN = {
    "llama": {},
    "qwen2": {},
    "qwen2-sliding": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": {},
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True),
    "mistral": dict(sliding_window=5),
    "smollm3": dict(no_rope_layer_interval=2),
    "gemma": {},
    "gemma2": dict(sliding_window=4, query_pre_attn_scalar=8),
    "gemma3_text": dict(sliding_window=4, query_pre_attn_scalar=8),
    "olmo2": {},
    "granite": dict(residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=2.0, embedding_multiplier=3.0),
    "phi3": dict(pad_token_id=0),
}
OTHERS = {
    "minicpm3": dict(q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8),
    "hunyuan_v1_moe": dict(num_experts=4, moe_intermediate_size=24),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=24, first_k_dense_replace=1),
}
SMALL_PATH = dict(diffusion_dim=8, input_width=8, conditioning_width=8, frequency_width=8, lora_rank=2)


def build(name: str, attention: str = "sdpa", **path) -> L2DForCausalLM:
    """An L2D model with a fresh path around a tiny random base."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-")[0], **{**SMALL, **KNOWN.get(name, {}), **OTHERS.get(name, {})})
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    return L2DForCausalLM.from_base(base, L2DConfig(**{**SMALL_PATH, **path})).eval()


def stream(model: L2DForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None, roll: int = 0) -> tuple:
    """The open path's hidden stream and the main path's, both (N, H), at all unpadded positions."""
    first = {}
    hook = model._decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: first.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    state = model.main_path(ids, mask)
    hook.remove()
    for kept in state.layers:
        kept.keys, kept.values = kept.keys.roll(roll, 2), kept.values.roll(roll, 2)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    rows, index = torch.nonzero(valid, as_tuple=True)
    layout = QueryLayout(state, rows, index)
    hidden = first["x"][rows, index]
    modulation = hidden.new_zeros(len(rows), 6, hidden.shape[-1])
    modulation[:, [2, 5]] = 1.0  # gates
    for layer, kept in zip(model.path.layers, state.layers, strict=True):
        modulation[:, 0], modulation[:, 3] = layer.twin.norm_weights()  # scales
        hidden = layer(hidden, modulation.flatten(1), None, layout, kept)
    return hidden, state.hidden[rows, index]


@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("name", sorted(KNOWN))
@torch.no_grad()
def test_an_open_path_is_the_main_path(name, variant):
    model = build(name, "eager" if name == "gemma2" else "sdpa", variant=variant)
    ids = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for attention_mask in (None, mask):
        own, main = stream(model, ids, attention_mask)
        torch.testing.assert_close(own, main, rtol=1e-4, atol=1e-4 * float(main.abs().max()))
    own, main = stream(model, ids, None, roll=1)
    assert float((own - main).abs().max()) > 1e-2 * float(main.abs().max())


@pytest.mark.parametrize("name", sorted(KNOWN))
@torch.no_grad()
def test_logits_are_the_bases_at_t_zero_and_with_a_fresh_path(name):
    model = build(name, "eager" if name == "gemma2" else "sdpa")
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = model.base(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.base_logits(model.main_path(ids)), expected)
    generated = model.generate(ids, max_new_tokens=4, sampler={"budget": 7})
    assert torch.equal(generated, model.base.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(("family", "settings"), [("cohere", {}), ("gpt2", {}), ("mamba", {}), ("gpt_neox", {})])
def test_other_layouts_are_refused_by_name(family, settings):
    config = AutoConfig.for_model(family, **{k: v for k, v in SMALL.items() if k != "head_dim"}, **settings)
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="not supported") as error:
        L2DForCausalLM.from_base(base, L2DConfig(**SMALL_PATH))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("glm4", "post_self_attn_layernorm"),  # norms that Llama's layout does not have
        ("hyperclovax", "post_norm1"),
        ("doge", "input_residual"),  # weights of the residual stream
        ("minicpm3", "residual_scale"),
        ("ministral3", r"self_attn\(position_ids\)"),
    ],
)
def test_layers_with_parts_that_the_path_would_leave_out_are_refused(family, part):
    with pytest.raises(ValueError, match=f"not supported.*{part}"):
        build(family)


def test_attention_that_is_not_one_call_is_refused():
    model = build("diffllama")  # two calls of the attention interface, each with half of the values
    with pytest.raises(ValueError, match="DiffLlamaAttention are not supported"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


@torch.no_grad()
def test_deltas_of_experts_are_not_merged():
    model = build("hunyuan_v1_moe")
    for _, parameter in model.trained_parameters():
        parameter.normal_(std=0.3)
    ids = torch.tensor([[5, 6, 7]])
    fast = model.generate(ids, max_new_tokens=8)
    assert torch.equal(fast, model.generate(ids, max_new_tokens=8, sampler={"speculation": False, "draft_tokens": 0}))
    assert not torch.equal(fast, model.generate(ids, max_new_tokens=8, sampler={"budget": 1}))


def test_modules_that_peft_has_no_deltas_for_are_named(monkeypatch):
    """Which ones these are depends on PEFT's version: 0.21 refuses Dots1's, 0.18 takes them."""

    def refuse(*args, **kwargs):
        raise ValueError("no `target_modules`")

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    with pytest.raises(ValueError, match="variant='lora' is not possible for LlamaAttention.*use variant='full'"):
        build("llama")
    build("llama", variant="full")
    build("dots1", variant="full")
