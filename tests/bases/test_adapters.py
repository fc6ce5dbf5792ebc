"""A PEFT adapter as base: merged, trained on, loaded again by its name; and models with adapters in them are refused.

Run: `python -m pytest tests/bases/test_adapters.py` (half a minute)
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from l2d import L2DForCausalLM
from l2d.__main__ import main
from l2d.checkpoint.bases import base_configuration, load_base
from l2d.integrity import fingerprint
from tests.bases.making import SIZES, look, train, write_adapter
from training.config import ModelArguments
from training.data.tokenizer import generation_config

IDS = torch.tensor([[1, 50, 60, 70, 80, 90]])


@pytest.fixture(scope="module")
def base(make_base):
    """The model that adapters are on."""
    return make_base("llama", **SIZES)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Folder of a LoRA adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(base, folder)
    return folder


KINDS = {
    "lora": {},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 16},
    "a module of its own": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_model_with_the_adapter(base, tmp_path, kind):
    settings = dict(KINDS[kind])
    torch.manual_seed(3)
    config = LoraConfig(r=2, **{"target_modules": ["q_proj", "down_proj"], **settings}, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    merged = load_base(tmp_path / "adapter")
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    expected = with_adapter(IDS).logits
    assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(IDS).logits, expected, atol=1e-2)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_trained_saved_evaluated_and_talked_to(adapter, tmp_path):
    """The tokenizer is that of the adapter's base. `dequantize` writes the merged model, which `lm_eval` takes."""
    main(["dequantize", str(adapter), str(tmp_path / "merged")])
    trained = train(tmp_path, adapter)
    (seen,) = look([(trained, {"pretrained": str(tmp_path / "merged")})])
    assert seen.l2d == seen.hf and "3 tokens, " in seen.chat
    model = L2DForCausalLM.from_pretrained(trained)
    assert model.config.base_name_or_path == str(adapter)
    assert model.config.base_fingerprint == fingerprint(load_base(adapter, dtype=torch.bfloat16))


def test_training_stops_answers_where_the_adapters_base_does(base, adapter):
    config = base_configuration(adapter)
    ends = generation_config(ModelArguments(base=str(adapter)), config).eos_token_id
    assert ends == generation_config(ModelArguments(base=str(base)), config).eos_token_id == 2


def test_the_folder_of_all_three_may_move(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / base.name)
    shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = f"/nowhere/{base.name}"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert fingerprint(load_base(tmp_path / "adapter")) == fingerprint(load_base(adapter))


def _prompt_tuning(base, folder):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def _beside_a_model(base, folder):
    shutil.copytree(base, folder)
    write_adapter(base, folder)


def _of_no_base(base, folder):
    write_adapter(base, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))


def _of_another_size(base, folder):
    write_adapter(base, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "r": 3}))


REFUSED = {
    "prompt tuning": (_prompt_tuning, "PromptTuningConfig is no change of weights that could be merged"),
    "beside a model": (_beside_a_model, "it holds a model and an adapter: give each a folder of its own"),
    "of no base": (_of_no_base, "it is an adapter that does not say what it was trained on"),
    "of another size": (_of_another_size, "size mismatch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_merged_are_refused(case, base, tmp_path):
    make, said = REFUSED[case]
    make(base, tmp_path / "adapter")
    with pytest.raises(ValueError) as error:
        L2DForCausalLM.from_base(tmp_path / "adapter")
    assert said in str(error.value) and "\n" not in str(error.value)


# ---- models with other layers than they say ----------------------------------------------------------------------


class OtherLinear(nn.Linear):
    """Multiplies and does something else."""

    def forward(self, inputs):
        return super().forward(inputs).clamp(-1, 1)


class Wrapped(nn.Module):
    """A layer around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs)


def _injected(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))


def _on_the_embedding(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["embed_tokens"]))


def _replaced(model):
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = OtherLinear(old.in_features, old.out_features, bias=False)


def _unused_wrapped(model):
    model.model.layers[0].self_attn.k_proj = Wrapped(model.model.layers[0].self_attn.k_proj)


CHANGED = {
    "injected adapters": (_injected, r"the base has adapters in it .*give the adapter's folder or hub name as base"),
    "on the embedding": (_on_the_embedding, r"the base has adapters in it .*embed_tokens"),
    "another class": (_replaced, r"has a up_proj of the class tests.bases.test_adapters.OtherLinear.*unquantized"),
    "a wrapped projection": (_unused_wrapped, r"has a k_proj of the class tests.bases.test_adapters.Wrapped"),
}


@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("case", CHANGED)
def test_a_model_with_layers_that_would_not_be_trained_is_refused(case, variant, base):
    from l2d import L2DConfig

    change, said = CHANGED[case]
    model = AutoModelForCausalLM.from_pretrained(base)
    change(model)
    with pytest.raises(ValueError, match=said):
        L2DForCausalLM.from_base(model, L2DConfig(variant=variant))


def test_a_peft_model_is_refused_with_the_remedy(base, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with pytest.raises(ValueError, match="base is a PeftModel: .*with an adapter merged.*which may be an adapter's"):
        L2DForCausalLM.from_base(model)


# ---- what is recorded gives the base back, or a warning says that it does not ------------------------------------


@pytest.fixture
def warned(monkeypatch):
    """Warnings of L2D models."""
    import l2d.modeling

    said = []
    monkeypatch.setattr(l2d.modeling.logger, "warning_once", said.append)
    return said


def _trained_on(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
    return model


def _merged_by_hand(base, tmp_path):
    write_adapter(base, tmp_path / "adapter")
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).merge_and_unload()


def _folder_gone(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    return model


def _as_it_is(base, tmp_path):
    return AutoModelForCausalLM.from_pretrained(base)


def _in_another_dtype(base, tmp_path):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)


LOST = {
    "as it is": (_as_it_is, None),
    "in another dtype": (_in_another_dtype, None),
    "changed": (_trained_on, "q_proj.weight differs): save the base, and start from that folder"),
    "merged by hand": (_merged_by_hand, "differs): save the base"),
    "folder gone": (_folder_gone, "which is no folder: save the base there"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_base_that_its_name_does_not_give_back_is_said(case, base, tmp_path, warned):
    change, said = LOST[case]
    model = L2DForCausalLM.from_base(change(base, tmp_path))
    assert (warned == []) if said is None else (said in warned[0])
    model.save_pretrained(tmp_path / "l2d")
    assert len(warned) == (0 if said is None else 2)


def test_a_base_without_a_name_is_said_when_it_is_saved(base, tmp_path, warned):
    unnamed = AutoModelForCausalLM.from_pretrained(base)
    unnamed.config._name_or_path = ""
    model = L2DForCausalLM.from_base(unnamed)
    assert warned == []
    model.save_pretrained(tmp_path / "l2d")
    assert "no name is recorded for its base" in warned[0]
