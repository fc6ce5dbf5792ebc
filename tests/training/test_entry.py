"""The training command from end to end. `python -m pytest tests/training/test_entry.py`"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import is_progress_bar_enabled

from l2d import L2DForCausalLM
from tests.training_runs import BASELINE, SMALL, same_bits, sums, train_here, weights, write_jsonl, write_recipe
from training import train
from training.checkpointing.resume import check_output_dir, choose_checkpoint, clear_output_dir, missing_parts
from training.console import log_line
from training.planning import estimates


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


@pytest.mark.parametrize("bar", [True, False])
@pytest.mark.parametrize("method", ["l2d", "full_sft"])
def test_each_step_is_one_short_line_and_checkpoints_draw_no_bars(recipe, capsys, method, bar):
    train_here(
        recipe(method=method, eval_holdout=4, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=2,
               disable_tqdm=not bar)
    )  # fmt: skip
    printed, drawn = capsys.readouterr()
    steps = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in steps if "eval_" not in line][:3] == ["step 1", "step 2", "step 3"]
    assert "step 3: eval_loss " in printed and "{'" not in printed and "total_flos" not in steps[0]
    assert ("; by time: loss " in steps[0] and ", accuracy " in steps[0]) == (method == "l2d")
    assert ("total_flos" in printed) == (method == "full_sft")  # L2D's operations are not counted
    assert ("3/3" in drawn) == bar
    assert drawn.count("Writing model shards: 100%") <= 2  # of the final model, and of no checkpoint before it
    assert is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("settings", "loaded", "told"),
    [({}, torch.bfloat16, True), ({"dtype": "auto"}, torch.float32, False), ({"bf16": False}, torch.float32, False),
     ({"method": "lora_sft"}, torch.float32, False)],
)  # fmt: skip
def test_the_base_is_loaded_in_the_dtype_of_the_run(recipe, monkeypatch, capsys, settings, loaded, told):
    """Of L2D, and unless the recipe names one; a processor on which it is slow is said."""
    bases = []
    monkeypatch.setattr(train, "run", lambda trainer, job: bases.append(trainer.model))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    train_here(recipe(**{"bf16": True, **settings}))
    printed = capsys.readouterr().out
    base = bases[0].base if settings.get("method") is None else bases[0].get_base_model()
    assert base.dtype == loaded
    assert ("base: stored in float32, loaded in bfloat16" in printed) == told
    assert ("no instructions for it" in printed) == settings.get("bf16", True)


@pytest.mark.parametrize(
    ("settings", "memory", "on"),
    [({}, 1 << 40, False), ({}, 1 << 20, True), ({"activation_checkpointing": True}, 1 << 40, True),
     ({"gradient_checkpointing": True}, 1 << 40, True), ({"method": "full_sft"}, 1 << 40, True)],
)  # fmt: skip
def test_checkpointing_is_off_where_memory_is_plenty_unless_it_is_set(
    recipe, monkeypatch, capsys, settings, memory, on
):
    """Results are the same bits; it is said when it is switched off, and of L2D only."""
    monkeypatch.setattr(estimates, "memory_of", lambda device: memory)
    path = recipe(**{"activation_checkpointing": None, **settings})
    seen = []
    monkeypatch.setattr(train, "run", lambda trainer, job: seen.append(trainer))
    train_here(path)
    args = seen[0].args
    assert bool(args.activation_checkpointing) is bool(args.gradient_checkpointing) is on
    assert (
        "activation checkpointing is off: without it the run needs about 0.0 of 1024.0 GiB" in (capsys.readouterr().out)
    ) == (not on)


def test_the_longest_example_is_found():
    rows = Dataset.from_dict({"input_ids": [[1] * 3, [1] * 7, [1]]})
    assert estimates.longest_of(rows, 100, packing=False) == 7
    assert estimates.longest_of(rows, 100, packing=True) == 100
    assert estimates.longest_of(rows.to_iterable_dataset(), 100, packing=False) == 100


def test_a_line_holds_all_that_is_logged():
    logs = {"loss": 1.18249, "accuracy": 0.7225, "learning_rate": 1e-3, "epoch": 2, "total_flos": 0}
    logs |= {
        f"{name}_t_{at}": value
        for at, value in (("0.00_0.50", 0.5), ("0.50_1.00", 0.25))
        for name in ("loss", "eval_a")
    }
    line = "step 7: loss 1.182, accuracy 0.7225, learning_rate 0.001, epoch 2; by time: loss 0.5 0.25, eval_a 0.5 0.25"
    assert log_line(7, logs) == line
    assert log_line(3, {"train_runtime": 2.0}) == "step 3: train_runtime 2"


@pytest.mark.parametrize("how", ["packing", "padding_free", "torch_compile"])
def test_other_ways_to_run(recipe, tmp_path, how):
    """Each trains and evaluates; compiled (without a compiler behind it) the weights are the same."""
    more = {"packing": {"packing": True, "max_length": 64}, "padding_free": {"padding_free": True}}.get(how)
    more = more or {"torch_compile": True, "torch_compile_backend": "eager"}
    train_here(recipe(eval_holdout=4, **more))
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_loss"] > 0
    if how == "torch_compile":
        train_here(recipe(eval_holdout=4), "--output_dir", str(tmp_path / "plain"))
        for name, tensor in weights(tmp_path / "plain").items():
            torch.testing.assert_close(weights(tmp_path / "out")[name], tensor, rtol=1e-4, atol=1e-5)


def test_samples_and_card(recipe, tmp_path, base_dir):
    """Responses during training beside the true ones; the card names base, data, recipe, metrics and versions."""
    out = tmp_path / "out"
    more = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 3, "eval_budgets": [3], "eval_budget_examples": 2}
    train_here(recipe(eval_holdout=4, eval_samples=2, eval_sample_tokens=5, **more))
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 3, 3]
    assert all({"prompt", "response", "budget 1", "budget 3"} <= line.keys() for line in lines)
    assert lines[0]["response"].endswith("</s>") and lines[0]["prompt"].endswith("Answer:")
    assert "eval_accuracy_budget_3" in json.loads((out / "eval_results.json").read_text())
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers" and "base_model" not in header  # a folder is nobody else's base
    versions = f"transformers {transformers.__version__}"
    assert "eval_accuracy_budget_3" in card and "max_steps: 3" in card and versions in card


def test_push_to_hub_sends_the_finished_folder(recipe, tmp_path, monkeypatch):
    """Once, when model, tokenizer, recipe and card are there; checkpoints stay at home."""
    sent = []

    def upload(self, *, folder_path, ignore_patterns, repo_id, **_):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        sent.append((repo_id, set(filter_repo_objects(files, ignore_patterns=ignore_patterns))))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("training.checks.get_token", lambda: "hf_x")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    budgets = {"eval_holdout": 4, "eval_budgets": [1, 3], "eval_budget_examples": 2}
    train_here(recipe(push_to_hub=True, hub_model_id="someone/model", report_to="none", **budgets))
    whole = {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "README.md"}
    ((name, files),) = sent
    assert name == "someone/model" and whole | {"all_results.json", "budget_curve.png"} <= files
    assert not any(file.startswith("checkpoint-") for file in files)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("someone/model")' in card
    assert "--model_args pretrained=someone/model" in card


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


BASES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": 8}, "smollm3": {"no_rope_layer_interval": 2},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8}, "olmo2": {}, "phi3": {},
    "starcoder2": {}, "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}, "ministral3": {},
}  # fmt: skip


@pytest.mark.parametrize("family", BASES)
def test_every_base_from_training_to_text(recipe, tmp_path, make_base, family):
    """Train, save, load, generate; a trained path changes something, and budget 1 is the base."""
    base = make_base(family, **BASES[family])
    train_here(recipe(base=base, variant="lora", lora_rank=2, learning_rate=0.05, max_steps=4))
    model = L2DForCausalLM.from_pretrained(tmp_path / "out")
    fresh = L2DForCausalLM.from_base(str(base), model.config)
    start = dict(fresh.trained_parameters())
    assert all(
        not torch.equal(p, start[name]) for name, p in model.trained_parameters() if "lora_B" in name or "bias" in name
        and "output_modulation.2" not in name
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompts = tokenizer("Question: 3 and 21?\nAnswer:", return_tensors="pt")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(base).generate(prompts, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(prompts, max_new_tokens=4, sampler={"budget": 1}), plain)
    assert model.generate(prompts, max_new_tokens=4, sampler={"budget": 3}).shape[1] > prompts.shape[1]


def test_unsupported_base_is_refused_by_name(recipe, make_base, capsys):
    base = make_base("gpt2", n_embd=32, n_head=4, n_layer=2)
    assert "'gpt2' is not supported" in refused(capsys, recipe(base=base))


@pytest.mark.parametrize("method", ["lora_sft", "full_sft"])
def test_baselines_evaluate_as_plain_models(recipe, tmp_path, method):
    """lm-eval's own `hf` model loads the checkpoint and scores with the finetuned weights."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    train_here(recipe(method=method, learning_rate=0.01))
    harness = HFLM(pretrained=str(tmp_path / "out"), device="cpu", dtype="float32", batch_size=1)
    request = Instance("loglikelihood", {}, ("Question: 3 and 21?\nAnswer:", " 24"), 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Question: 3 and 21?\nAnswer: 24", return_tensors="pt")["input_ids"]
    count = len(tokenizer(" 24", add_special_tokens=False)["input_ids"])
    chosen = model(ids).logits[0, -count - 1 : -1].log_softmax(-1).gather(1, ids[0, -count:, None])
    assert harness.loglikelihood([request])[0][0] == pytest.approx(chosen.sum().item(), abs=1e-4)


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


@pytest.mark.parametrize("method", ["l2d", "full_sft"])
def test_a_run_that_diverged_leaves_no_model(recipe, tmp_path, capsys, monkeypatch, method):
    """Weights that are no numbers end the run in one line, with status 1."""
    import torch.optim

    def broken(self, closure=None):
        for group in self.param_groups:
            group["params"][0].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    with pytest.raises(SystemExit) as exit:
        train_here(recipe(method=method, optim="sgd"))
    assert exit.value.code == 1 and "error: training diverged" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_limits_of_the_base(recipe, tmp_path, capsys):
    for dry in ("false", "true"):
        assert "use at most 4096" in refused(capsys, recipe(max_length=5000), "--dry_run", dry)
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
    for setting in (str(last), "auto"):  # nothing is started afresh beside checkpoints that are whole
        with pytest.raises(ValueError, match="checkpoint-3 was saved with 1 process and 2 would not .*: launch 1,"):
            choose_checkpoint(setting, str(out), 2)
    with pytest.raises(ValueError, match="is not a directory"):
        choose_checkpoint(str(out / "checkpoint-9"), str(out), 1)
    clear_output_dir(str(out))
    assert choose_checkpoint("auto", str(out), 1)[0] is None
    with pytest.raises(ValueError, match="holds none"):
        choose_checkpoint(True, str(out), 1)
    with pytest.raises(ValueError, match="already holds"):
        check_output_dir(str(out), "auto", False, "base")
