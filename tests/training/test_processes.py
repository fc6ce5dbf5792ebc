"""Two processes over gloo equal one. `python -m pytest tests/training/test_processes.py`"""

import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from tests.training_runs import (
    REPOSITORY,
    SMALL,
    launch_configuration,
    launch_two,
    logged,
    same_bits,
    same_gradients,
    sums,
    train_here,
    weights,
    write_jsonl,
    write_recipe,
)
from training import checks
from training.recipe import read_recipe

CONFIGS = REPOSITORY / "training" / "accelerate_configs"
SAME_NOISE = """
import sys
from training.train import main
from training.trainer import L2DTrainer

L2DTrainer._draw = lambda self, inputs, index, targets: self.evaluation_targets(inputs)
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
    two |= {"per_device_eval_batch_size": 2, "max_evaluations_per_pass": 7}
    recipe, config = write_recipe(tmp_path / "two.yaml", **two), launch_configuration(tmp_path, "ddp", 2)
    done = launch_two(["--config", str(recipe)], script, config)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(L2DTrainer, "_draw", lambda self, inputs, index, targets: self.evaluation_targets(inputs))
    one = settings | {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"}
    train_here(write_recipe(tmp_path / "one.yaml", **one))
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=2e-6)
    assert logged(tmp_path / "two", "accuracy") == pytest.approx(logged(tmp_path / "one", "accuracy"), abs=1e-9)
    found, expected = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("two", "one"))
    for name in expected:
        if "loss" in name or "accuracy" in name:
            assert found[name] == pytest.approx(expected[name], abs=2e-5), name
    same_gradients(tmp_path / "two", tmp_path / "one")
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=5e-5)


@pytest.mark.slow
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


SHARDED_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "given", "words"),
    [
        ({}, {}, None),
        ({}, {"max_evaluations_per_pass": 5}, "max_evaluations_per_pass would be ignored with sharding"),
        ({}, {"eval_samples": 2}, "need the whole model"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "fsdp_state_dict_type would leave no model"),
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version=1 is not supported: set it to 2"),
    ],
)
def test_what_sharding_cannot_do_is_refused(tmp_path, settings, monkeypatch, environment, given, words):
    for name, value in {**SHARDED_ENVIRONMENT, **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(checks, "check_launch", lambda state: None)  # this machine would not do it
    path = write_recipe(tmp_path / "recipe.yaml", **settings, output_dir=tmp_path / "out", **given)
    if words is None:
        read_recipe(["--config", str(path)])
        return
    with pytest.raises(ValueError, match=words):
        read_recipe(["--config", str(path)])


@pytest.mark.parametrize(
    ("environment", "kind", "processes", "words"),
    [
        ({}, "NO", 1, None),
        ({"WORLD_SIZE": "2"}, "MULTI_CPU", 2, None),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP", 2, None),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED", 2, None),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "MULTI_CPU", 2, "asks for FSDP, and accelerate"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "MULTI_CPU", 2, "asks for DeepSpeed, and accelerate"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "NO", 1, "asks for DeepSpeed, and accelerate"),
        ({"WORLD_SIZE": "2"}, "NO", 1, "started 2 processes, and on this cpu each of them would train alone"),
        ({"WORLD_SIZE": "2"}, "NO", 2, "started 2 processes, and on this cpu each of them would train alone"),
    ],
)
def test_a_launch_is_what_its_configuration_says(monkeypatch, environment, kind, processes, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    state = AcceleratorState.__new__(AcceleratorState)
    vars(state).update(distributed_type=DistributedType[kind], num_processes=processes, device=torch.device("cpu"))
    if words is None:
        checks.check_launch(state)
        return
    with pytest.raises(ValueError, match=words):
        checks.check_launch(state)


def test_a_sharded_launch_on_cpus_ends_with_one_sentence(tmp_path, settings, monkeypatch, capsys):
    """Accelerate alone would turn it into plain data parallel, or here into one process."""
    for name, value in SHARDED_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        train_here(write_recipe(tmp_path / "recipe.yaml", **settings, output_dir=tmp_path / "out"))
    assert capsys.readouterr().err.startswith("error: the launch configuration asks for FSDP, and accelerate")
    assert not (tmp_path / "out").exists()


def test_every_configuration_is_launched_or_says_what_is_missing():
    """In its first lines; the two of DeepSpeed, of which tests launch one, differ in the stage alone."""
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests" / "training").glob("test_*.py"))
    tests += (REPOSITORY / "tests" / "training_runs.py").read_text()
    launched = set(re.findall(r'launch_(?:runs|configuration)\(\w+, "(\w+)"', tests))
    launched |= set(re.findall(r'"accelerate_configs" / "(\w+)\.yaml"', tests))
    for path in CONFIGS.iterdir():
        says = "Not tested: " in "".join(path.read_text().splitlines(keepends=True)[:2])
        assert says or path.stem in launched | {"deepspeed_zero2"}, path.name
    zero2, zero3 = ((CONFIGS / f"deepspeed_zero{stage}.yaml").read_text() for stage in (2, 3))
    zero2, zero3 = (
        [line for line in text.splitlines() if "zero" not in line and "#" not in line] for text in (zero2, zero3)
    )
    assert zero2 == zero3


def test_accelerate_configs_are_readable():
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    kinds = {name: str(config.distributed_type).split(".")[-1] for name, config in found.items()}
    assert kinds == {
        "single": "NO", "cpu_2": "MULTI_GPU", "ddp": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP",
        "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED",
    }  # fmt: skip
