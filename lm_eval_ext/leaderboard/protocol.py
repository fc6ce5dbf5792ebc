"""What must be equal for two scores of a task to be comparable.

- `protocol_of`: task version, shots, documents, prompts, template, lengths, number and seed of processes and few-shots,
  type of the weights
- `differences`: in words, what differs between two protocols
- `usual_protocol`: the one that the rows of a column mostly share
"""

import hashlib
import json
from typing import Any

from lm_eval_ext.leaderboard.files import Measure, Run

_WORDS = {
    "measure": "measure",
    "version": "task version",
    "shots": "shots",
    "n": "documents",
    "limit": "limit",
    "template": "chat template",
    "system": "system instruction",
    "multiturn": "few-shots as turns",
    "stops": "stop strings",
    "longest": "longest answer",
    "fewshot_seed": "few-shot seed",
    "world_size": "processes",
    "dtype": "dtype",
    "prompts": "prompts or documents",
}
_UNKNOWN_IS_FINE = ("world_size", "prompts", "fewshot_seed", "dtype")
"""Not every model or call records these (no shots, no seed); two known values must agree."""


def protocol_of(run: Run, task: str, measure: Measure) -> dict[str, Any]:
    """The protocol of one score, as plain values; those of a group of tasks are gathered from its tasks."""
    raw, leaves = run.raw, run.leaves[task]
    configs = [raw["configs"].get(leaf) if isinstance(raw["configs"].get(leaf), dict) else {} for leaf in leaves]
    kwargs = [{**(config.get("generation_kwargs") or {})} for config in configs]
    hashes = [raw["task_hashes"].get(leaf) for leaf in leaves]
    counts = [raw["n-samples"].get(leaf) for leaf in leaves]
    effective = [count.get("effective") if isinstance(count, dict) else None for count in counts]
    shots = raw["n-shot"]
    return {
        "measure": measure.name,
        "version": _one([raw["versions"].get(leaf) for leaf in leaves]),
        "shots": _one([shots.get(leaf, shots.get(task)) for leaf in leaves]),
        "n": None if None in effective else sum(effective),
        "limit": run.config.get("limit"),
        "template": (raw.get("chat_template_sha") or "none")[:12],
        "system": (raw.get("system_instruction_sha") or "none")[:12],
        "multiturn": bool(raw.get("fewshot_as_multiturn")),
        "stops": _one([given.get("until") for given in kwargs]),
        "longest": _one([given.get("max_gen_toks") for given in kwargs]),
        "fewshot_seed": run.config.get("fewshot_seed") if any(shots.get(leaf) for leaf in leaves) else None,
        "world_size": run.l2d.get("world_size"),
        "dtype": _dtype(run),
        "prompts": None if None in hashes else _one(hashes),
    }


def _dtype(run: Run) -> str | None:
    """Type of the weights as they were loaded, else as the call asks for it; `None` where neither says."""
    asked = str(run.model_args.get("dtype", "auto"))
    loaded = run.config.get("model_dtype") or (None if asked == "auto" else asked)
    return loaded and loaded.removeprefix("torch.")


def _one(values: list[Any]) -> Any:
    """The value that all tasks of a group share, or a digest of different ones."""
    texts = {json.dumps(value, sort_keys=True, default=str) for value in values}
    if len(texts) == 1:
        return values[0]
    return "mixed " + hashlib.sha256("".join(sorted(texts)).encode()).hexdigest()[:8]


def differences(protocol: dict[str, Any], other: dict[str, Any], one_model: bool = True) -> list[str]:
    """What differs, as "shots 0 instead of 5"; empty where both are comparable.

    The type of the weights counts for `one_model` alone: different models come in different types.
    """
    found = []
    for name, words in _WORDS.items():
        if name == "dtype" and not one_model:
            continue
        mine, theirs = protocol[name], other[name]
        if mine == theirs or (name in _UNKNOWN_IS_FINE and None in (mine, theirs)):
            continue
        if name == "prompts":
            found.append("other prompts or documents")
        else:
            found.append(f"{words} {_shown(mine)} instead of {_shown(theirs)}")
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def usual_protocol(protocols: list[dict[str, Any]]) -> dict[str, Any]:
    """The protocol with which most of `protocols`, of any models, agree; among equals that of the most documents."""
    distinct: dict[str, tuple[dict[str, Any], int]] = {}
    for protocol in protocols:
        key = json.dumps(protocol, sort_keys=True, default=str)
        distinct[key] = (protocol, distinct.get(key, (protocol, 0))[1] + 1)

    def support(candidate: dict[str, Any]) -> tuple[int, int]:
        agreeing = sum(count for other, count in distinct.values() if not differences(other, candidate, False))
        return agreeing, candidate["n"] or 0

    most = max((protocol for protocol, _ in distinct.values()), key=support)
    winner = dict(most)
    for name in _UNKNOWN_IS_FINE:  # what some rows do not record is as in most of those that do
        known = [protocol[name] for protocol in protocols if not differences(protocol, winner, False)]
        known = [value for value in known if value is not None]
        if winner[name] is None and known:
            winner[name] = max(known, key=known.count)
    return winner
