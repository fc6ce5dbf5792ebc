"""What the study of a real model runs: methods, recipes, and the steps as commands that a user could type.

* `METHODS`: every method with its options, the most telling ones first
* `Settings`: what was asked for
* `recipes`: one YAML file per method
* `build_steps`: trainings (`python -m training.train`), which continue from their last checkpoint, and evaluations
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.demo.runner import Step
from training.demo.workspace import Layout
from training.studies.real.data import LONGEST

LAYOUT = Layout(
    "study of a real model",
    ("real.md", "real.png", "results.json", "data", "runs", "scores", "tasks", "configs", "logs", "cache", "real.json"),
)
BATCH, AT_ONCE = 16, 4  # examples of a step, and of a microbatch
CHECKPOINTS = 8  # of a training: what a killed one continues from
EQUAL_TIME, EQUAL_TIME_BUDGET = "-equal-time", 15
PROCESSOR_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_TRAINING = {
    "per_device_train_batch_size": AT_ONCE,
    "gradient_accumulation_steps": BATCH // AT_ONCE,
    "lr_scheduler_type": "constant_with_warmup",  # so that a checkpoint on the way is a shorter training
    "activation_checkpointing": False,
    "max_length": LONGEST,
    "logging_steps": 1,
    "save_strategy": "steps",
    "resume_from_checkpoint": "auto",
    "report_to": "none",
}


@dataclass(frozen=True)
class Method:
    """A way to train, `name` in folders and results.

    Attributes:
        title: in tables and figures.
        options: of the recipe.
        gates, early_gates: of `skip_confidence` and `early_confidence`, at which it is measured, too.
    """

    name: str
    title: str
    options: dict[str, Any]
    gates: tuple[float, ...] = ()
    early_gates: tuple[float, ...] = ()


_PATH = {"method": "l2d", "variant": "lora", "lora_rank": 32, "learning_rate": 1e-3}
_WARM = {**_PATH, "warm_start": True}
_OWN = {"own_keys_rank": 32, "own_values_rank": 32}
_LORA = {"method": "lora_sft", "lora_rank": 32, "learning_rate": 1e-3}

METHODS = {
    method.name: method
    for method in (
        Method("warm", "L2D, warm start", _WARM, gates=(0.5, 0.7, 0.9), early_gates=(0.5, 0.8)),
        Method("lora_all", "LoRA finetuning, all linear layers", _LORA),
        Method("warm_noise_free", "control: noise-free path, warm start", {**_WARM, "noise_free": True}),
        Method("plain", "L2D as published", _PATH),
        Method("warm_corrupted", "L2D, warm start, corrupted, q = 0.3", {**_WARM, "corruption_rate": 0.3}),
        Method("warm_own", "L2D, warm start, own keys and values", {**_WARM, **_OWN}),
        Method("lora_qv", "LoRA finetuning, q and v", {**_LORA, "lora_target_modules": ["q_proj", "v_proj"]}),
        Method("full", "full finetuning", {"method": "full_sft", "learning_rate": 1e-4}),
    )
}


@dataclass(frozen=True)
class Settings:
    """What was asked for; a folder continues with the same settings only.

    Attributes:
        base: folder of the base.
        data: folder or hub name of GSM8K.
        targets: supervised tokens of every training.
        held_out: rows of the training split for validation.
        bf16: whether trainings run in bfloat16.
    """

    base: str
    data: str
    targets: int
    held_out: int
    bf16: bool

    @property
    def dtype(self) -> str:
        """In which everything is evaluated."""
        return "bfloat16" if self.bf16 else "float32"

    def record(self) -> dict[str, Any]:
        """Plain values, with the options of every method."""
        return {**vars(self), "methods": {name: method.options for name, method in METHODS.items()}}


def has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    flags = {
        flag
        for line in text.splitlines()
        if line.lower().startswith(("flags", "features"))
        for flag in line.split(":")[-1].split()
    }
    return not flags.isdisjoint(PROCESSOR_FLAGS)


def steps_for(targets: int, per_example: float) -> int:
    """Training steps that see `targets` supervised tokens, at least."""
    return math.ceil(targets / (per_example * BATCH))


def recipes(out: Path, settings: Settings, steps: int) -> dict[str, dict[str, Any]]:
    """The recipe of every method."""
    common = {
        "base": settings.base,
        "dataset": str(out / "data" / "train.jsonl"),
        "max_steps": steps,
        "warmup_steps": steps // 10,
        "save_steps": math.ceil(steps / CHECKPOINTS),
        "bf16": settings.bf16,
        **_TRAINING,
    }
    return {
        name: {**common, **method.options, "output_dir": str(run_folder(out, name))} for name, method in METHODS.items()
    }


def run_folder(out: Path, method: str) -> Path:
    """Where the training of a method is."""
    return out / "runs" / method


def model_folder(out: Path, settings: Settings, name: str) -> Path:
    """Where the model of a method is, or the `base`."""
    return Path(settings.base) if name == "base" else run_folder(out, name)


def losses_file(out: Path, method: str) -> Path:
    """Training loss of every step."""
    return out / "runs" / f"{method}-losses.json"


def timing_file(out: Path) -> Path:
    """Processor time of a training step of every method."""
    return out / "runs" / "seconds.json"


def score_file(out: Path, name: str, problems: int) -> Path:
    """What was measured of a method, of `base`, or of a method at equal time, on so many test problems."""
    return out / "scores" / f"gsm8k-{problems}" / f"{name}.json"


def at_equal_time(method: str) -> str:
    """What folders and results call a method at equal processor time."""
    return method + EQUAL_TIME


def build_steps(out: Path, settings: Settings, problems: int, methods: list[str]) -> list[Step]:
    """All steps of some methods, the most telling first.

    Args:
        problems: of the test split that are scored, the first ones.
    """
    steps = [_evaluation(out, settings, problems, "base")]
    for name in methods:
        train = f"train {name}"
        steps.append(_training(out, name))
        steps.append(_evaluation(out, settings, problems, name, train))
        steps.append(_step(f"tidy {name}", losses_file(out, name), "real.tidy", run_folder(out, name), train))
    configs = [f"{name}={out / 'configs' / name}.yaml" for name in METHODS]
    few = ("--turns", 2, "--warm-up", 1, "--steps", 2, "--alone")
    timing = _python("training.demo.timing", timing_file(out), *configs, *few)
    steps.append(Step("time", timing, timing_file(out)))
    return steps + [_equal_time(out, settings, problems, name) for name in methods]


def _python(*arguments: Any) -> tuple[str, ...]:
    return (sys.executable, "-m", *map(str, arguments))


def _step(name: str, output: Path, module: str, *arguments: Any) -> Step:
    *words, needs = arguments
    return Step(name, _python(f"training.studies.{module}", *words, output), output, (needs,))


def _training(out: Path, name: str) -> Step:
    last = run_folder(out, name) / "recipe.yaml"  # not the folder, whose checkpoints a killed training needs
    return Step(f"train {name}", _python("training.train", "--config", out / "configs" / f"{name}.yaml"), last)


def _problems(out: Path, problems: int) -> tuple[Any, ...]:
    """Options of an evaluation: the test problems, and those that choose the time of one evaluation."""
    data = out / "data"
    return ("--rows", data / "test.jsonl", "--limit", problems, "--choosing", data / "validation.jsonl")


def evaluation_command(settings: Settings, folder: Path, file: Path, *options: Any) -> tuple[str, ...]:
    """Scores the model in `folder`."""
    common = ("--base", settings.base, "--dtype", settings.dtype)
    return _python("training.studies.real.evaluate", folder, file, *common, *options)


def _evaluation(out: Path, settings: Settings, problems: int, name: str, *needs: str) -> Step:
    file = score_file(out, name, problems)
    method = METHODS.get(name)
    lists = {"--gates": method.gates, "--early-gates": method.early_gates} if method else {}
    gated = [word for option, gates in lists.items() if gates for word in (option, ",".join(map(str, gates)))]
    command = evaluation_command(settings, model_folder(out, settings, name), file, *_problems(out, problems), *gated)
    return Step(f"evaluate {name} on {problems}", command, file, needs, result=lambda: summary(file))


def _equal_time(out: Path, settings: Settings, problems: int, method: str) -> Step:
    name = at_equal_time(method)
    file = score_file(out, name, problems)
    common = ("--base", settings.base, "--dtype", settings.dtype, "--budgets", EQUAL_TIME_BUDGET)
    subject = (timing_file(out), method, run_folder(out, method), file)
    command = _python("training.studies.real.equal", *subject, *common, *_problems(out, problems))
    needs = ("time", f"train {method}")
    return Step(f"evaluate {name} on {problems}", command, file, needs, result=lambda: summary(file))


def summary(file: Path) -> str:
    """Token accuracy of every setting that was measured."""
    content = json.loads(file.read_text(encoding="utf-8"))
    targets = sum(content["targets"])
    shares = (f"{name} {sum(score['right']) / targets:.3f}" for name, score in content["scores"].items())
    return "token accuracy " + ", ".join(shares)
