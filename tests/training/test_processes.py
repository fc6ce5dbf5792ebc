"""Two processes over gloo equal one. `python -m pytest tests/training/test_processes.py`"""

import json
import shutil
import sys

import pytest
import torch

from l2d import L2DForCausalLM
from tests.training_runs import (
    BASELINE,
    REPOSITORY,
    SMALL,
    _run,
    launch_two,
    logged,
    same_bits,
    same_gradients,
    sums,
    train_here,
    train_in_process,
    weights,
    write_jsonl,
    write_recipe,
)
from training.checkpointing.disk_errors import Interrupted
from training.checkpointing.resume import check_sharding_of
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
    done = launch_two(["--config", str(write_recipe(tmp_path / "two.yaml", **two))], script=script)
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


SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from l2d import L2DConfig, L2DForCausalLM
from l2d.network.diffusion_path import NoisedTargets
from tests.conftest import SIZES, randomise_path
from training.draws import split_targets

dist.init_process_group("gloo")

def make(variant, warm_start):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, vocab_size=99), dtype=torch.bfloat16)
    small = dict(diffusion_dim=8, input_width=8, conditioning_width=8, frequency_width=8, lora_rank=2, noise_std=2.0)
    model = L2DForCausalLM.from_base(base, L2DConfig(variant=variant, warm_start=warm_start, **small))
    randomise_path(model)
    return model.train()

torch.manual_seed(1 + dist.get_rank())
ids = torch.randint(3, 99, (2, 10))
index = torch.tensor([[3, 4, 5], [6, 7, -1]])
noised = NoisedTargets(index, torch.randint(3, 99, (2, 3)), torch.rand(2, 2, 3), torch.randn(2, 2, 3, 8))
for variant, warm_start in (("lora", False), ("full", False), ("lora", True)):
    sharded, whole = make(variant, warm_start), make(variant, warm_start)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    for model in (sharded, whole):
        state = None
        for piece in split_targets(noised, 5):
            output = model(ids, noised_targets=piece, state=state)
            output.nll.sum().backward()
            state = output.state
    saved = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    for name, parameter in whole.trained_parameters():
        dist.all_reduce(parameter.grad)
        found = sharded.get_parameter(name).grad.full_tensor()
        torch.testing.assert_close(found, parameter.grad / 2, rtol=1e-5, atol=1e-6)
        assert dist.get_rank() or torch.equal(saved[name], parameter), name
    if dist.get_rank() == 0:
        print("equal", variant, warm_start, flush=True)
dist.destroy_process_group()
"""


def test_sharded_gradients_are_the_whole_models(tmp_path):
    """FSDP2 over the whole model as one unit, as `fsdp2.yaml` has it, in two CPU processes, in pieces."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = _run([*launcher, str(script)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal lora False\nequal full False\nequal lora True\n" in done.stdout


# Accelerate takes FSDP for accelerators only; on CPUs its own state says so, and all that follows works on them.
ON_CPUS = """
import sys
from accelerate import state
from accelerate.utils import DistributedType
from tests.conftest import randomise_path
from training import train
from training.trainer import L2DTrainer

make, build = state.AcceleratorState.__init__, train.build_trainer

def sharded_state(self, *args, fsdp_plugin=None, **kwargs):
    make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

def build_trainer(job):
    trainer = build(job)
    if hasattr(trainer, "evaluation_targets"):
        randomise_path(trainer.model)
        trainer.args.max_evaluations_per_pass = 3 if trainer.is_fsdp_enabled else 512  # sharded ones take all at once
    train.say(f"sharded: {trainer.is_fsdp_enabled}")
    return trainer

L2DTrainer._draw = lambda self, inputs, index, targets: self.evaluation_targets(inputs)
state.AcceleratorState.__init__, train.build_trainer = sharded_state, build_trainer
train.main(sys.argv[1:])
"""


def on_cpus(folder, name):
    """A launch configuration of ours, for two processes."""
    path = folder / f"{name}.yaml"
    text = (CONFIGS / f"{name}.yaml").read_text().replace("num_processes: 8", "num_processes: 2")
    path.write_text(text + "main_process_port: 0\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["l2d", "lora_sft"])
def test_sharded_training_equals_one_process(tmp_path, settings, method):
    """`fsdp2.yaml` through accelerate, in bfloat16, with evaluation and checkpoints: the same losses and weights."""
    if method == "l2d":
        config, settings = on_cpus(tmp_path, "fsdp2"), {**settings, "variant": "lora", "dtype": "bfloat16"}
    else:
        config = on_cpus(tmp_path, "fsdp2_baselines")
        settings = {**BASELINE, **{name: settings[name] for name in ("base", "dataset", "eval_holdout")}}
    settings |= {"method": method, "lora_rank": 2, "bf16": method == "l2d"}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
    script = tmp_path / "on_cpus.py"
    script.write_text(ON_CPUS)
    two = settings | {"output_dir": tmp_path / "two", "save_strategy": "steps", "save_steps": 1}
    if method == "l2d":  # the smallest loss, which is not the last one's
        two |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    path = write_recipe(tmp_path / "two.yaml", **two)
    done = launch_two(["--config", str(path)], script, config)
    assert done.returncode == 0 and "sharded: True" in done.stdout, done.stderr[-3000:]
    one = settings | {"output_dir": tmp_path / "one", "gradient_accumulation_steps": 2}
    alone = train_in_process(["--config", str(write_recipe(tmp_path / "one.yaml", **one))], code=ON_CPUS)
    assert alone.returncode == 0 and "sharded: False" in alone.stdout, alone.stderr[-3000:]
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=1e-5)
    best, last = (tmp_path / "two" / f"checkpoint-{step}" for step in (1, 3))
    whole = weights(last if method == "l2d" else tmp_path / "two")
    assert whole.keys() == weights(tmp_path / "one").keys()
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-3, atol=5e-5)
    if method != "l2d":
        return
    losses = logged(tmp_path / "two", "eval_loss")
    assert losses == pytest.approx(logged(tmp_path / "one", "eval_loss"), abs=2e-3)  # other batches round otherwise
    assert losses[1] == min(losses.values()) and same_bits(weights(tmp_path / "two"), weights(best))
    assert not any("base" in name for name in whole)
    assert not list(best.glob("pytorch_model*")), "accelerate's copy of the model would hold the base"
    L2DForCausalLM.from_pretrained(tmp_path / "two")
    with pytest.raises(Interrupted, match="checkpoint-1 was saved with FSDP, this run has no sharding"):
        check_sharding_of(str(best), "no sharding")
    shutil.rmtree(last)
    done = launch_two(["--config", str(path), "--resume_from_checkpoint", str(best)], script, config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_bits(whole, weights(last)) and same_bits(weights(tmp_path / "two"), weights(best))


SHARDED_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "given", "words"),
    [
        ({}, {}, None),
        ({}, {"max_evaluations_per_pass": 5}, "max_evaluations_per_pass would be ignored with sharding"),
        ({}, {"eval_samples": 2}, "need the whole model"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "fsdp_state_dict_type would leave no model"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "true"}, {}, "fsdp_reshard_after_forward=true does not go with method l2d"),
        ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, {}, "set it to NO_WRAP"),
        ({"FSDP_VERSION": "1"}, {}, "set it to 2"),
    ],
)
def test_what_sharding_cannot_do_is_refused(tmp_path, settings, monkeypatch, environment, given, words):
    for name, value in {**SHARDED_ENVIRONMENT, **environment}.items():
        monkeypatch.setenv(name, value)
    path = write_recipe(tmp_path / "recipe.yaml", **settings, output_dir=tmp_path / "out", **given)
    if words is None:
        read_recipe(["--config", str(path)])
        return
    with pytest.raises(ValueError, match=words):
        read_recipe(["--config", str(path)])


def test_accelerate_configs_are_readable():
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.stem: load_config_from_file(str(path)) for path in CONFIGS.glob("*.yaml")}
    kinds = {name: str(config.distributed_type).split(".")[-1] for name, config in found.items()}
    assert kinds == {
        "single": "NO", "cpu_2": "MULTI_GPU", "ddp": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP",
        "fsdp2_baselines": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED",
    }  # fmt: skip
