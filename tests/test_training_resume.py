"""A killed run that is resumed equals an unbroken one, bit for bit. `python -m pytest tests/test_training_resume.py`"""

import pytest
import torch

from tests.training_runs import (
    BASELINE,
    SMALL,
    logged,
    same_bits,
    sums,
    train_here,
    train_in_process,
    weights,
    write_jsonl,
    write_recipe,
)

KILLED = """
import os, signal, sys
import torch
from transformers import TrainerCallback
from training import train

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)

run = train.run
train.run = lambda trainer, job: (trainer.add_callback(Kill()), run(trainer, job))
train.main(sys.argv[1:])
"""


@pytest.fixture
def settings(tmp_path, base_dir):
    """Two epochs and a half, with accumulation and evaluation."""
    return {
        "base": base_dir,
        "dataset": write_jsonl(tmp_path / "data.jsonl", sums(44)),
        "eval_holdout": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }


def test_killed_and_resumed(tmp_path, settings):
    """SIGKILL between checkpoints, in the second epoch; then `auto`."""
    settings = {**SMALL, "draws": 2, **settings}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here(write_recipe(tmp_path / "whole.yaml", output_dir=whole, **settings))
    path = write_recipe(tmp_path / "broken.yaml", output_dir=broken, **settings)
    killed = train_in_process(["--config", str(path)], code=KILLED, env={"KILL_AT": "8"})
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert sorted(folder.name for folder in broken.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    train_here(path, "--resume_from_checkpoint", "auto")
    assert same_bits(weights(whole), weights(broken))
    assert same_bits(weights(whole / "checkpoint-9"), weights(broken / "checkpoint-9"))
    assert logged(whole) == logged(broken) and len(logged(whole)) == 12
    assert logged(whole, "eval_loss") == logged(broken, "eval_loss")


@pytest.mark.parametrize("method", ["lora_sft", "full_sft"])
def test_baselines_resume(tmp_path, settings, method):
    out = tmp_path / "out"
    path = write_recipe(tmp_path / "recipe.yaml", **BASELINE | settings | {"method": method, "output_dir": out})
    train_here(path)
    whole, losses = weights(out), logged(out)
    train_here(path, "--resume_from_checkpoint", str(out / "checkpoint-6"))
    assert same_bits(whole, weights(out)) and losses == logged(out)


def test_noise_goes_on(tmp_path, base_dir, monkeypatch):
    """The steps after a resume draw new noise, the same that an uninterrupted run draws."""
    from training.trainer import L2DTrainer

    drawn, draw = [], L2DTrainer._draw

    def recorded(self, *args):
        queries = draw(self, *args)
        drawn.append(queries.noise.flatten()[:8])
        return queries

    monkeypatch.setattr(L2DTrainer, "_draw", recorded)
    settings = {**SMALL, "base": base_dir, "dataset": write_jsonl(tmp_path / "data.jsonl", sums(30))}
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "output_dir": tmp_path / "out"}
    path = write_recipe(tmp_path / "recipe.yaml", **settings)
    train_here(path)
    whole = list(drawn)
    drawn.clear()
    train_here(path, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-3"))
    assert len(whole) == 6 and len({tuple(noise.tolist()) for noise in whole}) == 6
    assert torch.equal(torch.stack(drawn), torch.stack(whole[3:]))
