"""The training command from end to end. `python -m pytest tests/test_training_entry.py`"""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2d import L2DForCausalLM
from tests.training_runs import BASELINE, SMALL, same_bits, sums, train_here, weights, write_jsonl, write_recipe
from training.checkpoints import check_output_dir, choose_checkpoint, clear_output_dir, missing_parts


@pytest.fixture
def recipe(tmp_path, base_dir):
    """`recipe(**settings)`: a recipe file that trains in a second, with changes."""
    data = write_jsonl(tmp_path / "data.jsonl", sums(20))

    def write(**settings):
        start = SMALL if settings.get("method", "l2d") == "l2d" else BASELINE
        fixed = {"base": base_dir, "dataset": data, "output_dir": tmp_path / "out"}
        return write_recipe(tmp_path / "recipe.yaml", **{**start, **fixed, **settings})

    return write


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_l2d(recipe, tmp_path, base_dir, capsys, variant):
    out = tmp_path / "out"
    changes = {"lora_rank": 2} if variant == "lora" else {}
    train_here(
        recipe(
            variant=variant, eval_holdout=5, eval_draws=2, draws=2, report_to="tensorboard", save_strategy="steps",
            save_steps=2, sampler={"budget": 3}, guidance_classes=["math"], guidance_class="math", **changes,
        )
    )  # fmt: skip
    model = L2DForCausalLM.from_pretrained(out)
    assert model.config.base_name_or_path == str(base_dir) and model.config.sampler == {"budget": 3}
    assert model.config.guidance_classes == ["math"] and model.config.variant == variant
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(out).eos_token_id == 2
    count = sum(parameter.numel() for _, parameter in model.trained_parameters())
    printed = capsys.readouterr().out
    assert f"l2d: {count:,} trained parameters" in printed and "train: 15 examples" in printed
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] > 0 and results["train_loss"] > 0 and "eval_loss_t_0.00_0.25" in results
    assert json.loads((out / "train_results.json").read_text())["train_runtime"] > 0
    assert json.loads((out / "eval_results.json").read_text())["eval_accuracy"] >= 0
    assert list(out.glob("runs/*/events*")) and missing_parts(str(out / "checkpoint-2")) == []
    assert yaml.safe_load((out / "recipe.yaml").read_text())["draws"] == 2
    assert not any("base" in name for name in weights(out))
    assert str(base_dir) in (out / "README.md").read_text()


def test_recipe_that_was_saved_repeats_the_run(recipe, tmp_path):
    train_here(recipe(), "--learning_rate", "0.01")
    train_here(tmp_path / "out" / "recipe.yaml", "--output_dir", str(tmp_path / "again"))
    assert same_bits(weights(tmp_path / "out"), weights(tmp_path / "again"))


def test_lora_baseline_is_a_plain_checkpoint(recipe, tmp_path, base_dir):
    """Merged in the folder itself, the adapter beside it; an L2D model can be trained on top."""
    out = tmp_path / "lora"
    train_here(recipe(method="lora_sft", lora_rank=4, learning_rate=0.01, eval_holdout=5, output_dir=out))
    merged = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), out / "adapter")
    ids = torch.arange(5, 25)[None]
    assert type(merged) is type(base) and not (out / "adapter_config.json").exists()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=2e-5, rtol=1e-5)
    assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-2
    assert adapted.peft_config["default"].r == 4 and adapted.peft_config["default"].lora_alpha == 64
    assert json.loads((out / "all_results.json").read_text())["eval_loss"] > 0
    train_here(recipe(base=out))
    model = L2DForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, atol=0, rtol=0)


def test_full_baseline_is_a_plain_checkpoint(recipe, tmp_path, base_dir):
    train_here(recipe(method="full_sft"))
    tuned, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", base_dir))
    assert tuned.config.architectures == base.config.architectures and tuned.dtype == torch.float32
    assert not any(torch.equal(p, q) for p, q in zip(tuned.parameters(), base.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"


def refused(capsys, recipe, *options) -> str:
    with pytest.raises(SystemExit) as exit:
        train_here(recipe, *options)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_nothing_is_overwritten_unasked(recipe, tmp_path, base_dir, capsys):
    path = recipe(save_strategy="steps", save_steps=1)
    train_here(path)
    before = weights(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "already holds" in refused(capsys, path)
    assert "already holds" in refused(capsys, path, "--resume_from_checkpoint", "false")
    assert "keep one" in refused(capsys, path, "--overwrite_output_dir", "true", "--resume_from_checkpoint", "auto")
    assert "where the base is" in refused(capsys, path, "--output_dir", str(base_dir), "--overwrite_output_dir")
    assert same_bits(before, weights(tmp_path / "out"))
    train_here(path, "--overwrite_output_dir", "true", "--seed", "1", "--max_steps", "2")
    assert not same_bits(before, weights(tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoint-3").exists(), "an old checkpoint would be resumed from"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_unusable_bases(recipe, tmp_path, base_dir, l2d_dir, capsys):
    assert "is an L2D checkpoint" in refused(capsys, recipe(base=l2d_dir))
    shutil.copytree(base_dir, tmp_path / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    for method in ("l2d", "full_sft"):
        assert "could not be loaded" in refused(capsys, recipe(method=method, base=tmp_path / "hollow"))


def test_limits_of_the_base(recipe, tmp_path, capsys):
    assert "use at most 4096" in refused(capsys, recipe(max_length=5000))
    data = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "7" * 5000, "completion": "8"}])
    assert "more than max_length=4096" in refused(capsys, recipe(dataset=data))
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing"


def test_choice_of_checkpoint(recipe, tmp_path):
    """The newest complete one; incomplete ones are skipped with a reason, or refused by name."""
    out = tmp_path / "out"
    train_here(recipe(save_strategy="steps", save_steps=1))
    kept, last = out / "checkpoint-2", out / "checkpoint-3"
    assert choose_checkpoint("auto", str(out), 1)[0] == str(last)
    content = {path.name: path.read_bytes() for path in last.iterdir()}
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (last / name).unlink()
        assert missing_parts(str(last)) == [name]
        (last / name).write_bytes(content[name][:-20])  # cut off
        assert missing_parts(str(last)) == [name]
        for setting in (True, "true", "auto"):
            chosen, why = choose_checkpoint(setting, str(out), 1)
            assert chosen == str(kept) and f"skipped checkpoint-3 (lacks {name})" in why
        with pytest.raises(ValueError, match=f"incomplete.*{name}"):
            choose_checkpoint(str(last), str(out), 1)
        (last / name).write_bytes(content[name])
    with pytest.raises(ValueError, match="rng_state_0.pth, rng_state_1.pth .with 2 processes"):
        choose_checkpoint(str(last), str(out), 2)
    with pytest.raises(ValueError, match="no folder"):
        choose_checkpoint(str(out / "checkpoint-9"), str(out), 1)
    clear_output_dir(str(out))
    assert choose_checkpoint("auto", str(out), 1)[0] is None
    with pytest.raises(ValueError, match="holds none"):
        choose_checkpoint(True, str(out), 1)
    with pytest.raises(ValueError, match="already holds"):
        check_output_dir(str(out), "auto", False, "base")
