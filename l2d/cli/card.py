"""Write a checkpoint's model card from measured results, and put all of it on the hub: `python -m l2d card DIR ...`."""

import argparse
import dataclasses
import json
from pathlib import Path

from l2d.checkpoint.opening import read_config_file
from l2d.cli.files import write_files

_UPLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "recipe.yaml", "README.md", "*.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m l2d card`."""
    parser.add_argument("folder", metavar="DIR", help="folder of an L2D checkpoint")
    parser.add_argument(
        "results", metavar="RESULTS", nargs="*", help="folders or files that lm_eval wrote, all budgets"
    )
    parser.add_argument("--metric", help="which one of a task's metrics, for example exact_match; default: its first")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload checkpoint, card, curve and results to the hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def run(given: argparse.Namespace) -> None:
    """Write `README.md`, `budget_curve.png` and `budget_results.json` into the folder. Raises `ValueError`."""
    folder = Path(given.folder)
    if not folder.is_dir():
        raise ValueError(f"pretrained={given.folder!r} is not a directory: give the folder of an L2D checkpoint.")
    config = read_config_file(folder)
    if given.push:
        check_push(given.push)
    from l2d.card.results import curves, read_results
    from l2d.card.text import RESULTS, write_card

    if given.results:
        measured = read_results(given.results, given.metric)
        if len(checkpoints := {one.fingerprint for one in measured}) > 1:
            raise ValueError(f"results are of {len(checkpoints)} checkpoints: give those of {given.folder!r} alone.")
        if measured[0].base not in (None, config.get("base_fingerprint")):
            raise ValueError(f"results are of a model on another base than that of {given.folder!r}: give its own.")
        shown = [dataclasses.asdict(point) for points in curves(measured).values() for point in points]
        content = json.dumps(shown, indent=1) + "\n"
        write_files(folder, {RESULTS: content}, "DIR")
    write_card(folder, given.push)
    print(f"{folder / 'README.md'}")
    if given.push:
        print(push(folder, given.push, given.private))


def check_push(name: str) -> None:
    """Raise `ValueError` if no hub can be reached, before anything is written."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--push {name} reaches no hub while HF_HUB_OFFLINE is set: unset one of them.")


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload a checkpoint with its card, curve and results as `name`, which is made if need be; returns its address."""
    from huggingface_hub import HfApi

    check_push(name)
    api = HfApi()
    name = api.create_repo(name, private=private or None, exist_ok=True).repo_id
    ignored = ["checkpoint-*", "*/*"]
    commit = api.upload_folder(
        repo_id=name, folder_path=folder, allow_patterns=list(_UPLOADED), ignore_patterns=ignored, commit_message="L2D"
    )
    return str(commit.commit_url)
