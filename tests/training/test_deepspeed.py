"""DeepSpeed ZeRO-2 and ZeRO-3 in two CPU processes equal one process, step by step, and resume exactly.

All runs are made by one launch. What needs a GPU is DeepSpeed's fused operators alone, which are not used.
`python -m pytest tests/training/test_deepspeed.py`
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from l2d import L2DForCausalLM
from tests.training_runs import (
    BASELINE,
    SMALL,
    assert_resumed_exactly,
    launch_runs,
    logged,
    same_bits,
    same_gradients,
    sums,
    weights,
    write_jsonl,
    write_recipe,
)
from training.checkpointing.disk_errors import Interrupted
from training.checkpointing.resume import check_sharding_of, choose_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the package deepspeed is not installed"),
]
STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
# Evaluated and saved at every step; 2 examples at a time, 8 a step; clipped, as gradients are larger than that.
EVERY_STEP = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_holdout": 7,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "total_batch_size": 8,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
}  # fmt: skip
L2D = {**SMALL, "draws": 2, "eval_draws": 2, "max_grad_norm": 0.03}
LORA, MIXED = {"variant": "lora", "lora_rank": 2}, {"dtype": "bfloat16", "bf16": True}
OWN = {"own_keys_rank": 8, "own_values_rank": 8}
SFT = {**BASELINE, "method": "lora_sft", "lora_rank": 2, "max_grad_norm": 0.3}
CASES = {
    "zero2-full": (2, L2D),
    "zero2-lora": (2, {**L2D, **LORA, **MIXED}),
    "zero3-full": (3, {**L2D, **MIXED}),
    "zero3-lora": (3, {**L2D, **LORA, **OWN, "activation_checkpointing": True, "warm_start": True}),
    "zero2-sft": (2, {**BASELINE, "method": "full_sft", "max_grad_norm": 0.3}),
    "zero3-sft": (3, SFT),
}
RESUMED = ("zero2-lora", "zero3-full", "zero3-sft")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_dir) -> Path:
    """Folder with the runs of all cases in two processes, `NAME`, resumed, `NAME-on`, and in one process, `NAME-1`."""
    folder = tmp_path_factory.mktemp("deepspeed")
    common = {**EVERY_STEP, "base": base_dir, "dataset": write_jsonl(folder / "data.jsonl", sums(32))}
    two, one = [], []
    for name, (stage, settings) in CASES.items():
        settings = {**settings, **common}
        if settings["method"] != "l2d":
            settings["eval_holdout"] = 8  # a baseline's loss is the mean over batches
        recipe = write_recipe(folder / f"{name}.yaml", **settings, output_dir=folder / name)
        two.append(({STAGE: str(stage)}, ["--config", str(recipe)]))
        one.append(({}, ["--config", str(recipe), "--output_dir", f"{folder / name}-1"]))
        if name in RESUMED:
            on = ["--output_dir", f"{folder / name}-on"]
            middle = ["--resume_from_checkpoint", str(folder / name / "checkpoint-1")]
            two.append(({STAGE: str(stage)}, ["--config", str(recipe), *on, *middle]))
    launch_runs(folder, "deepspeed_zero3", two)
    launch_runs(folder, "single", one, processes=1)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(runs, name):
    """Losses, norms before clipping, evaluation, trained weights after three steps, and the model that is left."""
    found, expected = runs / name, runs / f"{name}-1"
    rounded = CASES[name][1].get("bf16", False)  # ZeRO-3's linear layers round before they add a bias, and after
    for value in ("loss", "eval_loss"):
        bound = 3e-3 if rounded else 2e-5  # 4e-4 of a loss, a tenth of bfloat16's spacing
        assert logged(found, value) == pytest.approx(logged(expected, value), abs=bound), value
    same_gradients(found, expected, rel=5e-3 if rounded else 1e-4)
    assert min(logged(found, "grad_norm").values()) > CASES[name][1]["max_grad_norm"]
    for file in ("checkpoint-3", "."):
        stem = "adapter_model" if file == "checkpoint-3" and name == "zero3-sft" else "model"
        tensors, reference = (load_file(folder / file / f"{stem}.safetensors") for folder in (found, expected))
        assert tensors.keys() == reference.keys()
        others, count = 0, 0
        for tensor, value in reference.items():
            assert tensors[tensor].dtype == torch.float32
            others += int((~torch.isclose(tensors[tensor], value, rtol=1e-3, atol=5e-5)).sum())
            count += value.numel()
        assert others <= (0.05 * count if rounded else 0)  # where gradients are near zero, Adam steps by their sign


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_hold_what_is_trained(runs, name):
    """No copy of the base, whole or in shards: trained tensors once, their optimizer's two moments once."""
    checkpoint = runs / name / "checkpoint-2"
    stem = "adapter_model" if name == "zero3-sft" else "model"
    trained = load_file(checkpoint / f"{stem}.safetensors")
    assert name == "zero2-sft" or not any(
        part in tensor for tensor in trained for part in ("embed_tokens", "lm_head", "base_layer")
    )
    count = sum(tensor.numel() for tensor in trained.values())
    moments = [
        tensor.numel()
        for path in checkpoint.glob("zero_*.pt")
        for state in torch.load(path, weights_only=True)["state"]
        for part, tensor in state.items()
        if part != "step"
    ]
    assert 2 * count <= sum(moments) < 2.1 * count + 100, "shards are padded"
    bulk = [path.name for path in checkpoint.rglob("*") if path.suffix in (".pt", ".bin", ".safetensors")]
    expected = {f"{stem}.safetensors", "scheduler.pt", "training_args.bin", "zero_0.pt", "zero_1.pt"}
    assert set(bulk) == expected and len(bulk) == 5


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_exact(runs, name):
    assert_resumed_exactly(runs / name, runs / f"{name}-on", "adapter_model" if name == "zero3-sft" else "model")


def test_what_is_left_is_the_best_model(runs):
    for name in ("zero2-full", "zero3-lora"):
        losses = logged(runs / name, "eval_loss")
        best = min(losses, key=lambda step: losses[step])
        assert same_bits(weights(runs / name), weights(runs / name / f"checkpoint-{best}"))
        L2DForCausalLM.from_pretrained(runs / name)


def test_other_launches_do_not_resume_from_it(runs):
    """Nor do others' checkpoints continue here: shares are of so many processes, and of DeepSpeed."""
    checkpoint = str(runs / "zero3-full" / "checkpoint-2")
    with pytest.raises(Interrupted, match="was saved with DeepSpeed, this run has no sharding"):
        check_sharding_of(checkpoint, "no sharding")
    with pytest.raises(Interrupted, match="was saved with no sharding, this run has DeepSpeed"):
        check_sharding_of(str(runs / "zero3-full-1" / "checkpoint-2"), "DeepSpeed")
    for processes in (1, 3):
        with pytest.raises(ValueError, match="was saved with 2 processes"):
            choose_checkpoint(checkpoint, "", processes)
