"""What the study runs: methods, recipes, and the steps as commands that a user could type.

* `METHODS`: every method with its options, what tables call it, what a step costs and how many seeds it gets
* `Run`: one training of one method, on one task, from one base
* `recipes`: one YAML file per run
* `build_steps`: rows, bases, trainings (`python -m training.train`) and one evaluation per checkpoint

All trainings of a task take the processor time of its steps of plain L2D: a method with cheaper steps gets more.
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

SEEDS, HEADLINE_SEEDS = (0, 1), (0, 1, 2, 3, 4)
HEADLINE_TASK = "products"
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
    "max_evaluations_per_pass": 4096,
}


@dataclass(frozen=True)
class Method:
    """A way to train, `name` in folders and results.

    Attributes:
        title: in tables and figures.
        options: of the recipe.
        cost: processor time of a step, relative to plain L2D's; `timing` measures it again in every study.
        headline: whether claims rest on it, so that it gets `HEADLINE_SEEDS` on `HEADLINE_TASK`.
    """

    name: str
    title: str
    options: dict[str, Any]
    cost: float
    headline: bool = False

    def seeds(self, task: str) -> tuple[int, ...]:
        """Of its trainings on a task; each is the seed of the base, too."""
        return HEADLINE_SEEDS if self.headline and task == HEADLINE_TASK else SEEDS

    def steps(self, task: str) -> int:
        """Of one training: as many as take the time of the task's steps of plain L2D."""
        return round(TASKS[task].steps / self.cost / 50) * 50


_PLAIN = {**_PATH, "draws": 4}
_CORRUPTED = {**_PLAIN, "corruption_rate": 0.3}
_CARRIED = {**_PATH, "draws": 1, "rollout_evaluations": 8, "rollout_window": 4, "carried_state": True}
_NOISE_FREE = {**_PATH, "noise_free": True}
_LORA = {"method": "lora_sft", "learning_rate": 3e-3, "lora_rank": 32}
_WARM = {"warm_start": True}
_OWN = {**_WARM, "own_keys_rank": 16, "own_values_rank": 16}

METHODS = {
    method.name: method
    for method in (
        Method("plain", "L2D, K = 4 draws", _PLAIN, 1.0, True),
        Method("warm", "warm start: L2D, K = 4 draws", {**_PLAIN, **_WARM}, 1.0),
        Method("corrupted", "L2D, corrupted, q = 0.3, K = 4", _CORRUPTED, 1.0, True),
        Method("warm_corrupted", "warm start: corrupted", {**_CORRUPTED, **_WARM}, 1.0),
        Method("carried", "L2D, rollout + carried state", _CARRIED, 1.3, True),
        Method("warm_carried", "warm start: rollout + carried state", {**_CARRIED, **_WARM}, 1.3),
        Method("warm_own", "warm start: own keys and values", {**_PLAIN, **_OWN}, 1.05),
        Method("warm_carried_own", "warm start: carried, own keys and values", {**_CARRIED, **_OWN}, 1.35),
        Method("noise_free", "control: noise-free path", _NOISE_FREE, 0.4, True),
        Method("warm_noise_free", "warm start: noise-free path", {**_NOISE_FREE, **_WARM}, 0.4),
        Method("warm_noise_free_own", "control: noise-free path, own keys and values", {**_NOISE_FREE, **_OWN}, 0.45),
        Method("lora", "LoRA finetuning, r = 32", _LORA, 0.55),
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
    """Every run of some tasks, the first two seeds of every method before the others."""
    runs = [Run(task, one.name, seed) for task in tasks for one in METHODS.values() for seed in one.seeds(task)]
    return sorted(runs, key=lambda run: (tasks.index(run.task), run.seed not in SEEDS))


def base_seeds(task: str) -> list[int]:
    """Every seed that some method of a task has."""
    return sorted({seed for method in METHODS.values() for seed in method.seeds(task)})


def base_folder(out: Path, task: str, seed: int) -> Path:
    """Where the base of a task and seed is."""
    return out / "runs" / f"{task}-base-{seed}"


def result_file(out: Path, name: str) -> Path:
    """What was measured of a run, or of a base (`<task>-base-<seed>`)."""
    return out / "runs" / f"{name}.json"


def timing_file(out: Path, task: str) -> Path:
    """Processor time of a training step of every method."""
    return out / "runs" / f"{task}-seconds.json"


def recipe(out: Path, run: Run, quick: bool) -> dict[str, Any]:
    """The recipe of a run."""
    task, method = TASKS[run.task], METHODS[run.method]
    path = {"learning_rate": task.learning_rate, "noise_std": task.noise_std} if "variant" in method.options else {}
    order = {"train_sampling_strategy": "sequential"} if task.ordered else {}
    return {
        "base": str(base_folder(out, run.task, run.seed)),
        "dataset": str(out / "data" / run.task / "train.jsonl"),
        "max_steps": QUICK_STEPS if quick else method.steps(run.task),
        "seed": run.seed,
        **TRAINING,
        **path,
        **method.options,
        **order,
        "output_dir": str(out / "runs" / run.name),
    }


def recipes(out: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """The recipes of all runs, by name."""
    return {run.name: recipe(out, run, quick) for run in all_runs(list(TASKS))}


def build_steps(out: Path, tasks: list[str], quick: bool, methods: list[str]) -> list[Step]:
    """The steps of some methods, all of one task before those of the next, what others wait for first.

    Steps are timed where all methods are meant.
    """
    return [step for task in tasks for step in _task_steps(out, task, quick, methods)]


def _task_steps(out: Path, task: str, quick: bool, methods: list[str]) -> list[Step]:
    data = out / "data" / task
    rows, target = ([str(QUICK_ROWS)], ["0"]) if quick else ([], [])
    steps = [Step(f"data {task}", _python("training.studies.prepare", "data", task, data, *rows), data)]
    bases: set[int] = set()
    for run in all_runs([task]):
        if run.method not in methods:
            continue
        if run.seed not in bases:
            base, name = base_folder(out, task, run.seed), f"base {task} {run.seed}"
            command = _python("training.studies.prepare", "base", task, run.seed, data, base, *target)
            steps.append(Step(name, command, base, needs=(f"data {task}",)))
            steps.append(_evaluation(out, task, base.name, name))
            bases.add(run.seed)
        command = _python("training.train", "--config", out / "configs" / f"{run.name}.yaml")
        steps.append(Step(f"train {run.name}", command, out / "runs" / run.name, needs=(f"base {task} {run.seed}",)))
        steps.append(_evaluation(out, task, run.name, f"train {run.name}"))
    return [*steps, _timing(out, task)] if set(methods) == set(METHODS) else steps


def _python(*arguments: Any) -> tuple[str, ...]:
    return (sys.executable, "-m", *map(str, arguments))


def _timing(out: Path, task: str) -> Step:
    file = timing_file(out, task)
    configs = (f"{name}={out / 'configs' / Run(task, name, SEEDS[0]).name}.yaml" for name in METHODS)
    return Step(f"time {task}", _python("training.demo.timing", file, *configs), file, (f"base {task} {SEEDS[0]}",))


def _evaluation(out: Path, task: str, name: str, needs: str) -> Step:
    file = result_file(out, name)
    command = _python("training.studies.evaluate", out / "runs" / name, out / "data" / task, file)
    return Step(f"evaluate {name}", command, file, needs=(needs,), result=lambda: _summary(file))


def _summary(file: Path) -> str:
    scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
    solved = {name: sum(score["greedy"]) / len(score["greedy"]) for name, score in scores.items()}
    return "greedy " + ", ".join(f"{name} {value:.3f}" for name, value in solved.items())
