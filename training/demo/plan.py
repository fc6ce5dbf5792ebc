"""The steps of the demo, as commands that a user could type.

* `recipes`: what the three trainings are told; one YAML file each
* `SETTINGS`: which models are evaluated, and how
* `build_steps`: data, base, three trainings (`python -m training.train`) and two evaluations (`lm_eval`) per setting,
  one greedy and one sampled at temperature 1
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.demo.runner import ROOT, Step

TASKS = ("l2d_demo_products", "l2d_demo_sums")
DECODINGS = {"greedy": (), "sampled": ("--gen_kwargs", "do_sample=true,temperature=1.0")}
BUDGETS = (1, 3, 7, 15, 31)
STEPS = 2000
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
        name: of its folder under `results`.
        method: in the leaderboard.
        folder: of the checkpoint in the demo's output folder.
        budget: evaluations per token; a plain model spends 1.
        solver, final_time: of the trajectory; `None` for plain models.
    """

    name: str
    method: str
    folder: str
    budget: int = 1
    solver: str | None = None
    final_time: float | None = None

    def model(self, out: Path) -> list[str]:
        """Arguments of `lm_eval` that choose the model."""
        if self.solver is None:
            return ["--model", "hf", "--model_args", f"pretrained={out / self.folder}"]
        sampler = f"solver={self.solver},diffusion_budget={self.budget},final_time={self.final_time}"
        return ["--model", "l2d", "--model_args", f"pretrained={out / self.folder},{sampler}"]


SETTINGS = (
    Setting("base", "base", "base"),
    *(Setting(f"l2d-{budget}", "l2d", "l2d", budget, "midpoint", 1.0) for budget in BUDGETS),
    Setting("control", "control", "l2d", 2, "euler", 0.02),
    Setting("lora_sft", "lora_sft", "lora_sft"),
    Setting("full_sft", "full_sft", "full_sft"),
)


def recipes(out: Path) -> dict[str, dict[str, Any]]:
    """The recipes of the three trainings: the same data, batches and number of steps."""
    common = {
        "base": str(out / "base"),
        "dataset": str(out / "data" / "products_train.jsonl"),
        "max_steps": STEPS,
        **TRAINING,
    }
    path = {
        "learning_rate": 6.0e-3,
        "variant": "full",
        "diffusion_dim": 64,
        "noise_std": 0.75,
        "time_power": 4.0,
        "input_width": 64,
        "conditioning_width": 64,
        "frequency_width": 64,
        "draws": 4,
        "sampler": {"budget": 15},
    }
    own: dict[str, dict[str, Any]] = {
        "l2d": path,
        "lora_sft": {"learning_rate": 3.0e-3},
        "full_sft": {"learning_rate": 3.0e-3},
    }
    return {method: {"method": method, **common, "output_dir": str(out / method), **own[method]} for method in own}


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
    for method in recipes(out):
        command = (*python, "training.train", "--config", str(out / "configs" / f"{method}.yaml"))
        steps.append(Step(f"train {method}", command, out / method, needs=("base",)))
    return steps + [_evaluation(out, setting, decoding) for setting in SETTINGS for decoding in DECODINGS]


def result_folder(out: Path, setting: Setting, decoding: str) -> Path:
    """Where `lm_eval` writes the results of one evaluation."""
    return out / "results" / f"{setting.name}-{decoding}"


def _evaluation(out: Path, setting: Setting, decoding: str) -> Step:
    folder = result_folder(out, setting, decoding)
    command = (
        str(Path(sys.executable).with_name("lm_eval")),
        *setting.model(out),
        *("--tasks", ",".join(TASKS)),
        *("--include_path", str(ROOT / "lm_eval_ext" / "tasks" / "demo")),
        *DECODINGS[decoding],
        *("--batch_size", "256", "--device", "cpu"),
        *("--output_path", str(folder), "--log_samples"),
    )
    trained = "base" if setting.folder == "base" else f"train {setting.folder}"
    return Step(f"evaluate {setting.name} {decoding}", command, folder, needs=(trained,))


def _base_result(base: Path) -> str:
    reached = json.loads((base / "pretraining.json").read_text(encoding="utf-8"))
    return f"{reached['steps']} steps, products {reached['products']:.3f}, sums {reached['sums']:.3f} (validation)"
