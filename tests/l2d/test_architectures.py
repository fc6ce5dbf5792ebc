"""One implementation for every base: the twin of each known architecture, checked against that base's own forward.

With gates 1, scales and shifts 0 and the base's input stream as input, the diffusion stream must be the main path's.
With keys and values of other positions it must not be.
"""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from l2d import L2DConfig, L2DForCausalLM

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
EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    first_k_dense_replace=1,
)
LATENT = dict(
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
    head_dim=4,
    num_key_value_heads=4,
)
SLIDING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
GRANITE = dict(residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=2.0, embedding_multiplier=3.0)
GEMMA = dict(sliding_window=4, query_pre_attn_scalar=8)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=16.0, original_max_position_embeddings=4)
# Every decoder-only type that can be a base, with the settings that switch on what is special about it.
KNOWN = {
    "afmoe": EXPERTS | SLIDING,
    "apertus": {},
    "arcee": {},
    "aria_text": EXPERTS,
    "axk1": EXPERTS | LATENT,
    "bitnet": {},
    "cwm": SLIDING,
    "deepseek_v2": EXPERTS | LATENT,
    "deepseek_v3": EXPERTS | LATENT,
    "dots1": EXPERTS | SLIDING | dict(n_shared_experts=1),
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS,
    "exaone4": SLIDING,
    "exaone_moe": EXPERTS | SLIDING,
    "flex_olmo": EXPERTS,
    "flint": EXPERTS | SLIDING,
    "gemma": {},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": EXPERTS | LATENT,
    "gpt_oss": EXPERTS | SLIDING,
    "granite": GRANITE,
    "granite_swa": GRANITE | SLIDING,
    "granitemoe": GRANITE | EXPERTS,
    "granitemoehybrid": GRANITE | dict(layers_block_type=["attention"] * 3, num_local_experts=0, mamba_n_heads=8),
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": EXPERTS,
    "hy_v3": EXPERTS,
    "hyperclovax": GRANITE | dict(use_post_norm=True),
    "internlm3": {},
    "jais2": {},
    "kolibri1": EXPERTS | SLIDING,
    "laguna": EXPERTS | SLIDING,
    "llama": {},
    "mellum": EXPERTS | SLIDING,
    "mimo_v2_flash": EXPERTS | SLIDING,
    "minimax_m2": EXPERTS,
    "ministral": SLIDING,
    "ministral3": dict(rope_parameters=YARN | dict(llama_4_scaling_beta=0.5, mscale=1.0, mscale_all_dim=1.0)),
    "mistral": dict(sliding_window=5),
    "mixtral": EXPERTS,
    "nemotron": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": EXPERTS,
    "persimmon": {},
    "phi3": dict(pad_token_id=0),
    "phimoe": EXPERTS | dict(sliding_window=5),
    "qwen2": {},
    "qwen2-sliding": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen2_moe": EXPERTS | SLIDING | dict(use_sliding_window=True),
    "qwen3": {},
    "qwen3_moe": EXPERTS | dict(norm_topk_prob=True),
    "seed_oss": {},
    "smollm3": dict(no_rope_layer_interval=2),
    "solar_open": EXPERTS,
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": GEMMA,
    "youtu": LATENT,
}
EAGER = {"gemma2", "flint", "gpt_oss", "granite_swa", "mimo_v2_flash", "vaultgemma"}
OTHERS = {
    "beam": EXPERTS | SLIDING,
    "deepseek_v32": EXPERTS | LATENT,
    "gemma4_text": dict(hidden_size_per_layer_input=0),
    "granitemoeshared": EXPERTS | dict(shared_intermediate_size=24),
    "minicpm3": LATENT,
}
SMALL_PATH = dict(diffusion_dim=8, input_width=8, conditioning_width=8, frequency_width=8, lora_rank=2)


def make_base(name: str) -> PreTrainedModel:
    """A tiny random base, with vectors (weights of norms, biases, sinks) that are not what they start from."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-")[0], **{**SMALL, **KNOWN.get(name, {}), **OTHERS.get(name, {})})
    attention = "eager" if name in EAGER else "sdpa"
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return base


def build(name: str, **path) -> L2DForCausalLM:
    """An L2D model with a fresh path around a tiny random base."""
    return L2DForCausalLM.from_base(make_base(name), L2DConfig(**{**SMALL_PATH, **path})).eval()


def stream(
    model: L2DForCausalLM, ids: torch.Tensor, mask: torch.Tensor | None, roll: int = 0, last: bool = False
) -> tuple:
    """The warm-started path's hidden states and the main path's, (N, H) each, at all unpadded positions or the last."""
    state = model.paths.main_path(ids, mask)
    for kept in state.layers:
        kept.keys, kept.values = kept.keys.roll(roll, 2), kept.values.roll(roll, 2)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if last:
        state, valid = state.last(), valid[:, -1:]
    rows, index = torch.nonzero(valid, as_tuple=True)
    noise = 64 * torch.randn(len(rows), SMALL_PATH["diffusion_dim"], generator=torch.Generator().manual_seed(3))
    _, own = model.paths.path_hidden(state, rows, index, noise, torch.full((len(rows),), 0.7))
    return own, state.hidden[rows, index]


@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("name", sorted(KNOWN))
@torch.no_grad()
def test_an_open_path_is_the_main_path(name, variant):
    """As a warm start has it at first: gates 1, scales and shifts 0, and the base's input stream as input."""
    model = build(name, variant=variant, warm_start=True)
    ids = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for attention_mask, last in itertools.product((None, mask), (False, True)):
        own, main = stream(model, ids, attention_mask, last=last)
        torch.testing.assert_close(own, main, rtol=1e-4, atol=1e-4 * float(main.abs().max()))
    own, main = stream(model, ids, None, roll=1)
    assert float((own - main).abs().max()) > 1e-2 * float(main.abs().max())


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("name", sorted(KNOWN))
@torch.no_grad()
def test_logits_are_the_bases_at_t_zero_and_with_a_fresh_path(name, warm_start):
    model = build(name, warm_start=warm_start)
    ids = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = model.base(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.paths.base_logits(model.paths.main_path(ids)), expected)
    generated = model.generate(ids, max_new_tokens=4, sampler={"budget": 7})
    assert torch.equal(generated, model.base.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    ("family", "settings"),
    [("cohere", {}), ("gpt2", {}), ("mamba", {}), ("gpt_neox", {}), ("olmo", {}), ("qwen3_next", EXPERTS)],
)
def test_other_layouts_are_refused_by_name(family, settings):
    config = AutoConfig.for_model(family, **{k: v for k, v in SMALL.items() if k != "head_dim"}, **settings)
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="not supported") as error:
        L2DForCausalLM.from_base(base, L2DConfig(**SMALL_PATH))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("doge", "input_residual"),  # weights of the residual stream
        ("minicpm3", "residual_scale"),
        ("granitemoeshared", "shared_mlp"),  # a second MLP
        ("beam", "input attention_scaling"),  # and residuals that shrink with depth
        ("gemma4_text", r"self_attn\(shared_kv_states\)"),  # keys of another layer
        ("deepseek_v32", r"self_attn\.indexer"),  # keys are chosen
    ],
)
def test_layers_with_parts_that_the_path_would_leave_out_are_refused(family, part):
    with pytest.raises(ValueError, match=f"not supported.*{part}"):
        build(family)


def test_other_logits_than_those_of_a_scaled_head_are_refused():
    base = make_base("llama")
    forward = base.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits + 1.0
        return output

    base.forward = shifted
    with pytest.raises(ValueError, match="'llama' is not supported: its logits are neither"):
        L2DForCausalLM.from_base(base, L2DConfig(**SMALL_PATH))
    assert "forward" not in vars(base.model)  # what stood in for the decoder is gone


def test_attention_that_is_not_one_call_is_refused():
    model = build("diffllama")  # two calls of the attention interface, each with half of the values
    with pytest.raises(ValueError, match="DiffLlamaAttention are not supported"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt_oss", "hunyuan_v1_moe", "ministral3", "phimoe", "starcoder2"])
@torch.no_grad()
def test_merged_and_speculative_decoding_of_a_trained_path_is_the_sequential_one(name):
    """Deltas of experts are not merged; positions, sinks and latent keys are those of the step that is decoded."""
    model = build(name)
    for _, parameter in model.trained_parameters():
        parameter.normal_(std=1.0)
    ids = torch.tensor([[5, 6, 7]])
    fast = model.generate(ids, max_new_tokens=8)
    assert torch.equal(fast, model.generate(ids, max_new_tokens=8, sampler={"speculation": False, "draft_tokens": 0}))
    assert not torch.equal(fast, model.generate(ids, max_new_tokens=8, sampler={"budget": 1}))


def test_modules_that_peft_has_no_deltas_for_are_named(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no `target_modules`")

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    with pytest.raises(ValueError, match="variant='lora' is not possible for LlamaAttention.*use variant='full'"):
        build("llama")
    build("llama", variant="full")
