"""Small bases of every kind, made on the spot, and what a user does with one.

- `KINDS`: settings that quantize a base
- `write_gguf`: a GGUF file with the weights and the tokenizer of a tiny Llama
- `write_adapter`: a PEFT adapter on a base
- `train`: a few steps on a base; `look`: at checkpoints in a process of its own
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import REPOSITORY
from tests.training_runs import SMALL, sums, train_here, write_jsonl, write_recipe

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Sizes that 4-bit formats can hold: rows of a multiple of 64."""
INT4 = {
    "_type": "IntxWeightOnlyConfig",
    "_version": 2,
    "_data": {
        "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
        "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}},
    },
}
KINDS = {
    "bitsandbytes 4": {"load_in_4bit": True},
    "bitsandbytes 4, nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "fp4"},
    "bitsandbytes 8": {"load_in_8bit": True},
    "torchao int8": {"quantization_config": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}},
    "torchao int8, dynamic": {
        "quantization_config": {"quant_method": "torchao", "quant_type": "Int8DynamicActivationInt8WeightConfig"}
    },
    "torchao int4": {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": INT4}}},
}
"""Settings of a recipe, or of `load_base`, that quantize a base."""


def write_gguf(base: Path, file: Path, kind: str = "F32") -> None:
    """Write the Llama in folder `base` as a GGUF file whose matrices are of `kind` (F32, Q8_0, Q4_1)."""
    import gguf

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        AutoTokenizer.from_pretrained(base),
    )
    config = model.config
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = (tensor if heads is None else _interleaved(tensor, heads)).numpy()
        if values.ndim > 1 and kind != "F32":
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(_gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection in the order that GGUF's rotary embedding wants: pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _gguf_name(name: str) -> str:
    parts = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def write_adapter(base: Path, folder: Path, seed: int = 3, **settings: Any) -> None:
    """Write a PEFT LoRA adapter with random weights on `base`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).save_pretrained(folder)


_LOOK = """
import contextlib, io, json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from l2d.__main__ import main
from lm_eval_ext.model import L2DLM

checkpoints, chat = json.loads(sys.argv[1]), sys.argv[2:]
prompts = ["Question: how many?", "The cat sat", "Natalia sold 48 clips"]
until = {"until": ["\\n"], "max_gen_toks": 6}

def scored(lm):
    texts = lm.generate_until([Instance("generate_until", {}, (p, dict(until)), i) for i, p in enumerate(prompts)])
    pairs = [(p, c) for p in prompts for c in (" yes", " 24")]
    return [texts, lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])]

found = []
for checkpoint, theirs in checkpoints:
    ours = scored(L2DLM(checkpoint, device="cpu", batch_size=1, diffusion_budget=1))
    theirs = scored(HFLM(device="cpu", batch_size=1, **theirs))
    sys.stdin = io.StringIO("How many?\\n")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["chat", checkpoint, *chat])
    found.append([ours, theirs, printed.getvalue()])
print("FOUND" + json.dumps(found))
"""


class Look(NamedTuple):
    """Texts and log-likelihoods of a checkpoint at budget 1 and of a base, by `lm_eval`; and what a chat prints."""

    l2d: list
    hf: list
    chat: str


def train(folder: Path, base: Path | str, rows: int = 8, **recipe: Any) -> Path:
    """Folder of a model that was trained on `base` for a few steps, with further settings of a recipe."""
    folder.mkdir(exist_ok=True)
    settings = {**SMALL, "variant": "lora", "lora_rank": 2, "base": str(base), **recipe}
    data = write_jsonl(folder / "data.jsonl", sums(rows))
    train_here(write_recipe(folder / "recipe.yaml", **settings, dataset=data, output_dir=folder / "l2d"))
    return folder / "l2d"


def look(checkpoints: list[tuple[Path, dict[str, Any]]], tokens: int = 3) -> list[Look]:
    """Look at checkpoints in one new process, each with arguments of `lm_eval`'s own class for its base."""
    pairs = [(str(checkpoint), theirs) for checkpoint, theirs in checkpoints]
    chat = ["--budget", "3", "--device", "cpu", "--max-new-tokens", str(tokens), "--tint"]
    command = [sys.executable, "-c", _LOOK, json.dumps(pairs), *chat]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    return [Look(*one) for one in json.loads(line.removeprefix("FOUND"))]
