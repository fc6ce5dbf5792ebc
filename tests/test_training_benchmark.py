"""The training benchmark runs and measures what it says. `python -m pytest tests/test_training_benchmark.py`"""

import json

import pytest
import torch

from tests.benchmarks.training import COMMON, main, make_rows, naive_loss, parse
from tests.conftest import randomise_path, train_tokenizer
from training.config import L2DTrainingConfig
from training.trainer import L2DTrainer, response_positions


def test_figures(tmp_path):
    """All keys, on the smallest shape; memory is measured in processes of their own and left out here."""
    small = ["--shape", "tiny", "--steps", "1", "--batch-size", "2", "--length", "32", "--draws", "2", "--threads", "1"]
    figures = main([*small, "--no-memory", "--json", str(tmp_path / "figures.json")])
    assert figures["speedup_over_naive"] > 0 and figures["speedup_over_sft"] > 0
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["draws"] == 2 and written["speedup_over_naive"] == figures["speedup_over_naive"]


def test_the_naive_step_has_the_same_loss(tmp_path, monkeypatch):
    """Given the same times and noise, the naive way and ours agree."""
    from l2d import L2DConfig, L2DForCausalLM
    from tests.benchmarks.models import make_base

    arguments = parse(["--shape", "tiny", "--batch-size", "2", "--length", "24"])
    base = make_base("tiny", torch.float32, "cpu")
    model = L2DForCausalLM.from_base(base, L2DConfig(diffusion_dim=8, noise_std=2.0))
    randomise_path(model)
    rows = make_rows(arguments, base.config.vocab_size)
    args = L2DTrainingConfig(**COMMON, output_dir=str(tmp_path), use_cpu=True)
    trainer = L2DTrainer(model, args, train_dataset=rows, processing_class=train_tokenizer())
    batch = trainer.data_collator([{**row} for row in trainer.train_dataset])
    time, noise = torch.full((2, 23), 0.4), torch.randn(2, 23, 8)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: time.flatten())
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: noise.flatten(0, 1))
    naive = naive_loss(trainer, batch)
    monkeypatch.undo()
    index, targets = response_positions(batch["labels"])
    queries = trainer._draw(batch, index, targets)
    queries.time = time.gather(1, index)[None]
    queries.noise = noise.gather(1, index[..., None].expand(-1, -1, 8))[None]
    trainer._draw = lambda *args: queries
    assert trainer.compute_loss(model, batch).item() == pytest.approx(naive.item(), rel=1e-5)
