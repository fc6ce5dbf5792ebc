"""What the study runs: methods, recipes, and the steps as commands that a user could type.

* `METHODS`: every method with its options, its steps relative to plain L2D's, and what tables call it
* `Run`: one training of one method, on one task, from one base
* `recipes`: one YAML file per run
* `build_steps`: rows, bases, trainings (`python -m training.train`) and one evaluation per checkpoint
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.demo.plan import TRAINING
from training.demo.runner import Step
from training.demo.workspace import Layout
from training.studies.tasks import TASKS

SEEDS = (0, 1)
QUICK_STEPS, QUICK_ROWS = 20, 2000
LAYOUT = Layout(
    "study", ("study.md", "study.png", "results.json", "data", "runs", "configs", "logs", "cache", "study.json")
)

_PATH = {
    "method": "l2d",
    "variant": "full",
    "diffusion_dim": 64,
    "input_width": 64,
    "conditioning_width": 64,
    "frequency_width": 64,
    "max_queries": 4096,
}
_ROLLOUT = {"draws": 1, "rollout_evaluations": 8, "rollout_window": 4}


@dataclass(frozen=True)
class Method:
    """A way to train, `name` in folders and results.

    Attributes:
        title: in tables and figures.
        options: of the recipe.
        length: number of steps, as a multiple of the task's.
        only: the one task that it is for, or `None`.
    """

    name: str
    title: str
    options: dict[str, Any]
    length: int = 1
    only: str | None = None


METHODS = {
    method.name: method
    for method in (
        Method("plain", "L2D, plain, K = 4 draws", {**_PATH, "draws": 4}),
        Method("corrupted", "L2D, corrupted, q = 0.3, K = 4", {**_PATH, "draws": 4, "corruption_rate": 0.3}),
        Method("rollout", "L2D, rollout, R = 8, G = 4", {**_PATH, **_ROLLOUT}),
        Method("carried", "L2D, rollout + carried state", {**_PATH, **_ROLLOUT, "carried_state": True}),
        Method(
            "carried_long",
            "L2D, rollout + carried state, three times the steps",
            {**_PATH, **_ROLLOUT, "carried_state": True},
            3,
            "machine",
        ),
        Method("noise_free", "control: noise-free path", {**_PATH, "noise_free": True}),
        Method("noise_free_long", "control: noise-free path, twice the steps", {**_PATH, "noise_free": True}, 2),
        Method("lora", "LoRA finetuning, r = 32", {"method": "lora_sft", "learning_rate": 3.0e-3, "lora_rank": 32}),
        Method("full", "full finetuning", {"method": "full_sft", "learning_rate": 3.0e-3}),
        Method(
            "full_long",
            "full finetuning, three times the steps",
            {"method": "full_sft", "learning_rate": 3.0e-3},
            3,
            "machine",
        ),
    )
}


@dataclass(frozen=True)
class Run:
    """One training. The seed is that of base and training."""

    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder, recipe and result file."""
        return f"{self.task}-{self.method}-{self.seed}"


def all_runs(tasks: tuple[str, ...] | list[str]) -> list[Run]:
    """Every run of some tasks; the seeds of a method next to each other, so that they run side by side."""
    return [
        Run(task, method.name, seed)
        for task in tasks
        for method in METHODS.values()
        for seed in SEEDS
        if method.only in (None, task)
    ]


def base_folder(out: Path, task: str, seed: int) -> Path:
    """Where the base of a task and seed is."""
    return out / "runs" / f"{task}-base-{seed}"


def result_file(out: Path, name: str) -> Path:
    """What was measured of a run, or of a base (`<task>-base-<seed>`)."""
    return out / "runs" / f"{name}.json"


def recipe(out: Path, run: Run, quick: bool) -> dict[str, Any]:
    """The recipe of a run."""
    task, method = TASKS[run.task], METHODS[run.method]
    own = (
        {"learning_rate": task.learning_rate, "noise_std": task.noise_std} if method.options["method"] == "l2d" else {}
    )
    order = {"train_sampling_strategy": "sequential"} if task.ordered else {}
    return {
        "base": str(base_folder(out, run.task, run.seed)),
        "dataset": str(out / "data" / run.task / "train.jsonl"),
        "max_steps": (QUICK_STEPS if quick else task.steps) * method.length,
        "seed": run.seed,
        **TRAINING,
        **method.options,
        **own,
        **order,
        "output_dir": str(out / "runs" / run.name),
    }


def recipes(out: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """The recipes of all runs, by name."""
    return {run.name: recipe(out, run, quick) for run in all_runs(list(TASKS))}


def build_steps(out: Path, tasks: list[str], quick: bool) -> list[Step]:
    """All steps, those that others wait for first."""
    python = (sys.executable, "-m")
    steps = []
    for task in tasks:
        data = out / "data" / task
        rows, target = ((str(QUICK_ROWS),), ("0",)) if quick else ((), ())
        command = (*python, "training.studies.prepare", "data", task, str(data), *rows)
        steps.append(Step(f"data {task}", command, data))
        for seed in SEEDS:
            base = base_folder(out, task, seed)
            command = (*python, "training.studies.prepare", "base", task, str(seed), str(data), str(base), *target)
            steps.append(Step(f"base {task} {seed}", command, base, needs=(f"data {task}",)))
    for task in tasks:
        for seed in SEEDS:
            steps.append(_evaluation(out, task, f"{task}-base-{seed}", f"base {task} {seed}"))
        for run in all_runs([task]):
            command = (*python, "training.train", "--config", str(out / "configs" / f"{run.name}.yaml"))
            name = f"train {run.name}"
            steps.append(Step(name, command, out / "runs" / run.name, needs=(f"base {task} {run.seed}",)))
            steps.append(_evaluation(out, task, run.name, name))
        steps.append(_timing(out, task))
    return steps


def timing_file(out: Path, task: str) -> Path:
    """Processor time of a training step of every method."""
    return out / "runs" / f"{task}-seconds.json"


def _timing(out: Path, task: str) -> Step:
    runs = all_runs([task])
    configs = (f"{run.method}={out / 'configs' / run.name}.yaml" for run in runs if run.seed == SEEDS[0])
    file = timing_file(out, task)
    command = (sys.executable, "-m", "training.studies.timing", str(file), *configs)
    return Step(f"time {task}", command, file, needs=tuple(f"train {run.name}" for run in runs))


def _evaluation(out: Path, task: str, name: str, needs: str) -> Step:
    file = result_file(out, name)
    command = (sys.executable, "-m", "training.studies.evaluate")
    arguments = (str(out / "runs" / name), str(out / "data" / task), str(file))
    return Step(f"evaluate {name}", command + arguments, file, needs=(needs,), result=lambda: _summary(file))


def _summary(file: Path) -> str:
    scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
    solved = {name: sum(score["greedy"]) / len(score["greedy"]) for name, score in scores.items()}
    return "greedy " + ", ".join(f"{name} {value:.3f}" for name, value in solved.items())
