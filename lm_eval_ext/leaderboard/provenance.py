"""Where a row comes from: command, seeds, versions, commits, fingerprints, date.

- `provenance`: of one results file, as plain values
"""

import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lm_eval_ext.leaderboard.files import Run
from lm_eval_ext.leaderboard.schema import number

_SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
_VERSIONS = ("lm_eval_version", "transformers_version")
_COMMITS = ("git_hash", "upper_git_hash")
_HASHES = ("revision", "commit", "base_fingerprint", "checkpoint_fingerprint", "dtype", "world_size")


def provenance(run: Run, out: Path) -> dict[str, Any]:
    """What the results file tells of its making; `file` and `samples` are seen from the folder `out`.

    The harness does not record its command line, so `command` is put together from what it recorded, unless the model
    class wrote down its own (`command_recorded`).
    """
    raw, date = run.raw, number(run.raw.get("date"))
    recorded = run.l2d.get("command")
    known = {name: raw.get(name) for name in (*_VERSIONS, *_COMMITS)}
    known |= {name: run.config.get(name) for name in _SEEDS}
    known |= {name: run.l2d.get(name) for name in _HASHES}
    sampler = run.l2d.get("sampler")
    return {
        "file": Path(os.path.relpath(run.file, out)).as_posix(),
        "samples": [Path(os.path.relpath(file, out)).as_posix() for file in sorted(run.samples.values())],
        "command": recorded if isinstance(recorded, str) else _command(run),
        "command_recorded": isinstance(recorded, str),
        "date": datetime.fromtimestamp(date, UTC).strftime("%Y-%m-%d %H:%M UTC") if date else None,
        "seconds": run.seconds,
        **{name: value for name, value in known.items() if value is not None},
        **({"sampler": sampler} if isinstance(sampler, dict) else {}),
        "chat_template_sha": raw.get("chat_template_sha"),
        "task_hashes": raw["task_hashes"],
    }


def _command(run: Run) -> str:
    config = run.config
    words = ["lm_eval", "--model", str(config.get("model"))]
    if run.model_args:
        words += ["--model_args", ",".join(f"{name}={value}" for name, value in run.model_args.items())]
    words += ["--tasks", ",".join(run.measures)]
    shots = {value for value in run.raw["n-shot"].values() if isinstance(value, int)}
    if len(shots) == 1:
        words += ["--num_fewshot", str(shots.pop())]
    for option in ("batch_size", "device", "limit"):
        if config.get(option) is not None:
            words += [f"--{option}", str(config[option])]
    if isinstance(config.get("gen_kwargs"), dict) and config["gen_kwargs"]:
        words += ["--gen_kwargs", ",".join(f"{name}={value}" for name, value in config["gen_kwargs"].items())]
    if run.raw.get("chat_template"):
        words.append("--apply_chat_template")
    if run.raw.get("fewshot_as_multiturn"):
        words.append("--fewshot_as_multiturn")
    seeds = [config.get(name) for name in _SEEDS]
    if None not in seeds:
        words += ["--seed", ",".join(map(str, seeds))]
    return shlex.join(words + (["--log_samples"] if run.samples else []))
