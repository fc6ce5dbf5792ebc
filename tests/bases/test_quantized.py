"""Quantized bases: the main path is the quantized model, bit for bit, and the path is trained on top of it.

Run: `python -m pytest tests/bases/test_quantized.py` (a minute)
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2d import L2DConfig, L2DForCausalLM
from l2d.__main__ import main
from l2d.checkpoint.bases import load_base, load_plain_base
from l2d.integrity import fingerprint
from l2d.network.quantized import FrozenLinear, as_plain, dequantized
from lm_eval_ext.arguments import UsageError, parse_arguments
from tests.bases.making import KINDS, SIZES, look, train
from tests.conftest import randomise_path
from tests.training_runs import SMALL, sums, write_jsonl, write_recipe
from training.checkpointing.sharding import ShardedCheckpoints
from training.recipe import read_recipe

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

IDS = torch.tensor([[1, 50, 60, 70, 80, 90]])
PATH = dict(diffusion_dim=8, input_width=8, conditioning_width=8, frequency_width=8, lora_rank=2)


@pytest.fixture(scope="module")
def base(make_base):
    """The model that is quantized, stored in float32."""
    return make_base("llama", **SIZES)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    """Settings that quantize the base, one kind after the other."""
    return KINDS[request.param]


def test_trained_saved_evaluated_and_talked_to(base, tmp_path):
    """Each kind on the plain folder, beside the harness's own class on a saved folder of the quantized model."""
    pairs = []
    for number, settings in enumerate(KINDS.values()):
        stored = tmp_path / f"stored-{number}"
        load_base(base, dtype=torch.float32, **settings).save_pretrained(stored)
        AutoTokenizer.from_pretrained(base).save_pretrained(stored)
        pairs.append((train(tmp_path / str(number), base, **settings), {"pretrained": str(stored)}))
    for name, seen in zip(KINDS, look(pairs), strict=True):
        assert seen.l2d == seen.hf, name
        assert "3 tokens, " in seen.chat, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_main_path_is_the_quantized_model_before_and_after_its_first_use(base, kind, dtype):
    quantized, other = (load_base(base, dtype=dtype, **kind) for _ in range(2))
    before = fingerprint(quantized)
    assert before != fingerprint(AutoModelForCausalLM.from_pretrained(base))
    model = L2DForCausalLM.from_base(quantized, L2DConfig(**PATH))
    randomise_path(model)
    with torch.no_grad():
        expected = other(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
        model.generate(IDS, max_new_tokens=2, sampler={"budget": 3})
        assert torch.equal(model(IDS).logits, expected)
        answer = model.generate(IDS, max_new_tokens=4, do_sample=False, sampler={"budget": 1})
        assert torch.equal(answer, other.generate(IDS, max_new_tokens=4, do_sample=False))
    assert model.config.base_fingerprint == before == fingerprint(quantized) == fingerprint(other)
    assert {parameter.dtype for _, parameter in model.trained_parameters()} == {torch.float32}


def test_every_projection_has_deltas_and_their_gradients(base, kind):
    """They are those of the model of plain numbers that the codes stand for, as far as kernels agree."""
    quantized = load_base(base, dtype=torch.float32, **kind)
    with torch.no_grad():
        quantized(IDS)  # a library may lay its codes out anew
    plain = as_plain(load_base(base, dtype=torch.float32, **kind))
    found = []
    for one in (quantized, plain):
        torch.manual_seed(0)
        model = L2DForCausalLM.from_base(one, L2DConfig(warm_start=True, **PATH)).train()
        randomise_path(model, gain=0.2)
        state = model.paths.main_path(IDS)
        rows, index, time = torch.zeros(3, dtype=torch.int64), torch.tensor([1, 3, 5]), torch.tensor([0.2, 0.5, 0.9])
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
        hidden, _ = model.paths.path_hidden(state, rows, index, x, time)
        hidden.square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.trained_parameters()})
    layers = [name for name in found[0] if "lora_A" in name]
    assert len(layers) == 2 * 5  # query and output projection, and three of the MLP, in two layers
    for name, gradient in found[0].items():
        if "lora" in name:
            similar = torch.nn.functional.cosine_similarity(gradient.flatten(), found[1][name].flatten(), dim=0)
            assert gradient.abs().max() > 0 and similar > 0.95, name


def test_a_frozen_layer_is_the_bases_and_its_gradient_is_that_of_its_values(base, kind):
    layer = load_base(base, dtype=torch.float32, **kind).model.layers[0].mlp.down_proj
    for _ in range(2):  # before and after its first use
        inputs = torch.randn(3, 2, 128, requires_grad=True)
        outputs = FrozenLinear(layer)(inputs)
        assert torch.equal(outputs, layer(inputs.detach()))
        slope = torch.randn_like(outputs)
        outputs.backward(slope)
        assert torch.allclose(inputs.grad, slope @ dequantized(layer), atol=1e-5)
        with torch.no_grad():
            layer(torch.randn(1, 128))


def test_a_model_quantized_by_the_user_loads_again_by_itself(base, tmp_path, kind):
    """From its plain folder with the same settings, and from a folder of codes."""
    quantized = load_base(base, dtype=torch.bfloat16, **kind)
    quantized.save_pretrained(tmp_path / "stored")
    model = L2DForCausalLM.from_base(quantized, L2DConfig(**PATH))
    model.save_pretrained(tmp_path / "l2d")
    again = L2DForCausalLM.from_pretrained(tmp_path / "l2d")
    assert again.base.dtype == torch.bfloat16 and torch.equal(again(IDS).logits, model(IDS).logits)
    stored = L2DForCausalLM.from_pretrained(tmp_path / "l2d", base=tmp_path / "stored")
    assert torch.equal(stored(IDS).logits, model(IDS).logits)
    with pytest.raises(
        ValueError, match="dtype=torch.float32 cannot be applied to a quantized base, which was torch.bf"
    ):
        L2DForCausalLM.from_pretrained(tmp_path / "l2d", dtype=torch.float32)
    with pytest.raises(ValueError, match="variant='full' trains copies .* q_proj is quantized: use variant='lora'"):
        L2DForCausalLM.from_base(tmp_path / "stored", L2DConfig(variant="full", **PATH))


def test_dequantize_writes_the_values(base, tmp_path, kind):
    load_base(base, dtype=torch.float32, **kind).save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "stored")
    main(["dequantize", str(tmp_path / "stored"), str(tmp_path / "plain")])
    plain, stored = AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), load_base(tmp_path / "stored")
    assert not hasattr(plain.config, "quantization_config")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        values = dequantized(stored.model.layers[1].get_submodule(name))
        assert torch.equal(plain.model.layers[1].get_submodule(name).weight, values.float())
        original = AutoModelForCausalLM.from_pretrained(base).model.layers[1].get_submodule(name).weight
        assert (values - original).abs().mean() < 0.15 * original.abs().mean()


def test_an_adapter_of_a_quantized_base_is_merged_into_its_values(base, tmp_path):
    load_base(base, dtype=torch.float32, load_in_8bit=True).save_pretrained(tmp_path / "stored")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_base(tmp_path / "stored"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="its own base is quantized, .*python -m l2d dequantize"):
        load_base(tmp_path / "adapter")
    merged, values = load_plain_base(tmp_path / "adapter"), load_plain_base(tmp_path / "stored")
    assert not torch.equal(
        merged.model.layers[0].self_attn.q_proj.weight, values.model.layers[0].self_attn.q_proj.weight
    )
    assert torch.equal(merged.model.layers[0].self_attn.v_proj.weight, values.model.layers[0].self_attn.v_proj.weight)
    with pytest.raises(ValueError, match="an adapter is merged into a base that is not quantized"):
        load_base(tmp_path / "adapter", load_in_4bit=True)


REFUSED = {
    "full": (
        {"load_in_4bit": True, "variant": "full", "lora_rank": None},
        "variant=full trains copies .* load_in_4bit quantizes them",
    ),
    "both": ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit exclude each other"),
    "no 4 bits": ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type would be ignored: set load_in_4bit too"),
    "type": ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type='int4' is not known"),
    "TRL's name": ({"load_in_4bit": True, "use_bnb_nested_quant": True}, "did you mean 'bnb_4bit_use_double_quant'"),
    "method": ({"quantization_config": {"quant_method": "gptq"}}, "quantization by 'gptq' is not supported"),
    "no method": ({"quantization_config": {"bits": 4}}, "must be a mapping with quant_method"),
    "GGUF": ({"load_in_8bit": True, "base_gguf_file": "tiny.gguf"}, "load_in_8bit cannot be applied to a GGUF file"),
    "baseline": ({"load_in_4bit": True, "method": "lora_sft"}, "load_in_4bit would be ignored by method lora_sft"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_are_refused_before_anything_is_loaded(case, base, tmp_path):
    given, said = REFUSED[case]
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    (folder / "tiny.gguf").touch()
    (folder / "model.safetensors").unlink()
    start = {**SMALL, "variant": "lora", "lora_rank": 2}
    start = {name: start[name] for name in ("learning_rate", "max_steps")} if given.get("method") else start
    data = write_jsonl(tmp_path / "data.jsonl", sums(2))
    recipe = write_recipe(
        tmp_path / "r.yaml", **{**start, **given}, base=folder, dataset=data, output_dir=tmp_path / "o"
    )
    with pytest.raises(ValueError, match=said) as error:
        read_recipe(["--config", str(recipe)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_folders_of_other_codes_are_refused_by_their_configuration(method, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"quantization by '{method}' is not supported, since nothing can be trained"):
        load_base(tmp_path / "base")


def test_a_quantized_output_head_is_refused(base):
    quantized = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["nothing"]}
    with pytest.raises(ValueError, match="embedding or output head, a bitsandbytes.*has quantized weights"):
        L2DForCausalLM.from_base(base, quantization_config=quantized)


def test_lm_eval_takes_what_is_recorded_and_nothing_else(base, tmp_path):
    L2DForCausalLM.from_base(base, L2DConfig(**PATH), load_in_4bit=True).save_pretrained(tmp_path)
    recorded = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_8bit": False}
    assert parse_arguments({"pretrained": str(tmp_path), **recorded}).harness == {}
    for name, value in {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4", "gguf_file": "a.gguf"}.items():
        with pytest.raises(UsageError, match=f"{name}={value!r} is not how the base of"):
            parse_arguments({"pretrained": str(tmp_path), name: value})


@pytest.mark.parametrize(
    ("stage", "fp16", "words"),
    [
        (3, False, "ZeRO-3 cannot spread the weights of a quantized base: launch with fsdp2.yaml"),
        (2, True, "fp16=True with sharding would round the trained weights: use bf16: true"),
        (3, True, "fp16=True with sharding"),
        (2, False, None),
    ],
)
def test_what_sharded_training_cannot_hold_is_refused(base, kind, stage, fp16, words):
    """Asked by a trainer that is sharded, before it spreads anything."""
    model = SimpleNamespace(base=load_base(base, **kind))
    plugin = SimpleNamespace(deepspeed_config={})
    trainer = SimpleNamespace(
        args=SimpleNamespace(fp16=fp16, bf16=False), model=model, _zero_stage=stage, is_fsdp_enabled=False,
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), _trained=list,
    )  # fmt: skip
    if words is None:
        ShardedCheckpoints._keep_float32(trainer)
        return
    with pytest.raises(ValueError, match=words):
        ShardedCheckpoints._keep_float32(trainer)


@pytest.mark.parametrize("name", ["bitsandbytes 4", "torchao int8"])
def test_the_path_of_a_quantized_base_can_be_compiled(base, name):
    torch._dynamo.reset()
    model = L2DForCausalLM.from_base(load_base(base, **KINDS[name]), L2DConfig(**PATH)).eval()
    randomise_path(model)
    plain = model.score(IDS, sampler={"budget": 5}).logprobs
    model.compile_path("aot_eager")
    assert torch.equal(model.score(IDS, sampler={"budget": 5}).logprobs, plain)
