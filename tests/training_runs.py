"""Helpers of the training tests: recipes for tiny runs, and ways to run them.

- `SMALL`: settings of a run that takes a second
- `write_recipe`, `write_jsonl`, `sums`: files that a run reads
- `train_here`, `train_in_process`, `launch_two`: in this process, in one of its own, in two with gloo
- `INTERRUPTED`: the entry point, with a signal to itself at a chosen moment
- `weights`, `same_bits`, `same_gradients`, `logged`: what a run left
- `RUNS`, `launch_runs`: the entry point, several times in the same processes
- `draw_by_example`: training draws that do not depend on how examples are put into batches
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "method": "l2d",
    "variant": "full",
    "diffusion_dim": 8,
    "input_width": 8,
    "conditioning_width": 8,
    "frequency_width": 8,
    "noise_std": 2.0,
    "learning_rate": 0.003,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "activation_checkpointing": False,
    "disable_tqdm": True,
}
BASELINE = {name: SMALL[name] for name in SMALL if name not in (
    "variant", "diffusion_dim", "input_width", "conditioning_width", "frequency_width", "noise_std"
)}  # fmt: skip


# SIGNAL (KILL or TERM) reaches the process of rank SIGNAL_RANK (-1: all) at step SIGNAL_AT, at one of the moments
# "begin" and "end" of the step, or while a checkpoint is written: "saving" (weights are there, the rest is not).
INTERRUPTED = """
import os, signal, sys
from transformers import TrainerCallback
from training import train
from training.checkpointing import atomic as saving

at, where = int(os.environ["SIGNAL_AT"]), os.environ.get("SIGNAL_WHERE", "end")
number = getattr(signal, "SIG" + os.environ.get("SIGNAL", "KILL"))

def interrupt(step, moment):
    if step == at and moment == where and os.environ.get("SIGNAL_RANK", "-1") in ("-1", os.environ.get("RANK", "0")):
        os.kill(os.getpid(), number)

class Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        interrupt(state.global_step + 1, "begin")

    def on_step_end(self, args, state, control, **kwargs):
        interrupt(state.global_step, "end")

save_curve = saving.SafeCheckpoints._save_curve

def interrupted_save(self, folder):
    interrupt(self.state.global_step, "saving")
    save_curve(self, folder)

saving.SafeCheckpoints._save_curve = interrupted_save
build = train.build_trainer

def build_trainer(job):
    trainer = build(job)
    trainer.callback_handler.callbacks.insert(0, Interrupt())
    return trainer

train.build_trainer = build_trainer
train.main(sys.argv[1:])
"""


def sums(count: int) -> list[dict[str, str]]:
    """`count` different prompts and completions of unequal lengths."""
    return [{"prompt": f"Question: {i} and {7 * i}?\nAnswer:", "completion": f" {8 * i}"} for i in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a data file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, **settings: Any) -> Path:
    """Write a recipe; settings that are `None` are left out, paths become text."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if v is not None}
    path.write_text(yaml.safe_dump(plain))
    return path


def train_here(recipe: Path, *options: str) -> None:
    """Run the entry point in this process."""
    from training.train import main

    main(["--config", str(recipe), *options])


def train_in_process(arguments: list[str], code: str | None = None, **kwargs: Any) -> subprocess.CompletedProcess:
    """`python -m training.train ARGUMENTS`, or `python -c CODE ARGUMENTS`, in a process of its own."""
    start = ["-m", "training.train"] if code is None else ["-c", code]
    return _run([sys.executable, *start, *arguments], **kwargs)


def launch_two(
    arguments: list[str], script: Path | None = None, config: Path | None = None, **kwargs: Any
) -> subprocess.CompletedProcess:
    """The same with `accelerate launch` and two gloo processes; `script` runs instead of the entry point."""
    config = config or REPOSITORY / "training" / "accelerate_configs" / "cpu_2.yaml"
    target = ["-m", "training.train"] if script is None else [str(script)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return _run([*launcher, *target, *arguments], **kwargs)


def draw_by_example(trainer: Any, inputs: dict[str, torch.Tensor], index: torch.Tensor, targets: torch.Tensor) -> Any:
    """What `L2DTrainer._draw` gives, each row drawn from its own tokens; windows of rollouts must be whole rollouts."""
    from torch.nn.functional import pad

    from l2d.network.diffusion_path import NoisedTargets
    from training.draws import training_targets

    rows, width = [], index.shape[1]
    for row, count in enumerate((index >= 0).sum(1).tolist()):
        key = (trainer.args.seed, *inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist())
        part = slice(row, row + 1), slice(0, count)
        rows.append(training_targets(trainer.model.config, trainer.args, index[part], targets[part], None, key, 0))

    def joined(name: str, padding: tuple[int, ...], dim: int) -> torch.Tensor | None:
        values = [getattr(noised, name) for noised in rows]
        if values[0] is None:
            return None
        return torch.cat([pad(v, (*padding, 0, width - v.shape[dim + 1])) for v in values], dim)

    dim = rows[0].time.dim() - 2
    fields = [joined("time", (), dim), joined("noise", (0, 0), 1), None, joined("sources", (), 1)]
    others = {"unscored": rows[0].unscored, "spared": joined("spared", (), 0)}
    return NoisedTargets(index, targets, *fields, joined("uniforms", (), 1), **others)


def _run(command: list[str], env: dict[str, str] | None = None, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(env or {})}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=900)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint folder."""
    return load_file(folder / "model.safetensors")


def same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints hold the same names and bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def same_gradients(one: Path, two: Path, rel: float = 1e-4) -> None:
    """Two runs logged the same norms of their gradients, whose scale Adam's weights do not show."""
    norms = logged(one, "grad_norm")
    assert norms and norms == pytest.approx(logged(two, "grad_norm"), rel=rel)


def logged(folder: Path, name: str = "loss") -> dict[int, float]:
    """Logged value of `name` by step."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return {entry["step"]: entry[name] for entry in state["log_history"] if name in entry}


def assert_resumed_exactly(whole: Path, resumed: Path, stem: str) -> None:
    """A run of three steps, resumed after the first: the same bits, in every checkpoint and log line that follows."""
    for step in (2, 3):
        file = f"checkpoint-{step}/{stem}.safetensors"
        assert same_bits(load_file(whole / file), load_file(resumed / file)), step
    assert same_bits(weights(whole), weights(resumed))
    for value in ("loss", "eval_loss", "grad_norm"):
        assert logged(whole, value) == logged(resumed, value), value


# Several runs by the same processes, as starting them takes longer than a run. Trained weights are random and matter,
# noise belongs to an example. Accelerate takes FSDP for accelerators only: on CPUs its own state says so, and all that
# follows works on them. Nothing is compiled: of DeepSpeed's own operators CPUs would use one, for sums.
RUNS = """
import json, os, sys
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from tests.conftest import randomise_path
from training import train
from training.trainer import L2DTrainer

start, make, build = state.PartialState.__init__, state.AcceleratorState.__init__, train.build_trainer

def sharded_processes(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        self.distributed_type = DistributedType.FSDP

def sharded_state(self, *args, fsdp_plugin=None, **kwargs):
    make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.FSDP and fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin

def build_trainer(job):
    trainer = build(job)
    if hasattr(trainer, "evaluation_targets"):
        randomise_path(trainer.model)
    train.say(f"sharded: {trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled}")
    return trainer

def finish(trainer):
    units = [type(module).__name__ for module in trainer.model.modules() if isinstance(module, FSDPModule)]
    train.say(f"units: {units}")

L2DTrainer._draw = lambda self, inputs, index, targets: self.evaluation_targets(inputs)
state.PartialState.__init__, state.AcceleratorState.__init__ = sharded_processes, sharded_state
train.build_trainer, train.finish = build_trainer, finish
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
with open(sys.argv[1]) as file:
    runs = json.load(file)
status = 0
for environment, arguments in runs:
    os.environ.update(environment)
    print("run", *arguments, flush=True)
    try:
        train.main(arguments)
    except SystemExit as end:  # it has said why
        status = end.code
sys.stdout.flush(), sys.stderr.flush()
os._exit(status)
"""


def launch_configuration(folder: Path, name: str, processes: int) -> Path:
    """A launch configuration of ours, for so many processes."""
    text = (REPOSITORY / "training" / "accelerate_configs" / f"{name}.yaml").read_text()
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("num_processes: 8", f"num_processes: {processes}") + "main_process_port: 0\n")
    return path


def launch_runs(folder: Path, config: str, runs: list[tuple[dict[str, str], list[str]]], processes: int = 2) -> str:
    """`RUNS`, (environment, arguments) each, in processes of a launch configuration of ours, sharded if more than one.

    Returns what they printed.
    """
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "runs.py").write_text(RUNS)
    chosen = launch_configuration(folder, config, processes)
    done = launch_two([str(folder / "runs.json")], folder / "runs.py", chosen)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count(f"sharded: {processes > 1}") == len(runs), done.stderr[-5000:]
    return done.stdout
