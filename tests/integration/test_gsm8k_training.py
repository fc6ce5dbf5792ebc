"""Real data: GSM8K's train split through the training command, its stock task through the evaluation command.

Skipped where the data are absent. `python -m pytest tests/integration/test_gsm8k_training.py`; the run that is
interrupted five times is run by `-m slow` only.
"""

import json
import random
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.training_runs import (
    INTERRUPTED,
    REPOSITORY,
    SMALL,
    _run,
    launch_two,
    logged,
    same_bits,
    train_in_process,
    weights,
    write_recipe,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, shared_data):
    """A small random base and a tokenizer trained on GSM8K itself."""
    import datasets

    rows = datasets.load_dataset(str(shared_data / "openai" / "gsm8k"), "main", split="train[:500]")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((row["question"] + " " + row["answer"] for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gsm8k-base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_train_and_evaluate(base, shared_data, tmp_path):
    """The recipe of the repository, shortened; loss falls; the checkpoint answers the stock 5-shot task."""
    out = tmp_path / "out"
    recipe = REPOSITORY / "training" / "recipes" / "gsm8k_lora.yaml"
    options = {
        "base": base, "output_dir": out, "train_split": "train[:96]", "eval_split": "test[:8]", "max_steps": 12,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 0.03, "warmup_steps": 2,
        "logging_steps": 2, "draws": 2, "eval_draws": 1, "diffusion_dim": 32, "noise_std": 4, "lora_rank": 4,
        "eval_strategy": "no", "save_strategy": "no", "activation_checkpointing": "false", "report_to": "none",
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    # The current folder holds the data set's, as `openai/gsm8k`: nothing is downloaded.
    trained = train_in_process(["--config", str(recipe), *words], cwd=shared_data)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "train: 96 examples" in trained.stdout and "eval: 8 examples" in trained.stdout
    losses = logged(out)
    assert losses[12] < losses[2] - 0.05
    assert json.loads((out / "all_results.json").read_text())["eval_loss"] < losses[2]

    results = tmp_path / "results"
    command = [sys.executable, "-m", "lm_eval_ext", "--model", "l2d", "--tasks", "gsm8k", "--num_fewshot", "5"]
    command += ["--limit", "2", "--model_args", f"pretrained={out},diffusion_budget=3,dtype=float32", "--device", "cpu"]
    command += ["--batch_size", "2", "--gen_kwargs", "max_gen_toks=8", "--output_path", str(results), "--log_samples"]
    evaluated: subprocess.CompletedProcess = _run(command, cwd=shared_data)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    found = json.loads(next(results.rglob("results_*.json")).read_text())
    assert 0 <= found["results"]["gsm8k"]["exact_match,strict-match"] <= 1
    assert found["n-samples"]["gsm8k"]["effective"] == 2 and found["n-shot"]["gsm8k"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("kills, steps", [(1, 8), (5, 24)])
def test_two_processes_interrupted_at_random(base, shared_data, tmp_path, request, kills, steps):
    """SIGKILL at random steps and moments, then SIGTERM to one process: weights and curve of an unbroken run."""
    if kills > 1 and "slow" not in (request.config.getoption("-m") or ""):
        pytest.skip("takes minutes: choose it with -m slow")
    settings = {
        **SMALL, "base": base, "dataset": shared_data / "openai" / "gsm8k", "dataset_config": "main", "draws": 2,
        "train_split": "train[:100]", "columns": {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
        "per_device_train_batch_size": 2, "max_steps": steps, "save_strategy": "steps", "save_steps": 3,
        "logging_steps": 2,
    }  # fmt: skip
    whole, broken, script = tmp_path / "whole", tmp_path / "broken", tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    done = launch_two(["--config", str(write_recipe(tmp_path / "whole.yaml", output_dir=whole, **settings))])
    assert done.returncode == 0, done.stderr[-3000:]
    path = write_recipe(tmp_path / "broken.yaml", output_dir=broken, **settings)
    arguments = ["--config", str(path), "--resume_from_checkpoint", "auto"]
    draw = random.Random(request.node.callspec.id)
    moments = sorted(draw.sample(range(2, steps), kills))
    for step in moments:
        chosen = {"SIGNAL_WHERE": "saving" if step % 3 == 0 else draw.choice(["begin", "end"])}
        chosen |= {"SIGNAL_AT": str(step), "SIGNAL_RANK": draw.choice(["-1", "0", "1"])}
        killed = launch_two(arguments, script=script, env=chosen)
        assert killed.returncode != 0 and not (broken / "model.safetensors").exists(), (chosen, killed.stderr[-2000:])
    last = {"SIGNAL_AT": str(steps - 1), "SIGNAL": "TERM", "SIGNAL_RANK": "1"}
    ended = launch_two(arguments, script=script, env=last)
    assert ended.returncode == 0 and "stopped by SIGTERM" in ended.stdout, ended.stderr[-3000:]
    assert (broken / f"checkpoint-{steps - 1}").is_dir()
    done = launch_two(arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_bits(weights(whole), weights(broken))
    for name in ("loss", "accuracy", "grad_norm"):
        assert logged(whole, name) == logged(broken, name) and len(logged(whole, name)) == steps // 2
