"""The demo's data, tokenizer and base pre-training.

    pytest tests/training/test_demo_data.py

* problems, splits and the tokenizer; the harness's tasks hold out exactly the demo's test problems
* labels of the base's training rows; a base is trained until its target and saved with its tokenizer
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.demo import base as demo_base
from training.demo.data import SKILLS, build_splits, build_tokenizer, problem, split_of, write_data

TASKS = Path(__file__).parents[2] / "lm_eval_ext" / "tasks" / "demo"


def test_problems_have_reversed_digits():
    assert problem("products", 347, 6) == {"prompt": "^347*6=", "completion": "2802"}
    assert problem("sums", 58, 67) == {"prompt": "^58+67=", "completion": "521"}


@pytest.mark.parametrize(("skill", "total"), [("products", 7200), ("sums", 8100)])
def test_splits_are_disjoint_and_complete(skill, total):
    splits = {name: {row["prompt"] for row in rows} for name, rows in build_splits(skill).items()}
    assert sum(map(len, splits.values())) == total == len(set.union(*splits.values()))
    assert 0.9 < len(splits["test"]) / (total / 7) < 1.1
    assert all(split_of(prompt) == name for name, prompts in splits.items() for prompt in prompts)


def test_data_are_the_same_every_time(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    assert write_data(first) == write_data(second)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize("skill", SKILLS)
def test_tasks_hold_out_the_test_split(skill):
    spec = importlib.util.spec_from_file_location("problems", TASKS / "problems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = module.held_out(skill, version=1.0, pretrained="anything")["test"]
    ours = build_splits(skill)["test"]
    assert [(row["prompt"], row["answer"]) for row in rows] == [(row["prompt"], row["completion"]) for row in ours]


def test_tokenizer_is_one_token_per_character(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "^347*6=2802$"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "347*6=2802"
    assert tokenizer.decode(tokenizer("x\n7")["input_ids"]) == "??7"
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_labels_are_the_answer_and_the_end():
    tokenizer = build_tokenizer()
    input_ids, labels = demo_base.encode_rows([problem("products", 347, 6), problem("sums", 10, 11)], tokenizer)
    assert input_ids.shape == labels.shape == (2, demo_base.WIDTH)
    assert [tokenizer.decode(row[row != -100]) for row in labels] == ["2802$", "12$"]
    assert tokenizer.decode(input_ids[1]) == "^10+11=12$__"


def test_accuracy_needs_every_token():
    tokenizer = build_tokenizer()
    input_ids, labels = demo_base.encode_rows([problem("products", 347, 6)], tokenizer)

    class Oracle(torch.nn.Module):
        """Predicts the next token, except at position `wrong`."""

        def forward(self, input_ids):
            following = torch.nn.functional.one_hot(input_ids.roll(-1, 1), len(tokenizer)).float()
            following[:, self.wrong] *= -1
            return type("Output", (), {"logits": following})

    oracle = Oracle()
    for wrong, expected in ((2, 1.0), (8, 0.0), (10, 0.0)):
        oracle.wrong = wrong
        assert demo_base.accuracy(oracle, input_ids, labels) == expected


@pytest.mark.slow
def test_base_is_trained_to_its_target_and_saved(tmp_path, monkeypatch):
    write_data(tmp_path / "data")
    monkeypatch.setattr(demo_base, "TARGET_ACCURACY", 0.001)
    monkeypatch.setattr(demo_base, "CHECK_EVERY", 20)
    result = demo_base.train_base(tmp_path / "data", tmp_path / "base", log=lambda line: None)
    assert result == json.loads((tmp_path / "base" / "pretraining.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 64)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    rows = build_splits("products")["validation"]
    assert demo_base.accuracy(model, *demo_base.encode_rows(rows, tokenizer)) == result["products"] >= 0.001


def test_base_that_misses_its_target_is_an_error(tmp_path, monkeypatch):
    write_data(tmp_path / "data")
    monkeypatch.setattr(demo_base, "MAX_STEPS", 2)
    with pytest.raises(RuntimeError, match="did not solve 50% of the products within 2 steps"):
        demo_base.train_base(tmp_path / "data", tmp_path / "base")
    assert not (tmp_path / "base").exists()
