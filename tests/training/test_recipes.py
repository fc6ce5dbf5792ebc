"""The recipes of the repository, and what `--dry_run` shows. `python -m pytest tests/training/test_recipes.py`"""

import dataclasses
import re

import pytest
import torch
from transformers import AutoConfig

from tests.training_runs import REPOSITORY, SMALL, sums, train_here, write_jsonl, write_recipe
from training.data.tokenizer import load_tokenizer
from training.draws import default_evaluations, layer_bytes
from training.planning.estimates import Shape, estimate_flops, estimate_memory
from training.recipe import read_recipe

RECIPES = REPOSITORY / "training" / "recipes"
BASES = ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-1.5b", "qwen2.5-7b")
KINDS = ("l2d-lora", "l2d-full", "lora-sft", "lora-sft-all-linear", "full-sft", "l2d-on-lora-sft")
PAPER = {  # millions of trained parameters that the paper gives, and what rank 32 on query and value projections has
    "llama-3.2-1b-l2d-lora": 73, "llama-3.1-8b-l2d-lora": 281, "qwen2.5-7b-l2d-lora": 233,
    "llama-3.2-1b-lora-sft": 3.41, "llama-3.1-8b-lora-sft": 13.63, "qwen2.5-7b-lora-sft": 10.09,
}  # fmt: skip


@pytest.fixture
def dry(capsys):
    """`dry(recipe, *options)`: what a dry run prints."""

    def run(recipe, *options) -> str:
        capsys.readouterr()
        train_here(recipe, "--dry_run", "true", *options)
        return capsys.readouterr().out

    return run


def trained_parameters(printed: str) -> int:
    return int(re.search(r"([\d,]+) trained parameters", printed)[1].replace(",", ""))


def test_every_base_has_every_recipe():
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    wanted = {f"{base}-{kind}" for base in BASES for kind in KINDS}
    options = {f"gsm8k_{name}" for name in ("lora", "corrupted", "rollout", "carried", "noise_free")}
    assert names == wanted | {"llama-3.2-1b-l2d-guidance"} | options
    table = (RECIPES / "README.md").read_text()
    assert all(f"`{name}`" in table for name in names)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_dry_run_needs_no_weights(dry, path):
    """Neither base nor data are at hand here; counts are the paper's, and the table's."""
    printed = dry(path)
    trained = trained_parameters(printed)
    assert "memory per device" in printed and "schedule:" in printed and "examples are not shown" in printed
    row = next(line for line in (RECIPES / "README.md").read_text().splitlines() if f"`{path.stem}`" in line)
    assert f"{trained:,}" in row
    memory = re.search(r"([\d.]+) GiB  in all; ([\d.]+) GiB with", printed)
    assert torch.accelerator.is_available() or f"| {memory[1]} | {memory[2]} |" in row  # with one, bf16 is the default
    if path.stem in PAPER:
        assert round(trained / 1e6, 2 if PAPER[path.stem] < 20 else 0) == PAPER[path.stem]
    recipe = read_recipe(["--config", str(path)])
    batch = recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps
    assert batch == 32 and recipe.training.adam_beta2 == 0.95 and recipe.training.weight_decay == 0.01
    ours = path.stem.startswith("gsm8k")
    rates = {"full_sft": 1e-5}
    assert recipe.training.learning_rate == (1e-3 if ours else rates.get(recipe.model.method, 1e-4))
    assert recipe.model.warm_start == ours
    if recipe.model.method != "full_sft" and recipe.model.variant == "lora":
        alpha = 64 if recipe.model.method == "lora_sft" else 32
        assert (recipe.model.lora_rank, recipe.model.lora_alpha) == (32, alpha)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_recipes_follow_the_release(base, kind):
    """What `training/recipes/README.md` says of the released configuration, recipe by recipe."""
    recipe = read_recipe(["--config", str(RECIPES / f"{base}-{kind}.yaml")])
    training, large = recipe.training, base in ("llama-3.1-8b", "qwen2.5-7b")
    assert (training.loss_average, training.per_device_train_batch_size) == (("example", 1) if large else ("token", 4))
    assert (training.warmup_shape, training.warmup_steps, training.max_grad_norm) == ("logarithmic", 100, 1.0)
    assert training.weight_decay_exempt == ["bias", "ln", "LayerNorm"]
    assert training.count_end_token is False and training.too_long == "drop"
    assert (training.eval_steps, training.load_best_model_at_end, training.metric_for_best_model) == (
        2000,
        True,
        "loss",
    )
    mixed = base == "llama-3.1-8b" and kind in ("l2d-lora", "lora-sft", "lora-sft-all-linear")
    assert recipe.model.tokenizer == ("meta-llama/Llama-3.1-8B-Instruct" if mixed else None)
    assert not mixed or recipe.model.base == "meta-llama/Llama-3.1-8B"
    if "sft" in kind and "l2d" not in kind and "lora" in kind:
        assert recipe.model.lora_target_modules == (None if "all-linear" in kind else ["q_proj", "v_proj"])


def test_another_tokenizer(tmp_path, base_dir, tokenizer):
    """`tokenizer` names where it is; it must be there, and errors say which one is meant."""
    data = write_jsonl(tmp_path / "data.jsonl", sums(4))
    (tmp_path / "other").mkdir()
    tokenizer.chat_template, kept = "other", tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "other")
    tokenizer.chat_template = kept
    settings = {**SMALL, "base": base_dir, "dataset": data, "output_dir": tmp_path / "out"}
    path = write_recipe(tmp_path / "recipe.yaml", **settings, tokenizer=tmp_path / "other")
    recipe = read_recipe(["--config", str(path)])
    assert load_tokenizer(recipe.model, recipe.training).chat_template == "other"
    with pytest.raises(ValueError, match="tokenizer='.*nowhere' is not a directory"):
        read_recipe(["--config", str(path), "--tokenizer", str(tmp_path / "nowhere")])


def test_examples_with_their_mask(dry, tmp_path, base_dir):
    """Two of them, decoded, targets in another colour; the schedule counts the real examples; nothing is written."""
    data = write_jsonl(tmp_path / "data.jsonl", sums(20))
    settings = {**SMALL, "base": base_dir, "dataset": data, "output_dir": tmp_path / "out", "max_steps": None}
    printed = dry(write_recipe(tmp_path / "recipe.yaml", **settings, num_train_epochs=2))
    assert printed.count("targets are green") == 2 and "schedule: 10 steps of 4 examples" in printed
    assert "\033[90m<s>Question: 0 and 0?\nAnswer:\033[0m\033[1;32m 0</s>\033[0m" in printed
    assert not (tmp_path / "out").exists()


def test_memory_estimate_is_near_what_is_measured():
    """`python -m tests.benchmarks.training --shape 135m` on a CPU: 2,263 MiB at the peak, in float32, K = 1."""
    from transformers import LlamaConfig

    from tests.benchmarks.models import SHAPES

    shape = Shape(
        LlamaConfig(**SHAPES["135m"]), "l2d", "lora", trained=38_000_000, frozen=134_515_008, frozen_bytes=4,
        stream_bytes=4, rows=4, length=256, mean_length=256, response=0.3, draws=1, max_evaluations_per_pass=512,
        checkpointing=False, device="cpu",
    )  # fmt: skip
    parts = estimate_memory(shape)
    assert sum(parts.values()) / 2**20 == pytest.approx(2263, rel=0.25)
    # The main path is run once; of a rollout's evaluations those without a loss cost less.
    plain, four, more = (
        estimate_flops(dataclasses.replace(shape, scored=scored, unscored=unscored))
        for scored, unscored in ((1, 0), (4, 0), (4, 2))
    )
    assert 2 * plain < four < 4 * plain and four < more < four + 2 * (four - plain) / 3


def test_logits_are_estimated_as_the_loss_makes_them():
    """A chunk at a time, which is smaller on a CPU, and no more rows than there are, whatever the vocabulary."""
    base = AutoConfig.for_model("llama", vocab_size=2**15, num_hidden_layers=2)
    shape = Shape(
        base, "l2d", "lora", trained=1, frozen=1, frozen_bytes=4, stream_bytes=4, rows=4, length=1024,
        mean_length=1024, response=1.0, draws=1, max_evaluations_per_pass=4096, checkpointing=False,
    )  # fmt: skip
    for change, rows in (
        ({}, 2048), ({"device": "cpu"}, 512), ({"max_evaluations_per_pass": 100}, 100),
        ({"rows": 1, "response": 0.1}, 103),
        ({"method": "lora_sft", "rows": 1, "draws": 2}, 1024), ({"rows": 1, "draws": 2}, 2048),
    ):  # fmt: skip
        assert estimate_memory(dataclasses.replace(shape, **change))["logits"] == 12 * rows * 2**15, change
    few = AutoConfig.for_model("llama", vocab_size=400, num_hidden_layers=2)
    assert estimate_memory(dataclasses.replace(shape, base=few))["logits"] == 12 * 4096 * 400


def test_extends(tmp_path, base_dir):
    """Later files and the recipe itself win; files are found beside the recipe; circles are refused."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "one.yaml").write_text("draws: 2\nlearning_rate: 1e-3\nbase_config: config.json\n")
    (tmp_path / "shared" / "config.json").write_text("{}")
    (tmp_path / "two.yaml").write_text("draws: 3\n")
    data = write_jsonl(tmp_path / "data.jsonl", sums(4))
    top = tmp_path / "top.yaml"
    text = f"extends: [shared/one.yaml, two.yaml]\nbase: {base_dir}\ndataset: {data}\noutput_dir: {tmp_path / 'out'}\n"
    top.write_text(text)
    recipe = read_recipe(["--config", str(top)])
    assert (recipe.training.draws, recipe.training.learning_rate) == (3, 1e-3)
    assert recipe.model.base_config == str(tmp_path / "shared" / "config.json") and "extends" not in recipe.settings
    top.write_text(text + "draws: 5\n")
    assert read_recipe(["--config", str(top)]).training.draws == 5
    (tmp_path / "two.yaml").write_text("extends: top.yaml\n")
    with pytest.raises(ValueError, match="circle"):
        read_recipe(["--config", str(top)])
    (tmp_path / "two.yaml").unlink()
    with pytest.raises(ValueError, match="extends in .*two.yaml does not exist"):
        read_recipe(["--config", str(top)])


def test_total_batch_size(tmp_path, base_dir, monkeypatch):
    data = write_jsonl(tmp_path / "data.jsonl", sums(4))
    settings = {**SMALL, "base": base_dir, "dataset": data, "output_dir": tmp_path / "out", "total_batch_size": 32}
    path = write_recipe(tmp_path / "recipe.yaml", **settings)
    assert read_recipe(["--config", str(path)]).training.gradient_accumulation_steps == 8
    with pytest.raises(ValueError, match="total_batch_size=30 is not divisible by 4"):
        read_recipe(["--config", str(path), "--total_batch_size", "30"])
    with pytest.raises(ValueError, match="keep one"):
        read_recipe(["--config", str(path), "--gradient_accumulation_steps", "2"])


@pytest.mark.parametrize(
    ("shape", "device", "evaluations"),
    [
        ((64, 128, 2, 4), "cpu", 2048),  # the demo's: 12 kB a query
        ((256, 1024, 8, 8), "cpu", 1024),
        ((576, 1536, 30, 9), "cpu", 512),  # 1.8 MB a query
        ((576, 1536, 30, 9), "cuda", 4096),
    ],
)
def test_evaluations_at_a_time(shape, device, evaluations):
    """As many as before for large models, more for small ones, which hold no more than 256 MiB."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    base = AutoConfig.for_model("llama", **dict(zip(names, shape, strict=True)))
    assert default_evaluations(base, 4, device) == evaluations
    held = evaluations * base.num_hidden_layers * layer_bytes(base, 4, modulated=True)
    assert held <= 2**28 or evaluations == 512 or device == "cuda"
