"""What a run is: which method, which base it belongs to, and how it decoded.

- `describe`: a run's `Setting`; `by_sampler`: a run in parts that have one each
- `decoding_of`: how a task's answers were decoded
- `Setting`: label, kind, base, sampler, decoding, trainable parameters, cost
- `recipe_of`: the recipe of a checkpoint's folder
- `KINDS`: the kinds of rows with their names, controls included

Checkpoint folders are looked at where they still exist: a `recipe.yaml` tells finetuned models from plain ones, and the
headers of `*.safetensors` give the number of trained parameters. Everything else comes from the results file.
"""

import dataclasses
import json
from collections.abc import Iterable
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from l2d.sampler_config import ADAPTIVE_SOLVERS, SamplerConfig, unusual
from l2d.settings import declared
from lm_eval_ext.arguments import SAMPLER_ARGUMENTS, SEARCH, sampler_changes
from lm_eval_ext.leaderboard.files import Run
from lm_eval_ext.leaderboard.schema import number

KINDS = {
    "base": "base",
    "l2d-base": "L2D at T = 1",
    "l2d-lora": "L2D (lora)",
    "l2d-full": "L2D (full)",
    "one-evaluation": "control: one evaluation",
    "noise-free": "control: noise-free path",
    "lora-ft": "LoRA finetuning",
    "full-ft": "full finetuning",
    "other": "other model",
}
CONTROL_NAMES = {"one-evaluation": "one evaluation", "noise-free": "noise-free path", "lora-ft": "LoRA finetuning"}
CONTROLS = tuple(CONTROL_NAMES)
EXACT_SETTINGS = tuple(name for name, one in declared(SamplerConfig).items() if not one.changes_answers)
"""Sampler settings that change the cost and never the result."""
QUANTITIES = ("nfe_requested", "nfe_computed", "passes")
_TOTALS = (
    *("generated_tokens", "scored_tokens", "solved_tokens", "capped_tokens", "seconds", "tokens_per_second"),
    *(f"{name}_per_token" for name in QUANTITIES),
)
_OTHER_KWARGS = (
    *("until", "do_sample", "temperature"),
    *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_length"),
)
_FILTERS = ("top_p", "top_k", "min_p", "typical_p")  # they change nothing in greedy decoding
_NEUTRAL = {"top_p": 1, "top_k": 0, "min_p": 0, "typical_p": 1, "num_beams": 1, "repetition_penalty": 1}
_RECIPE_METHODS = {"lora_sft": "lora-ft", "full_sft": "full-ft"}
_TRAINED = {  # option -> what it is called, and the value that changes nothing
    "corruption_rate": ("corrupted {}", 0),
    "easy_target_rate": ("easy targets at {}", 1),
    "rollout_evaluations": ("rollout {}", 0),
    "own_values_rank": ("own values {}", 0),
    "own_keys_rank": ("own keys {}", 0),
}
_RETIRED = {"votes": 1}  # defaults of settings that only older versions recorded


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and how it answered.

    kind: a key of `KINDS`; model: folder or hub name, NAME@REVISION where one was given; base: the base's, or `None`
    where it is not known.
    budget, solver, guidance, final_time, seed: of the sampler; budget 1 and `None` for plain models.
    decoding: "greedy", "sampled at TEMPERATURE" (with what else the generation kwargs ask for), "scored" or several of
    them; details: how the path was trained, and sampler settings that are not the default.
    cost: by quantity ("nfe_requested", "nfe_computed", "passes"), the recorded statistics per token.
    tokens: generated and scored ones, `None` where nobody counted.
    """

    kind: str
    model: str
    base: str | None
    budget: int | None
    solver: str | None
    guidance: str | None
    final_time: float | None
    seed: int | None
    decoding: str
    details: str
    trained: int | None
    parameters: int | None
    cost: dict[str, dict[str, Any]]
    tokens: int | None
    seconds: float | None
    fingerprint: str | None
    base_fingerprint: str | None
    world_size: int | None

    @property
    def name(self) -> str:
        """The model's own name, without its folder."""
        return Path(self.model).name or self.model

    @property
    def label(self) -> str:
        """Method and what sets it apart, in one line."""
        parts = [KINDS[self.kind]]
        if self.kind == "one-evaluation":
            parts.append(f"t = {1 if self.final_time is None else self.final_time:g}")
        elif self.kind in ("l2d-lora", "l2d-full"):
            parts.append(f"T = {self.budget}" if self.budget else f"{self.solver}, adaptive")
        if self.guidance:
            parts.append(f"guidance {self.guidance}")
        if self.details:
            parts.append(self.details)
        return ", ".join(parts)

    @property
    def tokens_per_second(self) -> float | None:
        """Generated or scored tokens per second of the whole call."""
        return self.tokens / self.seconds if self.seconds and self.tokens else None

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds of the whole call per generated or scored token."""
        return self.seconds / self.tokens if self.seconds and self.tokens else None


def by_sampler(run: Run) -> list[Run]:
    """`run` in parts of one sampler each: generation kwargs may have changed it, for all of its tasks or for some."""
    parts: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for task in run.measures:
        used = _used_sampler(run, task)
        parts.setdefault(json.dumps(used, sort_keys=True, default=str), (used, []))[1].append(task)
    runs = []
    for used, tasks in parts.values():
        ours = {**run.l2d, **used}
        if len(parts) > 1:  # totals are of all parts together
            ours = {name: value for name, value in ours.items() if name not in _TOTALS}
        raw = {**run.raw, "config": {**run.config, "l2d": ours}} if used else run.raw
        runs.append(dataclasses.replace(run, raw=raw, measures={task: run.measures[task] for task in tasks}))
    return runs


def _used_sampler(run: Run, task: str) -> dict[str, Any]:
    """`sampler` and `token_search` with which `task` was run; empty for models of others."""
    sampler = run.l2d.get("sampler")
    if sampler is None:
        return {}
    used = {"sampler": sampler, SEARCH: run.l2d.get(SEARCH)}
    recorded = run.l2d.get("task_samplers") or {}
    noted: list[dict[str, Any]] = next((recorded[leaf] for leaf in run.leaves[task] if leaf in recorded), [])
    if len(noted) == 1:
        changed = {name: value for name, value in noted[0].items() if name != SEARCH}
        return {"sampler": {**sampler, **changed}, SEARCH: noted[0].get(SEARCH, used[SEARCH])}
    # not recorded: in files of older versions, and where all answers came from the harness's cache
    kwargs = next(iter(_generation_kwargs(run, task)), {})
    changes = sampler_changes(kwargs)
    if changes:
        known = {field.name for field in dataclasses.fields(SamplerConfig)}
        try:
            whole = SamplerConfig().replace(**{n: v for n, v in {**sampler, **changes}.items() if n in known})
        except (TypeError, ValueError):  # not what the model class writes
            return used
        used["sampler"] = {**sampler, **{name: getattr(whole, name) for name in changes}}
    return {**used, SEARCH: kwargs.get(SEARCH, used[SEARCH])}


def describe(run: Run) -> Setting:
    """The setting of `run`; unknown parts are `None`."""
    ours, arguments = run.l2d, run.model_args
    model = str(arguments.get("pretrained") or run.raw.get("model_name") or run.config.get("model") or "?")
    recipe = recipe_of(model)
    sampler = ours.get("sampler") or {}
    adaptive = sampler.get("solver") in ADAPTIVE_SOLVERS and sampler.get("budget") != 1
    kind, base = _kind(run, model, sampler, recipe)
    tokens = (number(ours.get("generated_tokens")) or 0) + (number(ours.get("scored_tokens")) or 0)
    cost = {name: ours.get(f"{name}_per_token") for name in QUANTITIES}
    scale = number(sampler.get("guidance_scale"))
    revision = "@" + ours["revision"].replace("/", "_") if ours.get("revision") else ""  # only folders have slashes
    guidance = sampler.get("guidance_class")
    if guidance is not None or scale not in (None, 1.0):
        guidance = f"{guidance or 'no class'} × {scale if scale is not None else 1:g}"
    return Setting(
        kind=kind,
        model=str(arguments.get("peft") or model) + revision,
        base=base,
        budget=None if adaptive else sampler.get("budget") if ours else 1 if kind != "other" else None,
        solver=sampler.get("solver") if sampler.get("budget") != 1 else None,
        guidance=guidance,
        final_time=number(sampler.get("final_time")),
        seed=sampler.get("seed"),
        decoding=decoding_of(run, run.measures),
        details=_details(ours, sampler, kind, adaptive, recipe),
        trained=_trained(run, model, kind),
        parameters=_whole(run.config.get("model_num_parameters")),
        cost={name: value for name, value in cost.items() if value},
        tokens=int(tokens) or None,
        seconds=run.seconds,
        fingerprint=ours.get("checkpoint_fingerprint"),
        base_fingerprint=ours.get("base_fingerprint"),
        world_size=_whole(ours.get("world_size")),
    )


def _kind(run: Run, model: str, sampler: dict[str, Any], recipe: dict[str, Any]) -> tuple[str, str | None]:
    ours = run.l2d
    if ours:
        base = str(ours["base"]) if ours.get("base") else None
        if sampler.get("budget") == 1:
            return "l2d-base", base
        if ours.get("noise_free") or recipe.get("noise_free") is True:
            return "noise-free", base
        if sampler.get("budget") == 2 and (
            sampler.get("solver") == "euler" or (number(sampler.get("final_time")) or 1) < 1
        ):
            return "one-evaluation", base
        return ("l2d-full" if ours.get("variant") == "full" else "l2d-lora"), base
    if run.model_args.get("peft"):
        return "lora-ft", model
    if str(recipe.get("method")) in _RECIPE_METHODS:
        return _RECIPE_METHODS[recipe["method"]], str(recipe["base"]) if recipe.get("base") else None
    return "other", None


def _details(ours: dict[str, Any], sampler: dict[str, Any], kind: str, adaptive: bool, recipe: dict[str, Any]) -> str:
    """How the path was trained, where a recipe tells, and what of its sampler is not the default."""
    if kind in ("base", "l2d-base", "other") or not ours:
        return ""
    parts = [text.format(recipe[name]) for name, (text, off) in _TRAINED.items() if recipe.get(name) not in (None, off)]
    parts += ["warm start"] if ours.get("warm_start") or recipe.get("warm_start") is True else []
    parts += ["carried state"] if ours.get("carried_state") or recipe.get("carried_state") is True else []
    in_label = ("solver", "final_time") if kind in ("one-evaluation", "noise-free") else ("solver",) if adaptive else ()
    parts += unusual(sampler, in_label)
    known = declared(SamplerConfig)
    parts += [f"{name} {value}" for name, value in sampler.items() if name not in known and _RETIRED.get(name) != value]
    return ", ".join([*parts, *([str(ours[SEARCH])] if ours.get(SEARCH) not in (None, "none") else [])])


def decoding_of(run: Run, tasks: Iterable[str]) -> str:
    """How `tasks` were decoded: "greedy", "sampled at TEMPERATURE", "scored", or several of them; "?" if unknown."""
    decodings = set()
    for task in tasks:
        if any(config.get("output_type") != "generate_until" for config in _task_configs(run, task)):
            decodings.add("scored")
        decodings |= {_decoding(kwargs) for kwargs in _generation_kwargs(run, task)}
    return " + ".join(sorted(decodings)) or "?"


def _decoding(kwargs: dict[str, Any]) -> str:
    """Of one set of generation kwargs, by the harness's rule: a temperature alone means sampling."""
    temperature, drawn = number(kwargs.get("temperature")), kwargs.get("do_sample")
    if drawn is None:
        drawn = (temperature or 0.0) > 0
    sampled = drawn in (True, "true", "True") and temperature != 0
    words = [f"sampled at {1.0 if temperature is None else temperature:g}" if sampled else "greedy"]
    for name, value in sorted(kwargs.items()):
        shown_elsewhere = name in _OTHER_KWARGS or name in SAMPLER_ARGUMENTS or name == SEARCH
        if not (shown_elsewhere or value is None or value == _NEUTRAL.get(name) or (name in _FILTERS and not sampled)):
            words.append(f"{name} {value}")
    return ", ".join(words)


def _task_configs(run: Run, task: str) -> list[dict[str, Any]]:
    return [run.raw["configs"][leaf] for leaf in run.leaves[task] if leaf in run.raw["configs"]]


def _generation_kwargs(run: Run, task: str) -> list[dict[str, Any]]:
    """Generation kwargs of `task`, or of the tasks of a group, with those of the command line; none where it scores."""
    overrides = run.config.get("gen_kwargs")
    overrides = overrides if isinstance(overrides, dict) else {}
    configs = [config for config in _task_configs(run, task) if config.get("output_type") == "generate_until"]
    return [{**(config.get("generation_kwargs") or {}), **overrides} for config in configs]


def _whole(value: Any) -> int | None:
    whole = number(value)
    return None if whole is None or whole < 0 else int(whole)


# ---- checkpoint folders ------------------------------------------------------------------------------------------


def _trained(run: Run, model: str, kind: str) -> int | None:
    recorded = _whole(run.l2d.get("trained_parameters"))
    if recorded is not None or kind in ("base", "other"):
        return recorded
    if kind == "full-ft":
        return _whole(run.config.get("model_num_parameters"))
    adapter = Path(str(run.model_args.get("peft") or Path(model) / "adapter"))
    return count_parameters(adapter if kind == "lora-ft" else Path(model))


@lru_cache(maxsize=1024)
def count_parameters(folder: Path) -> int | None:
    """Numbers in the `*.safetensors` of `folder`, from their headers; `None` where there are none."""
    total = 0
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as tensors:
                total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    except (OSError, SafetensorError):
        return None
    return total or None


@lru_cache(maxsize=1024)
def recipe_of(model: str) -> dict[str, Any]:
    """The `recipe.yaml` in the checkpoint's folder; empty where there is none."""
    try:
        recipe = yaml.safe_load((Path(model) / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}
