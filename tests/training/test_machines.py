"""Two machines: two launchers in network namespaces of their own, which meet over a cable between them.

One is killed: the other ends with one sentence, and both together go on from the last checkpoint, bit for bit.
`python -m pytest tests/training/test_machines.py`, as root where namespaces can be made.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import REPOSITORY, RUNS, SMALL, logged, same_bits, sums, weights, write_jsonl, write_recipe

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines():
    """Names of two namespaces, joined by a veth pair; skips where they cannot be made."""
    names = ends = [f"l2d{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("no command `ip`: network namespaces cannot be made here")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    else:
        yield list(zip(names, ends, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


# The second machine goes down, launcher and all, after the second step of the last run.
KILLED = """
import signal
from transformers import TrainerCallback
from training import train

build_before = train.build_trainer

class PowerCut(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1 and args.output_dir.endswith("killed"):
            os.kill(os.getppid(), signal.SIGKILL)  # the launcher
            os.kill(os.getpid(), signal.SIGKILL)

def build_with_power_cut(job):
    trainer = build_before(job)
    trainer.callback_handler.callbacks.insert(0, PowerCut())
    return trainer

train.build_trainer = build_with_power_cut
"""
KILLED_RUNS = RUNS.replace("with open(sys.argv[1])", KILLED + "with open(sys.argv[1])")


def launch(machines, folder: Path, runs: list[list[str]], script: str) -> list[subprocess.CompletedProcess]:
    """The documented command on both machines, at once."""
    (folder / "runs.json").write_text(json.dumps([({}, arguments) for arguments in runs]))
    (folder / "script.py").write_text(script)
    config = REPOSITORY / "training" / "accelerate_configs" / "multi_node.yaml"
    started = []
    for rank, (name, end) in enumerate(machines):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        launcher += ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0]]
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": end}
        command = ["ip", "netns", "exec", name, *launcher, str(folder / "script.py"), str(folder / "runs.json")]
        started.append(
            subprocess.Popen(
                command, env=environment, cwd=folder, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    done = []
    for process in started:
        stdout, stderr = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr))
    return done


def test_a_machine_is_lost_and_the_run_goes_on(tmp_path, base_dir, machines):
    data = write_jsonl(tmp_path / "data.jsonl", sums(31))
    settings = {**SMALL, "base": base_dir, "dataset": data, "max_steps": 3, "eval_holdout": 7}
    settings |= {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    recipe = write_recipe(tmp_path / "recipe.yaml", **settings, output_dir=tmp_path / "whole")
    whole, killed = ["--config", str(recipe)], ["--config", str(recipe), "--output_dir", str(tmp_path / "killed")]
    first, second = launch(machines, tmp_path, [whole, killed], KILLED_RUNS)
    assert second.returncode == -9 and first.returncode == 1, first.stderr[-3000:]
    assert (tmp_path / "killed" / "checkpoint-1").exists() and not (tmp_path / "killed" / "model.safetensors").exists()
    said = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "another process of this run ended or cannot be reached" in said[0], first.stderr[-3000:]
    assert "start all processes again with resume_from_checkpoint: auto." in said[0]
    assert "training/train.py" not in first.stderr, "no traceback of ours"
    for done in launch(machines, tmp_path, [killed], RUNS):
        assert done.returncode == 0, done.stderr[-3000:]
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    for value in ("loss", "grad_norm", "eval_loss"):
        assert logged(tmp_path / "whole", value) == logged(tmp_path / "killed", value)
