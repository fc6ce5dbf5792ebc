"""FSDP2 in two CPU processes equals one process, step by step, and resumes exactly. All runs are made by one launch.

`python -m pytest tests/training/test_fsdp.py`
"""

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
from training.checkpointing.resume import check_sharding_of

pytestmark = pytest.mark.slow
EVERY_STEP = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_holdout": 8,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "total_batch_size": 8,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
}  # fmt: skip
LORA, MIXED = {"variant": "lora", "lora_rank": 2}, {"dtype": "bfloat16", "bf16": True}
CASES = {
    "full": {**SMALL, "draws": 2, "activation_checkpointing": True, "max_grad_norm": 0.03},
    "lora": {**SMALL, **LORA, **MIXED, "warm_start": True, "own_values_rank": 8, "own_keys_rank": 8},
    "sft": {**BASELINE, "method": "lora_sft", "lora_rank": 2, "max_grad_norm": 0.3},
    "all": {**BASELINE, "method": "full_sft"},
}
RESUMED = ("lora", "sft")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base_dir) -> Path:
    """Folder with the runs of all cases in two processes, `NAME`, resumed, `NAME-on`, and in one process, `NAME-1`."""
    folder = tmp_path_factory.mktemp("fsdp")
    common = {**EVERY_STEP, "base": base_dir, "dataset": write_jsonl(folder / "data.jsonl", sums(32))}
    two, one = [], []
    for name, settings in CASES.items():
        recipe = str(write_recipe(folder / f"{name}.yaml", **{**settings, **common}, output_dir=folder / name))
        two.append(({}, ["--config", recipe]))
        one.append(({}, ["--config", recipe, "--output_dir", f"{folder / name}-1"]))
        if name in RESUMED:
            middle = ["--resume_from_checkpoint", str(folder / name / "checkpoint-1")]
            two.append(({}, ["--config", recipe, "--output_dir", f"{folder / name}-on", *middle]))
    (folder / "output").write_text(launch_runs(folder, "fsdp2", two))
    launch_runs(folder, "single", one, processes=1)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(runs, name):
    """Losses, norms before clipping, evaluation, trained weights after three steps, and the model that is left."""
    found, expected = runs / name, runs / f"{name}-1"
    for value in ("loss", "eval_loss"):
        assert logged(found, value) == pytest.approx(logged(expected, value), abs=1e-5), value
    same_gradients(found, expected)
    for file in ("checkpoint-3", "."):
        stem = "adapter_model" if file == "checkpoint-3" and name == "sft" else "model"
        tensors, reference = (load_file(folder / file / f"{stem}.safetensors") for folder in (found, expected))
        assert tensors.keys() == reference.keys()
        for tensor, value in reference.items():
            torch.testing.assert_close(tensors[tensor], value, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("name", ["full", "lora", "sft"])
def test_checkpoints_hold_what_is_trained(runs, name):
    """No copy of the base: neither in the model's files nor in one that accelerate would write beside them."""
    checkpoint = runs / name / "checkpoint-1"
    stem = "adapter_model" if name == "sft" else "model"
    assert not any("embed_tokens" in tensor for tensor in load_file(checkpoint / f"{stem}.safetensors"))
    bulk = {path.name for path in checkpoint.rglob("*") if path.suffix in (".pt", ".bin", ".safetensors")}
    assert bulk == {f"{stem}.safetensors", "scheduler.pt", "training_args.bin", "optimizer.bin"}


def test_a_unit_is_a_layer(runs):
    """What is gathered at a time: a layer of the path, or for a baseline of the base, and the rest once."""
    units = [line for line in (runs / "output").read_text().splitlines() if line.startswith("units:")]
    assert [line.count("FSDPDiffusionLayer") for line in units] == [2, 2, 2, 0, 0, 0]
    assert [line.count("FSDPLlamaDecoderLayer") for line in units][3:] == [2, 2, 2]


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_exact(runs, name):
    assert_resumed_exactly(runs / name, runs / f"{name}-on", "adapter_model" if name == "sft" else "model")


def test_what_is_left_is_the_best_model(runs):
    losses = logged(runs / "full", "eval_loss")
    best = min(losses, key=lambda step: losses[step])
    assert same_bits(weights(runs / "full"), weights(runs / "full" / f"checkpoint-{best}"))
    L2DForCausalLM.from_pretrained(runs / "full")
    with pytest.raises(Interrupted, match="checkpoint-1 was saved with FSDP, this run has no sharding"):
        check_sharding_of(str(runs / "full" / "checkpoint-1"), "no sharding")
