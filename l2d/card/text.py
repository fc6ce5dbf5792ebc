"""The model card of a checkpoint.

- `write_card`: README.md, and the figure of the budget curve, into a checkpoint's folder
- `RESULTS`, `CURVE`: names of the files beside it, of what was measured and of the figure

The text is made of what lies in the folder: `config.json`, `recipe.yaml`, training metrics (`all_results.json`), and
what `python -m l2d card` has put into `budget_results.json`.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from l2d.card.curve import plot_budget_curve
from l2d.card.results import TRAINING_TASK, Measured, curves, read_results
from l2d.config import L2DConfig

RESULTS, CURVE = "budget_results.json", "budget_curve.png"
_VERSIONS = ("l2d", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
_HIDDEN = ("output_dir", "hub_model_id", "resume_from_checkpoint", "overwrite_output_dir")


def write_card(folder: str | os.PathLike, name: str | None = None) -> str:
    """Write README.md, and with accuracies at several budgets their figure, into `folder`; returns the text.

    `name` is the one under which the checkpoint is loaded, by default the folder.
    """
    folder = Path(folder)
    config = L2DConfig.from_pretrained(folder)
    measured = _measured(folder)
    if len({one.budget for one in measured}) > 1 and importlib.util.find_spec("matplotlib"):
        _draw(measured, folder / CURVE)
    recipe = _read(folder / "recipe.yaml")
    card = ModelCard.from_template(
        _header(config, recipe, measured, Path(name or folder).name),
        template_str=(Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8"),
        title=Path(name or folder).name,
        name=str(name or folder),
        config=config,
        trained=_trained(folder),
        budget="" if config.noise_free else config.default_sampler().budget,
        chat=_has_template(folder),
        options=_options(config, recipe),
        curve=CURVE if (folder / CURVE).is_file() else None,
        results=curves(measured),
        recipe=yaml.safe_dump({k: v for k, v in recipe.items() if k not in _HIDDEN}, sort_keys=False) if recipe else "",
        metrics={k: v for k, v in sorted(_read(folder / "all_results.json").items()) if isinstance(v, (int, float))},
        versions=", ".join(f"{package} {version}" for package in _VERSIONS if (version := _version(package))),
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")
    return str(card)


def _measured(folder: Path) -> list[Measured]:
    """What is known of the checkpoint: accuracies of its tasks, else those on the held-out examples of its training."""
    content = _read(folder / RESULTS) or []
    measured = [Measured(**one) for one in content]
    try:
        return measured or read_results(_read(folder / "all_results.json"))
    except ValueError:  # none at any budget
        return []


def _draw(measured: list[Measured], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    plot_budget_curve(measured, axes=figure.add_subplot())
    figure.savefig(path, dpi=130)


def _header(config: L2DConfig, recipe: dict[str, Any], measured: list[Measured], title: str) -> ModelCardData:
    base, dataset = config.base_name_or_path, recipe.get("dataset")
    named = bool(base) and not os.path.isabs(str(base)) and not os.path.isdir(str(base))
    sources = [entry["dataset"] for entry in dataset] if isinstance(dataset, list) else [dataset]
    hosted = [source for source in sources if source and not os.path.exists(source)]  # local files have no page
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(hosted[0] if hosted else "custom") if one.task == TRAINING_TASK else one.task,
            dataset_name=one.task,
            metric_type=one.metric.split(" (")[0].replace(" ", "_"),
            metric_name=", ".join(filter(None, (one.metric, f"T = {one.budget:g}", one.setting))),
            metric_value=round(one.value, 6),
            metric_args={"diffusion_budget": one.budget},
        )
        for one in measured
    ]
    fields: dict[str, Any] = _licence(base, config.base_revision)
    if named:
        fields |= {"base_model": base, "base_model_relation": "adapter"}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["l2d", "diffusion", "test-time-compute"],
        datasets=hosted or None,
        model_name=title,
        eval_results=results or None,
        **fields,
    )


def _licence(base: str | None, revision: str | None) -> dict[str, Any]:
    """The licence that the base's own card states, from its folder, the hub's cache or the hub; empty if unknown."""
    if not base:
        return {}
    try:
        file = Path(base) / "README.md"
        if not os.path.isdir(base):
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(base, "README.md", revision=revision))
        stated = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}
    return {name: stated[name] for name in ("license", "license_name", "license_link") if stated.get(name)}


def _options(config: L2DConfig, recipe: dict[str, Any]) -> str:
    """In sentences, the training options beyond the paper; empty where none was used."""
    sentences = []
    if config.noise_free:
        sentences.append(
            "A control: the path was trained without noise and is evaluated once (`diffusion_budget=2,solver=euler`, "
            "its default)."
        )
    if config.warm_start:
        sentences.append("The path was trained from a warm start, as the base itself, which is not as published.")
    for what, rank in (("keys", config.own_keys_rank), ("values", config.own_values_rank)):
        if rank:
            sentences.append(f"Its attention reads {what} of its own, by a change of rank {rank}.")
    if (kept := recipe.get("easy_target_rate")) is not None and kept < 1:
        sentences.append(f"Targets to which the base gives .9 or more were trained on at a rate of {kept:g}.")
    if rate := recipe.get("corruption_rate"):
        sentences.append(f"Trained on noised targets of which a share of {rate:g} was built from wrong tokens.")
    if evaluations := recipe.get("rollout_evaluations"):
        sentences.append(f"Trained on the path's own trajectories of {evaluations} evaluations.")
    if config.carried_state:
        sentences.append("The path carries a state from one evaluation to the next, so evaluations go in sequence.")
    return " ".join(sentences)


def _trained(folder: Path) -> int:
    """Number of trained parameters that the folder holds."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return count


def _has_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").is_file() or "chat_template" in _read(folder / "tokenizer_config.json")


def _read(path: Path) -> Any:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
