"""A GGUF file as base: trained on, saved, loaded by name, evaluated, moved, and written as a plain model.

Run: `python -m pytest tests/bases/test_gguf.py` (half a minute)
"""

import importlib.util
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2d import L2DForCausalLM
from l2d.__main__ import main
from l2d.checkpoint.bases import load_base
from l2d.checkpoint.loading import load_tokenizer
from l2d.checkpoint.opening import open_checkpoint
from l2d.integrity import fingerprint
from lm_eval_ext.arguments import UsageError, parse_arguments
from tests.bases.making import SIZES, look, train, write_gguf
from tests.training_runs import BASELINE, SMALL, sums, train_here, write_jsonl, write_recipe
from training.recipe import read_recipe

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
FILE = "tiny.gguf"
IDS = torch.tensor([[1, 50, 60, 70, 80, 90]])


@pytest.fixture(scope="module")
def base(make_base):
    """Folder of the Llama that the files are made of."""
    return make_base("llama", **SIZES)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Folder that holds nothing but a GGUF file, of 8 bits per weight."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(base, folder / FILE, "Q8_0")
    return folder


def test_an_unquantized_file_is_the_model_that_it_was_made_of(base, tmp_path):
    write_gguf(base, tmp_path / FILE, "F32")
    model, plain = load_base(tmp_path, gguf_file=FILE), AutoModelForCausalLM.from_pretrained(base)
    assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-4)
    assert not hasattr(model.config, "quantization_config")
    text, ours = "Natalia sold 48 clips", AutoTokenizer.from_pretrained(base)
    theirs = load_tokenizer(str(tmp_path), gguf_file=FILE)
    assert theirs(text)["input_ids"][-5:] == ours(text)["input_ids"][-5:]
    assert theirs.chat_template == ours.chat_template and theirs.eos_token == "</s>"


def test_trained_saved_evaluated_and_talked_to(folder, tmp_path):
    trained = train(tmp_path, folder, base_gguf_file=FILE)
    (seen,) = look([(trained, {"pretrained": str(folder), "gguf_file": FILE})])
    assert seen.l2d == seen.hf and "3 tokens, " in seen.chat
    model = L2DForCausalLM.from_pretrained(trained)
    assert model.config.base_gguf_file == FILE and model.config.base_name_or_path == str(folder)
    assert model.config.base_fingerprint == fingerprint(model.base)
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)(IDS).logits)
    half = L2DForCausalLM.from_pretrained(trained, dtype="bfloat16")
    assert half.base.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def checkpoint(folder, tmp_path_factory):
    """A checkpoint on the file, beside a copy of it, without a tokenizer of its own."""
    together = tmp_path_factory.mktemp("together")
    shutil.copytree(folder, together / folder.name)
    L2DForCausalLM.from_base(together / folder.name, gguf_file=FILE).save_pretrained(together / "l2d")
    return together / "l2d"


def test_the_folder_of_both_may_move_and_the_tokenizer_is_the_files(checkpoint, folder, tmp_path):
    shutil.copytree(checkpoint.parent, tmp_path / "moved")
    settings = json.loads((tmp_path / "moved" / "l2d" / "config.json").read_text())
    settings["base_name_or_path"] = f"/nowhere/{folder.name}"
    (tmp_path / "moved" / "l2d" / "config.json").write_text(json.dumps(settings))
    opened = open_checkpoint(tmp_path / "moved" / "l2d")
    assert L2DForCausalLM.from_pretrained(opened).base.config.hidden_size == 64
    assert load_tokenizer(opened).chat_template == load_tokenizer(str(folder), gguf_file=FILE).chat_template


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_dequantize_writes_a_plain_model_that_is_the_same_base(checkpoint, folder, tmp_path, capsys, dtype):
    more = [] if dtype is None else ["--dtype", dtype]
    main(["dequantize", str(folder), str(tmp_path / "plain"), "--gguf-file", FILE, *more])
    assert f"weights in {dtype or 'float32'}" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert str(plain.dtype) == f"torch.{dtype or 'float32'}" and plain.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is not None
    model = L2DForCausalLM.from_pretrained(checkpoint, base=tmp_path / "plain")
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert (
        parse_arguments({"pretrained": str(checkpoint), "base": str(tmp_path / "plain")}).checkpoint.gguf_file is None
    )
    with pytest.raises(SystemExit):
        main(["dequantize", str(folder), str(tmp_path / "plain"), "--gguf-file", FILE])
    assert "holds something: name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora_sft", "full_sft"])
def test_the_baselines_are_trained_on_it_too(folder, tmp_path, method):
    data = write_jsonl(tmp_path / "data.jsonl", sums(8))
    settings = {**BASELINE, "method": method, "base": folder, "base_gguf_file": FILE, "dataset": data, "max_steps": 1}
    train_here(write_recipe(tmp_path / "recipe.yaml", **settings, output_dir=tmp_path / "out"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 64


REFUSED = {
    "no name": ({"base": "FOLDER"}, "holds no config.json but tiny.gguf: set base_gguf_file"),
    "another name": ({"base": "FOLDER", "base_gguf_file": "b.gguf"}, "which holds tiny.gguf: correct one of them"),
    "the file": ({"base": f"FOLDER/{FILE}"}, f"is a file: give its folder as base, and base_gguf_file (in Python "
                                             f"gguf_file) '{FILE}'"),
    "none there": ({"base": "PLAIN", "base_gguf_file": FILE}, "which holds no GGUF file: correct one of them"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence_before_anything_is_loaded(case, base, folder, tmp_path):
    """By the recipe, by `from_base` and, for a base in place of the recorded one, by `lm_eval`."""
    given, said = REFUSED[case]
    given = {key: v.replace("FOLDER", str(folder)).replace("PLAIN", str(base)) for key, v in given.items()}
    data = write_jsonl(tmp_path / "data.jsonl", sums(2))
    recipe = write_recipe(tmp_path / "recipe.yaml", **SMALL, **given, dataset=data, output_dir=tmp_path / "out")
    with pytest.raises(ValueError) as error:
        read_recipe(["--config", str(recipe)])
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="base"):
        L2DForCausalLM.from_base(given["base"], gguf_file=given.get("base_gguf_file"))


def test_a_replaced_base_is_looked_at_before_anything_is_loaded(checkpoint, folder, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(folder / FILE, tmp_path / "other" / "other.gguf")
    with pytest.raises(UsageError, match="holds no config.json but other.gguf"):
        parse_arguments({"pretrained": str(checkpoint), "base": str(tmp_path / "other")})
