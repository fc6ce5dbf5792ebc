"""The model card of a trained diffusion path.

- `model_card`: README.md text from the recipe, the metrics and the versions that are in the output folder
"""

import importlib.metadata
import json
import os
from typing import Any

import yaml

from l2d.config import L2DConfig

_VERSIONS = ("l2d", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
_HIDDEN = ("output_dir", "hub_model_id", "resume_from_checkpoint", "overwrite_output_dir")


def model_card(folder: str, name: str, config: L2DConfig, trained: int) -> str:
    """Text of README.md: what the checkpoint is, how to use it, and how it came about.

    Args:
        folder: where `recipe.yaml` and `all_results.json` are, as far as the run has come.
        trained: number of trained parameters.
    """
    recipe: dict[str, Any] = _read(os.path.join(folder, "recipe.yaml"))
    results: dict[str, Any] = _read(os.path.join(folder, "all_results.json"))
    base, revision = config.base_name_or_path, config.base_revision
    sampler, budget = ("", "") if config.noise_free else (', sampler={"budget": 15}', ",diffusion_budget=15")
    parts = [
        _header(base, recipe.get("dataset")),
        f"# {name}",
        f"The trained diffusion path (variant {config.variant}, {trained:,} parameters) of an L2D model on the base "
        f"`{base}`{f' at revision `{revision}`' if revision else ''}, which is loaded from there and checked against "
        f"the fingerprint `{config.base_fingerprint}`.",
        "## Use",
        f'    from l2d import L2DForCausalLM\n    model = L2DForCausalLM.from_pretrained("{name}")\n'
        f"    model.generate(input_ids{sampler})  # budget 1 is the base itself",
        f"    lm_eval --model l2d --model_args pretrained={name}{budget} --tasks gsm8k",
    ]
    if options := _options(config, recipe):
        parts.append(options)
    if config.guidance_classes:
        parts.append(f"Guidance classes: {', '.join(config.guidance_classes)}.")
    parts += ["## Recipe", _block({key: value for key, value in recipe.items() if key not in _HIDDEN})]
    if results:
        rows = [f"| {key} | {value:.6g} |" for key, value in sorted(results.items()) if isinstance(value, (int, float))]
        parts += ["## Metrics", "\n".join(["| metric | value |", "| --- | --- |", *rows])]
    versions = [f"{package} {version}" for package in _VERSIONS if (version := _version(package))]
    parts += ["## Versions", ", ".join(versions) + "."]
    return "\n\n".join(parts) + "\n"


def _options(config: L2DConfig, recipe: dict[str, Any]) -> str:
    """In sentences, the training options beyond the paper; empty where none was used."""
    if config.noise_free:
        return (
            "A control: the path was trained without noise and is evaluated once (`diffusion_budget=2,solver=euler`, "
            "its default)."
        )
    sentences = []
    if rate := recipe.get("corruption_rate"):
        sentences.append(f"Trained on noised targets of which a share of {rate:g} was built from wrong tokens.")
    if evaluations := recipe.get("rollout_evaluations"):
        sentences.append(f"Trained on the path's own trajectories of {evaluations} evaluations.")
    if config.carried_state:
        sentences.append("The path carries a state from one evaluation to the next, so evaluations go in sequence.")
    return " ".join(sentences)


def _header(base: str | None, dataset: str | None) -> str:
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["l2d"]}
    if base and not os.path.isabs(base):
        content["base_model"] = base
    if dataset and not os.path.exists(dataset):
        content["datasets"] = [dataset]
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _block(content: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(content, sort_keys=False)}```"


def _read(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file) if path.endswith(".json") else yaml.safe_load(file)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
