"""Damaged checkpoints: refused with a reason, or harmless. Edited settings: checked by their ranges, and followed.

Run: `python -m pytest tests/faults/test_checkpoint_damage.py`; with `-s` it prints how many variants there were, and
what became of them.
"""

import collections
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from l2d import L2DForCausalLM
from tests.conftest import randomise_path
from tests.faults.damage import CONFIG, GENERATION, WEIGHTS, settings_damage, tensor_damage, unsigned, variants

IDS = torch.tensor([[5, 17, 40, 3, 99], [8, 8, 21, 7, 250]])
SMALLEST = 200


@pytest.fixture(scope="module")
def folders(l2d_dir, make_base, tmp_path_factory) -> dict[str, Path]:
    """The checkpoint, the same in shards, another run of the same base and shapes, and another base."""
    work = tmp_path_factory.mktemp("damage")
    model = L2DForCausalLM.from_pretrained(l2d_dir)
    model.save_pretrained(work / "sharded", max_shard_size="8KB")
    randomise_path(model, seed=9)
    model.config.noise_std, model.generation_config.max_new_tokens = 3.0, 2
    model.save_pretrained(work / "other")
    return {
        "whole": l2d_dir,
        "other": work / "other",
        "foreign": make_base("llama", seed=9),
        "sharded": work / "sharded",
    }


def behaviour(model: L2DForCausalLM) -> tuple:
    """What a user sees of a model: tokens, scores and settings."""
    scored = model.score(IDS, sampler={"budget": 3})
    tokens = model.generate(IDS, max_new_tokens=3, sampler={"budget": 3})
    settings = {k: v for k, v in model.config.to_dict().items() if k not in NEUTRAL}
    return tokens.tolist(), scored.logprobs.tolist(), settings, model.generation_config.to_dict()


NEUTRAL = ("transformers_version", "tensors_digest", "_name_or_path", "base_revision")


def is_edit(name: str) -> bool:
    """Whether a variant changes settings only, which a user may do on purpose."""
    return " = " in name or name.endswith(" removed") or name.startswith((CONFIG, GENERATION))


def outcome(folder: Path, expected: tuple) -> str:
    """`harmless`, `refused`, `another result`, or what is wrong with it."""
    try:
        found = behaviour(L2DForCausalLM.from_pretrained(folder))
    except (ValueError, OSError) as error:
        text = str(error)
        named = folder.name in text or any(name in text for name in (CONFIG, WEIGHTS, GENERATION, "base="))
        return "refused" if named and "\n" not in text and len(text) < 500 else f"reason {text!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "harmless" if found == expected else "another result"


def judge(made, whole: Path, work: Path, prepare=None, compare: bool = True) -> dict[str, str]:
    """Outcome of each variant, in a fresh copy of `whole`."""
    expected, found = behaviour(L2DForCausalLM.from_pretrained(whole)), {}
    for number, (name, damage) in enumerate(made):
        folder = work / f"variant-{number}"
        shutil.copytree(whole, folder)
        if prepare:
            prepare(folder)
        damage(folder)
        result = outcome(folder, expected)
        found[f"{number} {name}"] = "harmless" if result == "another result" and not compare else result
        shutil.rmtree(folder)
    return found


def test_damaged_checkpoints_are_refused_or_harmless(folders, tmp_path):
    found = judge(variants(**folders), folders["whole"], tmp_path)
    edits = {name: result for name, result in found.items() if is_edit(name.partition(" ")[2])}
    wrong = {name: result for name, result in found.items() if result not in ("refused", "harmless")}
    wrong = {name: result for name, result in wrong.items() if name not in edits or result != "another result"}
    assert not wrong, json.dumps(wrong, indent=1)
    counts = collections.Counter(result for name, result in found.items() if name not in edits)
    assert len(found) >= SMALLEST and counts["refused"] > 0.85 * sum(counts.values()), counts
    print(f"{len(found)} variants: {dict(counts)}")


OUT_OF_RANGE = [
    ("noise_std", -1, "above 0"),
    ("lora_rank", 0, "from 1 to"),
    ("frequency_width", 7, "even"),
    ("min_noise", 1.0, "below 1"),
    ("variant", "half", "lora"),
    ("carried_state", "yes", "true or false"),
    ("sampler", {"budget": 14}, "use 13 or 15"),
    ("sampler", {"budgett": 15}, "did you mean 'budget'"),
]


def edited(folder: Path, target: Path, **values: object) -> Path:
    """A copy of checkpoint `folder` whose `config.json` was edited by hand."""
    shutil.copytree(folder, target)
    content = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**content, **values}))
    return target


@pytest.mark.parametrize("key, value, reason", OUT_OF_RANGE, ids=[f"{key}={value}" for key, value, _ in OUT_OF_RANGE])
def test_an_edited_setting_out_of_range_is_refused(l2d_dir, tmp_path, key, value, reason):
    folder = edited(l2d_dir, tmp_path / "edited", **{key: value})
    with pytest.raises(ValueError, match=reason) as error:
        L2DForCausalLM.from_pretrained(folder)
    assert CONFIG in str(error.value) and "\n" not in str(error.value)


def test_an_edited_setting_is_followed(l2d_dir, tmp_path):
    model = L2DForCausalLM.from_pretrained(edited(l2d_dir, tmp_path / "edited", sampler={"budget": 7}, noise_std=3.0))
    assert model.sampler().budget == 7 and model.config.noise_std == 3.0


def test_digests_of_settings_in_older_checkpoints_are_ignored(l2d_dir, tmp_path):
    """Checkpoints that were saved with `settings_digest` and `generation_digest` load, and lose them when saved."""
    old = edited(l2d_dir, tmp_path / "old", settings_digest="0" * 32, generation_digest="1" * 32)
    model = L2DForCausalLM.from_pretrained(old)
    model.save_pretrained(tmp_path / "new")
    content = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert "tensors_digest" in content and not {"settings_digest", "generation_digest"} & content.keys()


def test_checkpoints_without_a_digest_load_and_their_visible_damage_is_refused(folders, tmp_path):
    """What the digest would tell cannot be known there, but nothing ends in a traceback."""
    whole = folders["whole"]
    made = [("as it is", lambda folder: None), *settings_damage(whole / CONFIG)]
    made += list(tensor_damage(load_file(whole / WEIGHTS), random.Random(1)))
    found = judge(made, whole, tmp_path, unsigned, compare=False)
    wrong = {name: result for name, result in found.items() if result not in ("refused", "harmless")}
    assert not wrong, json.dumps(wrong, indent=1)
    assert found["0 as it is"] == "harmless"
    tensors = [
        name for name in found if name.endswith((" nan", " inf", " missing", " int32", " flat")) and "=" not in name
    ]
    assert len(tensors) >= 11 and all(found[name] == "refused" for name in tensors)
