"""Factors of the training loss and shares of its draws, each by itself, against plain arithmetic.

Run: `python -m pytest tests/training/test_loss_factors.py` (about 10 seconds)
"""

import pytest
import torch

from l2d import L2DConfig
from tests.training.test_trainer import batch_of, make_trainer  # noqa: F401  a fixture among them
from training.checkpointing.resume import CHECKSUMS, changed_files, write_checksums
from training.config import L2DTrainingConfig
from training.draws import evaluation_targets, training_targets

INDEX, TARGETS = torch.tensor([[2, 3, 4, 7], [0, 1, -1, -1]]), torch.tensor([[9, 17, 33, 65], [129, 257, 0, 0]])


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_rollouts_loss_is_the_mean_over_its_window(make_trainer, monkeypatch, window):  # noqa: F811
    trainer = make_trainer(rollout_evaluations=4, rollout_window=window, draws=3)
    batch, draw, drawn = batch_of(trainer, range(4)), trainer._draw, []
    monkeypatch.setattr(trainer, "_draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    loss = trainer.compute_loss(trainer.model, batch)
    with torch.no_grad():
        output = trainer.model(batch["input_ids"], batch["attention_mask"], noised_targets=drawn[0])
    assert len(output.nll) == 3 * window
    torch.testing.assert_close(loss, output.nll[:, output.valid].mean(), rtol=1e-5, atol=1e-6)


def test_the_loss_of_one_of_several_processes(make_trainer, monkeypatch):  # noqa: F811
    """Targets are counted over all processes, and gradients are averaged: the loss is as many times as large."""
    losses = []
    for processes in (1, 3):
        trainer = make_trainer(draws=2)
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer, range(4)), num_items_in_batch=40).item())
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-5)


def draws(tmp_path, steps: int, classes=None, guidance_classes=None, **settings) -> list:
    args = L2DTrainingConfig(output_dir=str(tmp_path), bf16=False, draws=50, **settings)
    config = L2DConfig(diffusion_dim=4, guidance_classes=guidance_classes)
    return [training_targets(config, args, INDEX, TARGETS, classes, (0, step, 0), process=0) for step in range(steps)]


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_times_of_training_have_the_chosen_density(tmp_path, power):
    times = torch.cat([noised.time.flatten() for noised in draws(tmp_path, 20, time_power=power)])
    assert times.mean().item() == pytest.approx(1 / (power + 1), abs=0.015)
    assert times.square().mean().item() == pytest.approx(1 / (2 * power + 1), abs=0.015)


def test_times_of_evaluation_are_one_in_each_stratum(tmp_path):
    args = L2DTrainingConfig(output_dir=str(tmp_path), bf16=False, eval_draws=8)
    time = evaluation_targets(L2DConfig(diffusion_dim=4), args, INDEX, TARGETS, None, [[1, 2], [3]]).time
    strata = torch.arange(8)[:, None].expand(8, 6)
    assert torch.equal((time[:, INDEX >= 0] * 8).long().sort(0).values, strata)


def test_classes_are_dropped_at_their_rate(tmp_path):
    classes = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]])
    options = {"guidance_classes": ["math", "coding"], "guidance_dropout": 0.3}
    found = torch.stack([noised.classes for noised in draws(tmp_path, 20, classes, **options)])
    dropped = found == 2
    assert torch.equal(found[~dropped], classes.expand(found.shape)[~dropped])
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.02)


def test_a_changed_file_of_a_checkpoint_is_noticed(tmp_path):
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    write_checksums(str(tmp_path))
    assert changed_files(str(tmp_path)) == []
    content = bytearray((tmp_path / "optimizer.pt").read_bytes())
    content[70] ^= 1
    (tmp_path / "optimizer.pt").write_bytes(content)
    (tmp_path / "trainer_state.json").unlink()
    assert sorted(changed_files(str(tmp_path))) == ["optimizer.pt", "trainer_state.json"]
    (tmp_path / CHECKSUMS).write_text("[]")
    assert changed_files(str(tmp_path)) == [CHECKSUMS]
