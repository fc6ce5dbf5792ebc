"""Two processes over gloo equal one. `python -m pytest tests/test_training_processes.py`"""

import json

import pytest
import torch

from tests.training_runs import (
    SMALL,
    launch_two,
    logged,
    same_bits,
    sums,
    train_here,
    weights,
    write_jsonl,
    write_recipe,
)

SAME_NOISE = """
import sys
from training.train import main
from training.trainer import L2DTrainer

L2DTrainer._draw = lambda self, inputs, index, targets: self.evaluation_queries(inputs)
main(sys.argv[1:])
"""


@pytest.fixture
def settings(tmp_path, base_dir):
    """A run of three steps of 8 examples, evaluated on an odd number of them."""
    data = write_jsonl(tmp_path / "data.jsonl", sums(31))
    return {**SMALL, "base": base_dir, "dataset": data, "eval_holdout": 7, "eval_draws": 2, "draws": 2}


def test_two_processes_equal_one(tmp_path, settings, monkeypatch):
    """2 x 2 examples x 2 accumulated steps and 1 x 8: the same losses, weights and evaluation, given the same noise."""
    from training.trainer import L2DTrainer

    script = tmp_path / "same_noise.py"
    script.write_text(SAME_NOISE)
    two = settings | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "output_dir": tmp_path / "two",
    }
    two |= {"per_device_eval_batch_size": 2}
    done = launch_two(["--config", str(write_recipe(tmp_path / "two.yaml", **two))], script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(L2DTrainer, "_draw", lambda self, inputs, index, targets: self.evaluation_queries(inputs))
    one = settings | {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"}
    train_here(write_recipe(tmp_path / "one.yaml", **one))
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=2e-6)
    assert logged(tmp_path / "two", "accuracy") == pytest.approx(logged(tmp_path / "one", "accuracy"), abs=1e-9)
    found, expected = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("two", "one"))
    for name in expected:
        if "loss" in name or "accuracy" in name:
            assert found[name] == pytest.approx(expected[name], abs=2e-5), name
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=5e-5)


def test_resume_with_two_processes(tmp_path, settings):
    """The real command with two processes, from the beginning and from a checkpoint: bit for bit the same."""
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "output_dir": tmp_path / "out"}
    path = write_recipe(tmp_path / "recipe.yaml", **settings)
    done = launch_two(["--config", str(path)])
    assert done.returncode == 0, done.stderr[-3000:]
    whole, losses, middle = weights(tmp_path / "out"), logged(tmp_path / "out"), tmp_path / "out" / "checkpoint-2"
    assert all((middle / f"rng_state_{rank}.pth").exists() for rank in range(2)), "two processes that train alone"
    done = launch_two(["--config", str(path), "--resume_from_checkpoint", str(middle)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_bits(whole, weights(tmp_path / "out")) and losses == logged(tmp_path / "out")
    refused = launch_two(["--config", str(path)])
    assert refused.returncode != 0 and refused.stderr.count("error: output_dir=") == 1
