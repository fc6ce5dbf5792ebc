"""A checkpoint is opened once: how often its `config.json` is read, and what of it is refused before torch is loaded.

Run: `python -m pytest tests/l2d/test_opening.py`
"""

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager

from l2d import L2DForCausalLM
from l2d.__main__ import main
from l2d.checkpoint.opening import Checkpoint, open_checkpoint
from lm_eval_ext.__main__ import main as lm_eval
from lm_eval_ext.arguments import UsageError, parse_arguments
from lm_eval_ext.model import L2DLM
from tests.integration.harness import TASKS
from tests.training_runs import write_jsonl
from training.compare_budgets.__main__ import main as compare_budgets

_opened: list[str] = []  # an audit hook cannot be removed


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str) and arguments[0].endswith("config.json"):
        _opened.append(arguments[0])


sys.addaudithook(_note)


@pytest.fixture
def reads():
    """How often a checkpoint's `config.json` has been opened so far in the test."""
    _opened.clear()
    return lambda folder: sum(Path(name).absolute() == folder / "config.json" for name in _opened)


def test_an_lm_eval_run_reads_the_settings_once(l2d_dir, reads, monkeypatch, tmp_path):
    few = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", few)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    words = f"--model l2d --model_args pretrained={l2d_dir},diffusion_budget=3 --tasks l2d_test_choice --limit 2"
    lm_eval([*words.split(), "--include_path", str(TASKS), "--output_path", str(tmp_path)])
    assert list(tmp_path.glob("**/results_*.json"))
    assert reads(l2d_dir) == 1


def test_every_other_way_reads_them_once(l2d_dir, reads, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}] * 2)
    L2DForCausalLM.from_pretrained(l2d_dir)
    assert reads(l2d_dir) == 1
    main(["trace", str(l2d_dir), "--prompt", "1 + 1", "--budget", "3", "--max-new-tokens", "2", "--device", "cpu"])
    assert reads(l2d_dir) == 2
    one = ["--times", "0.5", "--budgets", "1", "--device", "cpu"]
    compare_budgets([str(l2d_dir), "--data", str(data), *one])
    assert reads(l2d_dir) == 3
    L2DLM(pretrained=str(l2d_dir), device="cpu")
    assert reads(l2d_dir) == 4
    capsys.readouterr()


def test_an_open_checkpoint_is_taken_everywhere(l2d_dir, reads, base_dir):
    opened = open_checkpoint(l2d_dir, base=base_dir)
    assert open_checkpoint(opened) is opened and isinstance(opened, Checkpoint)
    assert opened.base == opened.base_location == str(base_dir) and opened.commit is None
    settings = parse_arguments({"pretrained": opened, "diffusion_budget": 7})
    assert settings.checkpoint is opened and settings.sampler.budget == 7
    ids = torch.tensor([[5, 17, 40]])
    model = L2DForCausalLM.from_pretrained(opened)
    assert torch.equal(model(ids).logits, L2DLM(pretrained=opened, device="cpu").model(ids).logits)
    assert reads(l2d_dir) == 1
    with pytest.raises(UsageError, match="base='other' does not apply to a checkpoint that is open already"):
        parse_arguments({"pretrained": opened, "base": "other"})


def test_the_tokenizer_is_the_checkpoints_own_or_the_bases(l2d_dir, base_dir, tmp_path):
    for name in ("l2d", "base"):
        shutil.copytree({"l2d": l2d_dir, "base": base_dir}[name], tmp_path / name)
    content = json.loads((tmp_path / "l2d" / "config.json").read_text())
    content["base_name_or_path"] = "/nowhere/base"  # the folder of both was moved
    (tmp_path / "l2d" / "config.json").write_text(json.dumps(content))
    assert open_checkpoint(tmp_path / "l2d").tokenizer_source == str(tmp_path / "l2d")
    for file in (tmp_path / "l2d").glob("tokenizer*"):
        file.unlink()
    assert open_checkpoint(tmp_path / "l2d").tokenizer_source == str(tmp_path / "base")
    model = L2DLM(pretrained=str(tmp_path / "l2d"), device="cpu")
    assert model.tokenizer.get_vocab() == L2DLM(pretrained=str(l2d_dir), device="cpu").tokenizer.get_vocab()


@pytest.mark.parametrize(
    "key, value, reason",
    [("sampler", "fast", "sampler='fast' must be a mapping"), ("sampler", {"budget": 14}, "use 13 or 15"),
     ("noise_std", 0, "noise_std=0 must be a number above 0"), ("lora_rank", [3], "lora_rank=[3] must be a whole"),
     ("guidance_classes", {"a": 1}, "must be a list of distinct names"), ("base_config", "x", "must be a mapping")],
)  # fmt: skip
def test_an_edited_setting_that_is_impossible_is_refused_without_loading_anything(tmp_path, key, value, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "l2d", "base_name_or_path": "base", key: value}))
    with pytest.raises(ValueError) as error:
        open_checkpoint(tmp_path)
    assert str(error.value).startswith("config.json of ") and reason in str(error.value)
