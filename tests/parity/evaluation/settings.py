"""Compares lengths, sampling, shots, the sampler and the settings by model with a fixture's.

What the tasks, sweeps and recipes hold is put into the release's words (`task_settings`, `model_settings`). Keys that
only describe or that a library decides are listed as skipped.
"""

import functools
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks._yaml_loader import load_yaml

from l2d.config import L2DConfig
from l2d.sampler_config import SamplerConfig, levels_for_budget
from l2d.sampling.fixed_grid import fixed_grid
from lm_eval_ext.released.benchmarks import BENCHMARKS, KS, MAX_TOKENS, mmlu_class
from lm_eval_ext.released.options import sampler_defaults
from lm_eval_ext.released.programs import SECONDS
from tests.conftest import REPOSITORY
from tests.parity.report import Recorder
from training.recipe import read_recipe

TASKS = REPOSITORY / "lm_eval_ext" / "tasks" / "released"
SWEEPS = REPOSITORY / "lm_eval_ext" / "sweeps"
TEXT = ("gsm8k", "mmlu", "mmlu_pro")
CODE = ("humaneval", "mbpp")
WITHDRAWN = {"DigitalLearningGmbH/MATH-lighteval": "lighteval/MATH"}
"""Data sets that are read under another name than the release's."""
DESCRIPTIONS = (
    *("released_revision", "rows_note", "shots_note", "filepaths_note", "note", "shots_layout"),
    *("shots_made_up", "guidance_ids", "entry_point"),
    *("use_fast_tokenizer", "attn_implementation", "nstep_clamp_predictions"),
)
WORDS = {"stop": ["eos token only", "no stop strings"], "decode": ["special tokens stay", "no clean-up of spaces"]}
"""What two settings say in words."""
TIME = 1e-6
"""Tolerance of times and temperatures, which the fixture gives with six digits."""


def task_settings(name: str) -> dict[str, Any]:
    """Settings of the task `l2d_released_NAME`, and of the sampler and the sweeps that it is run with."""
    benchmark = BENCHMARKS[name]
    task = load_yaml(TASKS / f"l2d_released_{name}.yaml", resolve_func=False)
    dataset = WITHDRAWN.get(task["dataset_path"], task["dataset_path"])
    config = [task["dataset_name"]] if "dataset_name" in task else []
    settings = {
        "dataset": ", ".join([dataset, *config]),
        "test_split": task["test_split"],
        "shots_from": benchmark.shots_from,
        "num_few_shots": task["num_fewshot"],
        "system_prompt": None,
        **_sampling(f"l2d_released_{name}", task),
    }
    if benchmark.code:
        settings |= {"time_limit_s": SECONDS, "k": list(KS)}
    return settings


def _sampling(name: str, task: dict[str, Any]) -> dict[str, Any]:
    kwargs, sampler = task["generation_kwargs"], SamplerConfig()
    released = {
        "generation_max_len": "max_gen_toks",
        "generation_do_sample": "do_sample",
        "generation_temperature": "temperature",
        "generation_top_p": "top_p",
        "generation_top_k": "top_k",
        "generation_repetition_penalty": "repetition_penalty",
    }
    runs = [plan["run"] for plan in sweeps().values()]
    return {
        **{theirs: kwargs[ours] for theirs, ours in released.items()},
        "generation_num_return_sequences": task["repeats"],
        "stop": not kwargs["until"],
        "decode": not kwargs["skip_special_tokens"],
        "max_seq_len": MAX_TOKENS,
        "seed": _same(run["seed"] for run in runs),
        "micro_batch_size": _same(run["batch_size"] for run in runs),
        "compute_nstep_loss": levels_for_budget(sampler.solver, sampler.budget),
        "ode_solver": sampler.solver,
        "nstep_final_timestep": sampler.final_time,
        "nstep_x1_estimation": sampler.choice,
        "nstep_normalize_x1_predictions": sampler.normalize_average,
        "nstep_temperature_schedule": sampler_defaults(name).get("choice_temperature", sampler.choice_temperature),
        "nstep_guidance_parameter": sampler.guidance_scale,
        "use_data_split_guidance": sampler.guided,
    }


def check_settings(record: Recorder, name: str, settings: dict[str, Any]) -> None:
    """Compare the settings of one benchmark's fixture."""
    ours, benchmark = task_settings(name), BENCHMARKS[name]
    for key, value in settings.items():
        if key in DESCRIPTIONS:
            record.skip("settings", key, "a description")
        elif key in ("stop", "decode"):
            record.equal("settings", key, ours[key], all(words in value for words in WORDS[key]))
        elif key == "filepaths":
            paths = [path.split(",")[0] for path in value]
            withdrawn = ours["dataset"] in WITHDRAWN.values()
            record.equal("settings", key, withdrawn or ours["dataset"].split(",")[0] in paths, True)
        elif key in ("dataset", "test_split"):
            record.equal("settings", key, ours[key], value.partition(" (")[0])
        elif key == "shots_rows":
            record.equal("settings", key, _shot_rows(name, value), None if isinstance(value, str) else value)
        elif key == "category":
            record.equal("settings", key, benchmark.guidance({}), value)
        elif key.startswith("category_by_"):
            classes = {subject: _class_of(name, subject) for subject in value}
            record.equal("settings", key, classes, value)
        elif key in ours:
            record.equal("settings", key, ours[key], value)
        else:
            record.fail("settings", key, "nothing here to compare it with")


def _shot_rows(name: str, released: Any) -> list[int] | None:
    rows = 7500 if name == "math" else 1 + max(released) if isinstance(released, list) else 5
    return BENCHMARKS[name].shot_rows(rows)


def _class_of(name: str, subject: str) -> str | None:
    return mmlu_class(subject) if name == "mmlu" else BENCHMARKS[name].guidance({BENCHMARKS[name].subject: subject})


# ---- by model --------------------------------------------------------------------------------------------------------


def sweeps() -> dict[str, dict[str, Any]]:
    """The sweep files of the released bases, by name."""
    return {file.stem: yaml.safe_load(file.read_text()) for file in sorted(SWEEPS.glob("released-*.yaml"))}


def model_settings(base: str, variant: str, code: bool) -> dict[str, Any] | None:
    """Settings of the sweep that evaluates the released L2D model of a base and a variant; `None` if there is none."""
    for plan in sweeps().values():
        for point in plan["points"].values():
            folder = Path(point.get("pretrained", plan["model_args"]["pretrained"]))
            recipe = _recipe(folder.name)
            if (recipe["base"], recipe.get("method"), recipe.get("variant")) != (base, "l2d", variant):
                continue
            names = CODE if code else TEXT
            (sampling,) = {str(settings := _of_group(name)): settings for name in names}.values()
            return {
                **sampling,
                "pretrained_model_dir": recipe["base"],
                "tokenizer_dir": recipe.get("tokenizer") or recipe["base"],
                "specified_template_type": plan["run"].get("metadata", {}).get("released_template"),
                "lad": True,
                "filepaths": [_path(name) for name in names],
                "guidance_categories": None,
                "noise_rescaling": L2DConfig().noise_std,
                "bf16": recipe["bf16"],
            }
    return None


@functools.cache
def _recipe(name: str) -> dict[str, Any]:
    return read_recipe(["--config", str(REPOSITORY / "training" / "recipes" / f"{name}.yaml")]).settings


def _of_group(name: str) -> dict[str, Any]:
    settings = task_settings(name)
    own = ("stop", "decode", "dataset", "test_split", "shots_from", "system_prompt", "time_limit_s", "k")
    return {key: value for key, value in settings.items() if key not in own}


def _path(name: str) -> str:
    benchmark = BENCHMARKS[name]
    return ",".join([benchmark.path, *([benchmark.config] if benchmark.config else []), "test"])


def check_models(record: Recorder, by_model: dict[str, Any]) -> None:
    """Compare the settings by model file. A file that the released parser refuses has none."""
    for file, scripts in by_model.items():
        for script, settings in scripts.items():
            if "error" in settings:
                record.skip("model", f"{file}, {script}", settings["error"])
                continue
            variant = "lora" if file.endswith("_lora.cfg") else "full"
            with record.attempt("model", f"{file}, {script}"):
                ours = model_settings(settings["pretrained_model_dir"], variant, script == "benchmark_code")
                if ours is None:
                    record.fail("model", f"{file}, {script}", "no sweep here evaluates this model")
                    continue
                for key, value in settings.items():
                    if key in DESCRIPTIONS:
                        record.skip("model", f"{file}, {script}, {key}", "a library's choice")
                    elif key in ours:
                        record.equal("model", f"{file}, {script}, {key}", ours[key], value)
                    else:
                        record.fail("model", f"{file}, {script}, {key}", "nothing here to compare it with")


# ---- sampler ---------------------------------------------------------------------------------------------------------


def check_sampler(record: Recorder, sampler: dict[str, Any]) -> None:
    """Compare time points, times of evaluations and token temperatures, and count the evaluations."""
    if not sampler:
        return
    for label, temperatures in sampler["token_temperature"].items():
        schedule = label.partition(" (")[0]
        grid = fixed_grid(SamplerConfig(choice_temperature=schedule if "_" in schedule else float(schedule)))
        _near(record, f"temperatures, {label}", list(grid.temperatures), temperatures)
        _near(record, "time points", grid.levels.tolist(), sampler["time_points"])
        _near(record, "velocity times", grid.times[:-1].tolist(), sampler["velocity_times"])
        _near(record, "shift", [float(grid.levels[1] - grid.levels[0]) / 2], [sampler["temperature_time_shift"]])
        calls = {"velocity": grid.evaluations, "final logits at time 1": grid.budget - grid.evaluations}
        record.equal("sampler", "calls", calls, sampler["model_calls_per_token"])
    record.equal("sampler", "time in float64", f"torch.{str(grid.times.dtype).removeprefix('torch.')}",
                 sampler["dtype_of_time"])  # fmt: skip


def _near(record: Recorder, name: str, ours: list[float], released: list[float]) -> None:
    record.equal("sampler", f"{name}, count", len(ours), len(released))
    deviation = max(abs(one - other) for one, other in zip(ours, released, strict=False))
    record.measured("sampler", name, deviation, TIME)


def _same(values: Any) -> Any:
    (value,) = set(values)
    return value
