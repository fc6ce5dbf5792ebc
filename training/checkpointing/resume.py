"""Which folders may be written to, and from which checkpoint a run may resume.

- `choose_checkpoint`: `resume_from_checkpoint` -> the newest complete checkpoint, or the one that was named
- `missing_parts`: what a checkpoint folder lacks for a bit-equal resume
- `check_sharding_of`: whether a run that is sharded otherwise may resume from it
- `check_same_model`: a run goes on with the model that it began with
- `saved_step`: how far the run came whose results are in a folder
- `check_output_dir`, `clear_output_dir`: nothing is overwritten without being asked
- `write_checksums`, `changed_files`: damage is seen before a run resumes from a checkpoint

A checkpoint is complete when weights, optimizer, scheduler, random states of every process and the trainer's state are
there and as they were saved. Ours appear complete (see `atomic`) with checksums; those that were copied in part, or
written by another trainer that was killed, would resume silently wrong.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError, safe_open

from l2d.checkpoint.settings import CheckpointSettings
from l2d.cli.parser import check_folder
from l2d.settings import declared
from training.checkpointing.disk_errors import Interrupted

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_OPTIMIZERS = {"optimizer.pt": "no sharding", "optimizer.bin": "FSDP", "zero_*.pt": "DeepSpeed"}
UNFINISHED = "unfinished-"  # before the name of a checkpoint that is being written
NO_RESUME = (None, False, "false", "False")
_OF_THE_PATH = [name for name, one in declared(CheckpointSettings).items() if one.of_the_weights]
_OF_ADAPTERS = {"lora_rank": "r", "lora_alpha": "lora_alpha"}
_LEFT_BEHIND = ("runs", "README.md", "recipe.yaml")  # what a run leaves that was killed before its first checkpoint
CHECKSUMS = "checksums.json"  # of a checkpoint's files
_RESULTS = ("all_results.json", "train_results.json", "eval_results.json", "trainer_state.json")


def choose_checkpoint(setting: str | bool | None, output_dir: str, processes: int) -> tuple[str | None, str | None]:
    """The checkpoint to resume from and a sentence that says why, or `(None, reason or None)` to start afresh.

    Args:
        setting: `None` or false; `true` (newest complete checkpoint, which must exist); `"auto"` (the same, but starts
            afresh where the folder holds no checkpoint yet); or a folder.
        processes: number of processes of this run; the checkpoint must be of as many.

    Raises `ValueError` if the named checkpoint is incomplete, there is none, or the one to resume from was saved by
    another number of processes.
    """
    if setting is None or setting in NO_RESUME:
        return None, None
    if not isinstance(setting, bool) and setting not in ("true", "True", "auto"):
        if not os.path.isdir(setting):
            raise ValueError(f"resume_from_checkpoint={setting!r} is not a directory: name a checkpoint, true or auto.")
        if lacking := missing_parts(setting):
            raise ValueError(
                f"resume_from_checkpoint={setting!r} is incomplete and would not resume exactly, it lacks "
                f"{', '.join(lacking)}: choose another, or auto for the newest complete."
            )
        _check_processes(setting, processes)
        return setting, f"resuming from {setting}, as asked"
    skipped = []
    for folder in _checkpoints(output_dir):
        if lacking := missing_parts(folder):
            skipped.append(f"{os.path.basename(folder)} (lacks {', '.join(lacking)})")
            continue
        _check_processes(folder, processes)
        why = f"; skipped {', '.join(skipped)}" if skipped else ""
        return folder, f"resuming from {folder}, the newest complete checkpoint{why}"
    held = f"only incomplete ones: {', '.join(skipped)}" if skipped else "none"
    if setting == "auto":
        return None, f"no complete checkpoint in {output_dir} ({held}): starting from the beginning"
    raise ValueError(f"resume_from_checkpoint=True needs a complete checkpoint in {output_dir!r}, which holds {held}.")


def _checkpoints(output_dir: str) -> list[str]:
    """Checkpoint folders, newest step first."""
    steps = [int(match[1]) for name in _listing(output_dir) if (match := re.fullmatch(r"checkpoint-(\d+)", name))]
    return [os.path.join(output_dir, f"checkpoint-{step}") for step in sorted(steps, reverse=True)]


def _listing(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def _check_processes(checkpoint: str, processes: int) -> None:
    saved = max(_ranks(checkpoint), default=0) + 1
    if saved != processes:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} was saved with {saved} process{'es' if saved > 1 else ''} and "
            f"{processes} would not continue it exactly: launch {saved}, or choose another output_dir."
        )


def check_sharding_of(checkpoint: str, sharding: str) -> None:
    """Raise `Interrupted` if `checkpoint` was saved with another `sharding` (no sharding, FSDP, DeepSpeed)."""
    saved_with = [how for name, how in _OPTIMIZERS.items() if glob.glob(os.path.join(glob.escape(checkpoint), name))]
    if saved_with and sharding not in saved_with:
        raise Interrupted(
            f"resume_from_checkpoint: {checkpoint} was saved with {saved_with[0]}, this run has {sharding} and cannot "
            "read its optimizer: launch it as then, or choose another output_dir."
        )


def _ranks(checkpoint: str) -> list[int]:
    """Of the processes that saved their random states; none of a run that has only one."""
    names = (re.fullmatch(r"rng_state_(\d+)\.pth", name) for name in _listing(checkpoint))
    return [int(match[1]) for match in names if match]


def missing_parts(checkpoint: str) -> list[str]:
    """Names of what `checkpoint` lacks, or holds only in part, for the processes that saved it to resume from it."""
    random_states = [f"rng_state_{rank}.pth" for rank in range(max(_ranks(checkpoint), default=-1) + 1)]
    lacking = []
    for names in (_WEIGHTS, _OPTIMIZERS):
        paths = [path for name in names for path in glob.glob(os.path.join(glob.escape(checkpoint), name))]
        if not any(_whole(path) for path in paths):
            lacking.append(next(iter(names)))
    parts = ("scheduler.pt", *(random_states or ["rng_state.pth"]), "trainer_state.json")
    lacking += [name for name in parts if not _whole(os.path.join(checkpoint, name))]
    return lacking or [f"{name} as it was saved" for name in changed_files(checkpoint)]


def _whole(path: str) -> bool:
    """Whether `path` is there and was written to its end."""
    if os.path.isdir(path):
        return bool(os.listdir(path))
    if not os.path.isfile(path):
        return False
    checks: dict[str, Callable[[str], bool]] = {
        ".safetensors": _whole_safetensors, ".json": _whole_json, ".pt": zipfile.is_zipfile, ".pth": zipfile.is_zipfile
    }  # fmt: skip
    return checks.get(os.path.splitext(path)[1], lambda path: os.path.getsize(path) > 0)(path)


def _whole_json(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError:
        return False
    shards = set(content.get("weight_map", {}).values())
    return all(_whole(os.path.join(os.path.dirname(path), shard)) for shard in shards)


def _whole_safetensors(path: str) -> bool:
    try:
        with safe_open(path, "pt"):  # checks header and length
            return True
    except (SafetensorError, OSError):
        return False


def check_same_model(checkpoint: str, model: Any) -> None:
    """Raise `ValueError` if `checkpoint` is of a model with other settings than `model`, or of another method or base.

    A sharded checkpoint does not say what it is of.
    """
    config = _read_mapping(os.path.join(checkpoint, "config.json"))
    adapter = _read_mapping(os.path.join(checkpoint, "adapter_config.json"))
    adapters, kind = getattr(model, "peft_config", None), model.config.model_type
    different: list[str] = []
    if (adapter and not adapters) or (config and (adapters or config["model_type"] != kind)):
        different = ["method or base"]
    elif adapter and adapters:
        now = adapters["default"]
        different = [option for option, name in _OF_ADAPTERS.items() if adapter[name] != getattr(now, name)]
    elif config and kind == "l2d":
        now, before = model.config, type(model.config).from_dict(config)
        different = [name for name in _OF_THE_PATH if getattr(before, name) != getattr(now, name)]
        different += ["base"] if now.base_fingerprint not in (None, before.base_fingerprint) else []
    if different:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint!r} was trained with another {', '.join(different)}: set what it was "
            "trained with, or start afresh in another output_dir."
        )


def _read_mapping(path: str) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is none."""
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def saved_step(folder: str) -> int | None:
    """The step of the trainer's state in `folder`, `None` where there is none or not all of it."""
    path = os.path.join(folder, "trainer_state.json")
    return _read_mapping(path).get("global_step") if _whole(path) else None


def check_output_dir(output_dir: str, resume: str | bool | None, overwrite: bool, base: str) -> None:
    """Raise `ValueError` if `output_dir` holds something and neither resuming nor overwriting was asked for.

    A folder that holds the `base` is never written to.
    """
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise ValueError(f"output_dir={output_dir!r} is a file: give a folder.")
    check_folder("output_dir", output_dir)
    if os.path.isdir(output_dir) and os.path.isdir(base) and os.path.samefile(output_dir, base):
        raise ValueError(f"output_dir={output_dir!r} is where the base is: choose another folder.")
    resume = resume not in NO_RESUME
    if resume and overwrite:
        raise ValueError("resume_from_checkpoint continues a run and overwrite_output_dir starts it afresh: keep one.")
    content = _listing(output_dir)
    fresh = all(name in _LEFT_BEHIND or name.startswith(UNFINISHED) for name in content)
    if not content or overwrite or (resume and (_checkpoints(output_dir) or fresh)):
        return
    raise ValueError(
        f"output_dir={output_dir!r} already holds {sorted(content)[0]!r} and {len(content) - 1} more: choose another "
        "folder, resume_from_checkpoint: auto to continue a run in it, or overwrite_output_dir: true."
    )


def clear_output_dir(output_dir: str) -> None:
    """Remove what an earlier run left in `output_dir` (checkpoints, weights, results), and nothing else."""
    for folder in _checkpoints(output_dir):
        shutil.rmtree(folder)
    clear_unfinished(output_dir)
    for name in _listing(output_dir):
        if name in _RESULTS or re.fullmatch(r"model.*\.safetensors(\.index\.json)?", name):
            os.remove(os.path.join(output_dir, name))


def clear_unfinished(output_dir: str) -> None:
    """Remove checkpoints that a killed run had begun to write."""
    for name in _listing(output_dir):
        if name.startswith(UNFINISHED + "checkpoint-"):
            shutil.rmtree(os.path.join(output_dir, name))


# ---- checksums ---------------------------------------------------------------------------------------------------


def write_checksums(folder: str) -> None:
    """Bring all files below `folder` to the disk and note their SHA-256 in `checksums.json`."""
    checksums = {}
    for directory, _, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            checksums[os.path.relpath(path, folder)] = _checksum(path)
    with open(os.path.join(folder, CHECKSUMS), "w", encoding="utf-8") as file:
        json.dump(checksums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def changed_files(folder: str) -> list[str]:
    """Names of files that are missing or differ from what was noted; none where nothing was noted."""
    path = os.path.join(folder, CHECKSUMS)
    if not os.path.isfile(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            noted = json.load(file)
        return [name for name, checksum in noted.items() if not _fits(os.path.join(folder, name), checksum)]
    except (ValueError, AttributeError, TypeError):
        return [CHECKSUMS]


def _checksum(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _fits(path: str, noted: str) -> bool:
    try:
        return _checksum(path) == noted
    except OSError:
        return False
