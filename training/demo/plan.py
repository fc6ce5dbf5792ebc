"""The steps of the demo, as commands that a user could type.

* `CURVES`: the ways to train a path that are evaluated at every budget; a new one is one entry
* `recipes`: what the trainings are told; one YAML file each
* `SETTINGS`: which models are evaluated, and how
* `build_steps`: data, base, trainings (`python -m training.train`) and the time that a step of each takes, the time of
  one evaluation for every budget curve (`python -m training.compare_budgets`, on validation data), and for every
  model the evaluations of its settings
* `lm_eval_command`: one evaluation; every setting has two, one greedy and one sampled at temperature 1
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.demo.runner import ROOT, Step
from training.demo.workspace import Layout

TASKS = ("l2d_demo_products", "l2d_demo_sums")
DECODINGS = {"greedy": (), "sampled": ("--gen_kwargs", "do_sample=true,temperature=1.0")}
BUDGETS = (1, 3, 7, 15, 31)
CURVES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> title, options beyond those of plain L2D, the first one
    "l2d": ("L2D", {}),
    "corrupted": ("L2D, corrupted training", {"corruption_rate": 0.3}),
    "warm": ("L2D, warm start", {"warm_start": True}),
}
CONTROLS = {curve: f"{curve}_once" for curve in CURVES}  # the same path, evaluated once
GATED = {curve: f"{curve}_gated" for curve in CURVES}  # the same path, where the base is not sure
GATED_BUDGET, GATE = 15, 0.9
FINETUNED = {"lora_sft": "LoRA finetuning", "full_sft": "full finetuning"}
NAMES = {
    "base": "base",
    **{curve: title for curve, (title, _) in CURVES.items()},
    **{f"{curve}_once": f"control: one evaluation, {title}" for curve, (title, _) in CURVES.items()},
    **{f"{curve}_gated": f"{title}, base from p = {GATE:g}" for curve, (title, _) in CURVES.items()},
    "noise_free": "control: noise-free path",
    **FINETUNED,
}
STEPS = 2000
NOISE_FREE_STEPS = 5000  # about the processor time that plain L2D takes for its steps of four draws
TRAINING = {
    "per_device_train_batch_size": 128,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.01,
    "adam_beta2": 0.95,
    "use_cpu": True,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 100,
    "report_to": "none",
}


@dataclass(frozen=True)
class Setting:
    """A model and how it is sampled.

    Attributes:
        name: of its folder under that of its model in `results`.
        method: in the leaderboard.
        folder: of the checkpoint in the demo's output folder.
        budget: evaluations per token; a plain model spends 1.
        solver: of the trajectory; `None` for plain models.
        at_best_time: one evaluation, at the time that was best on validation data.
        gate: probability from which on the base's answer is taken; 1 for nowhere.
    """

    name: str
    method: str
    folder: str
    budget: int = 1
    solver: str | None = None
    at_best_time: bool = False
    gate: float = 1.0

    def model(self, out: Path) -> list[str]:
        """Arguments of `lm_eval` that choose the model."""
        if self.solver is None:
            return ["--model", "hf", "--model_args", f"pretrained={out / self.folder}"]
        if self.at_best_time:
            return ["--model", "l2d", "--model_args", chosen(out, self.folder)["model_args"]]
        sampler = f"solver={self.solver},diffusion_budget={self.budget}"
        sampler += f",skip_confidence={self.gate:g}" if self.gate < 1 else ""
        return ["--model", "l2d", "--model_args", f"pretrained={out / self.folder},{sampler}"]

    def final_time(self, out: Path) -> float | None:
        """Where the trajectory ends; `None` for plain models."""
        if self.at_best_time:
            return chosen(out, self.folder)["best_time"]
        return None if self.solver is None else 1.0


SETTINGS = (
    Setting("base", "base", "base"),
    Setting("l2d-1", "l2d", "l2d", 1, "midpoint"),  # the base, with any curve's path
    *(Setting(f"{curve}-{budget}", curve, curve, budget, "midpoint") for curve in CURVES for budget in BUDGETS[1:]),
    *(Setting(method, method, curve, GATED_BUDGET, "midpoint", gate=GATE) for curve, method in GATED.items()),
    *(Setting(method, method, folder, 2, "euler", at_best_time=True) for folder, method in CONTROLS.items()),
    Setting("noise_free", "noise_free", "noise_free", 2, "euler"),
    Setting("lora_sft", "lora_sft", "lora_sft"),
    Setting("full_sft", "full_sft", "full_sft"),
)


def recipes(out: Path) -> dict[str, dict[str, Any]]:
    """The recipes of the trainings: the same data and batches, for the noise-free path more of them."""
    common = {
        "base": str(out / "base"),
        "dataset": str(out / "data" / "products_train.jsonl"),
        "max_steps": STEPS,
        **TRAINING,
    }
    path = {
        "learning_rate": 6.0e-3,
        "variant": "full",
        "max_evaluations_per_pass": 4096,  # fixed: another order of sums gives a somewhat different model
        "diffusion_dim": 64,
        "input_width": 64,
        "conditioning_width": 64,
        "frequency_width": 64,
    }
    noised = {**path, "noise_std": 0.75, "time_power": 4.0, "draws": 4, "sampler": {"budget": 15}}
    own: dict[str, dict[str, Any]] = {
        **{curve: {**noised, **options} for curve, (_, options) in CURVES.items()},
        "noise_free": {**path, "noise_free": True, "max_steps": NOISE_FREE_STEPS},
        **dict.fromkeys(FINETUNED, {"learning_rate": 3.0e-3}),
    }
    return {
        name: {"method": name if name.endswith("_sft") else "l2d", **common, "output_dir": str(out / name), **changes}
        for name, changes in own.items()
    }


LAYOUT = Layout(
    "demo",
    (
        *("report.md", "accuracy.png", "leaderboard.html", "leaderboard.md", "leaderboard.csv", "leaderboard.json"),
        *("trace.html", "trace.json", "step_seconds.json", "data", "base", *recipes(Path())),
        *("configs", "results", "logs", "cache", *(f"{curve}_controls.json" for curve in CURVES), "demo.json"),
    ),
)


def steps_of(method: str) -> int:
    """Of a method's training."""
    return recipes(Path())[method]["max_steps"]


def timing_file(out: Path) -> Path:
    """Processor time of a training step of every method."""
    return out / "step_seconds.json"


def write_recipes(out: Path) -> None:
    """Writes `configs/<method>.yaml`."""
    write_configs(recipes(out), out / "configs")


def write_configs(recipes: dict[str, dict[str, Any]], folder: Path) -> None:
    """Writes `<name>.yaml` for every recipe."""
    folder.mkdir(exist_ok=True)
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def build_steps(out: Path) -> list[Step]:
    """All steps, those that others wait for first."""
    python = (sys.executable, "-m")
    data, base = out / "data", out / "base"
    steps = [
        Step("data", (*python, "training.demo.data", str(data)), data),
        Step(
            "base",
            (*python, "training.demo.base", str(data), str(base)),
            base,
            needs=("data",),
            result=lambda: _base_result(base),
        ),
    ]
    for name in recipes(out):
        command = (*python, "training.train", "--config", str(out / "configs" / f"{name}.yaml"))
        steps.append(Step(f"train {name}", command, out / name, needs=("base",)))
    configs = (f"{name}={out / 'configs' / name}.yaml" for name in recipes(out))
    timing = (*python, "training.demo.timing", str(timing_file(out)), *configs)
    steps.append(Step("time", timing, timing_file(out), needs=("base",)))
    steps += [_choice(out, folder) for folder in CURVES]
    return steps + [_evaluations(out, folder) for folder in dict.fromkeys(setting.folder for setting in SETTINGS)]


def chosen(out: Path, folder: str) -> dict[str, Any]:
    """What `training.compare_budgets` found for the checkpoint in `folder`."""
    return json.loads((out / f"{folder}_controls.json").read_text(encoding="utf-8"))


def _choice(out: Path, folder: str) -> Step:
    file = out / f"{folder}_controls.json"
    command = (sys.executable, "-m", "training.compare_budgets", str(out / folder), "--json", str(file))
    return Step(
        f"choose time {folder}",
        (*command, "--data", str(out / "data" / "products_validation.jsonl"), "--batch_size", "256", "--device", "cpu"),
        file,
        needs=(f"train {folder}",),
        result=lambda: f"one evaluation at t = {chosen(out, folder)['best_time']:g} (validation)",
    )


def result_folder(out: Path, setting: Setting, decoding: str) -> Path:
    """Where `lm_eval` writes the results of one evaluation."""
    return out / "results" / setting.folder / setting.name / decoding


def lm_eval_command(out: Path, setting: Setting, decoding: str) -> list[str]:
    """The command line of one evaluation."""
    return [
        "lm_eval",
        *setting.model(out),
        *("--tasks", ",".join(TASKS)),
        *("--include_path", str(ROOT / "lm_eval_ext" / "tasks" / "demo")),
        *DECODINGS[decoding],
        *("--batch_size", "256", "--device", "cpu"),
        *("--output_path", str(result_folder(out, setting, decoding)), "--log_samples"),
    ]


def _evaluations(out: Path, folder: str) -> Step:
    command = (sys.executable, "-m", "training.demo.evaluate", str(out), folder)
    trained = "base" if folder == "base" else f"train {folder}"
    needed = f"choose time {folder}" if folder in CURVES else trained
    return Step(f"evaluate {folder}", command, out / "results" / folder, needs=(needed,))


def _base_result(base: Path) -> str:
    reached = json.loads((base / "pretraining.json").read_text(encoding="utf-8"))
    return f"{reached['steps']} steps, products {reached['products']:.3f}, sums {reached['sums']:.3f} (validation)"
