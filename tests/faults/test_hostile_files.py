"""Files made by somebody who means harm: no pickle of theirs runs, nor code that comes with a model or a data set.

Run: `python -m pytest tests/faults/test_hostile_files.py`. Every trap makes a folder when it is sprung; that traps do
spring is tested, too.
"""

import json
import os
import pickle
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from l2d import L2DForCausalLM
from l2d.released import load_released, read_folder
from lm_eval_ext.harness.response_cache import claim_cache
from tests.conftest import REPOSITORY
from tests.faults.conftest import EVALUATE, TOOL, TRAIN
from tests.faults.test_disk_faults import refused
from tests.integration.harness import TASKS
from tests.training_runs import write_recipe


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.sprung),))


@pytest.fixture
def trap(tmp_path) -> Trap:
    return Trap(tmp_path / "sprung")


def test_the_trap_springs(trap, tmp_path):
    torch.save({"state": trap}, tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert trap.sprung.exists()


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin", "model.safetensors"],
)
def test_no_pickle_of_a_training_checkpoint_is_run(nursery, training_settings, undisturbed, trap, tmp_path, name):
    """Neither when a run resumes from it, nor when the model is loaded from it."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0] / "checkpoint-2", out / "checkpoint-2")
    checkpoint = out / "checkpoint-2"
    replaced = (checkpoint / name).exists()
    torch.save({"state": trap, "param_groups": []}, checkpoint / name)
    recipe = write_recipe(tmp_path / "recipe.yaml", **{**training_settings, "output_dir": out, "max_steps": 3})
    if replaced:
        done = nursery.run(TRAIN, "--config", recipe, "--resume_from_checkpoint", checkpoint)
        refused(done, "error: resume_from_checkpoint=", name)  # not the file that was noted
    (checkpoint / "checksums.json").unlink()
    done = nursery.run(TRAIN, "--config", recipe, "--resume_from_checkpoint", checkpoint)
    if name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"):
        refused(done, "error: resume_from_checkpoint=")
    else:
        assert done.returncode == 0, done.text  # it is not looked at
    if name == "model.safetensors":
        with pytest.raises(ValueError, match="cannot be read"):
            L2DForCausalLM.from_pretrained(checkpoint)
    else:
        L2DForCausalLM.from_pretrained(checkpoint)
    assert not trap.sprung.exists()


def test_no_pickle_stands_in_for_the_weights(nursery, l2d_dir, base_dir, trap, tmp_path):
    """`pytorch_model.bin` in the place of `model.safetensors`, in a checkpoint and in a base."""
    for number, (source, arguments) in enumerate(((l2d_dir, {}), (base_dir, {"base": True}))):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        (folder / "model.safetensors").unlink()
        torch.save({"lm_head.weight": trap}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pretrained=|base="):
            L2DForCausalLM.from_pretrained(*((l2d_dir,) if arguments else (folder,)), **{k: folder for k in arguments})
    assert not trap.sprung.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_released_pickles_are_read_as_tensors_only(trap, tmp_path, legacy):
    torch.save({"model.x": trap}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_released(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(trap, protocol=2))  # torch's own, of others it warns
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        read_folder(tmp_path)
    assert not trap.sprung.exists()


def test_a_response_cache_holds_plain_values_only(trap, tmp_path):
    """The harness pickles what `--use_cache` keeps."""
    from sqlitedict import SqliteDict

    file = tmp_path / "cache.db"
    with SqliteDict(str(file), autocommit=True) as cache:
        claim_cache(cache, {"budget": 3})
        cache["answer"], cache["score"] = "text", (-1.5, True)
        claim_cache(cache, {"budget": 3})
        assert cache["answer"] == "text" and cache["score"] == (-1.5, True)
    for key in ("l2d settings", "answer"):
        copy = shutil.copy(file, tmp_path / f"{key}.db")
        with sqlite3.connect(copy) as database:
            database.execute("UPDATE unnamed SET value = ? WHERE key = ?", (pickle.dumps(trap), key))
        with SqliteDict(str(copy)) as cache:
            with pytest.raises(ValueError, match="--use_cache names a file that holds posix.mkdir"):
                claim_cache(cache, {"budget": 3})
                cache["answer"]
    assert not trap.sprung.exists()


def _with_code(folder: Path, source: Path, sprung: Path, kind: str) -> Path:
    """A copy of a model's folder whose configuration asks for the code beside it."""
    shutil.copytree(source, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\nclass Evil: pass\n")
    file = folder / ("tokenizer_config.json" if kind == "AutoTokenizer" else "config.json")
    content = json.loads(file.read_text())
    value = ["evil.Evil", "evil.Evil"] if kind == "AutoTokenizer" else "evil.Evil"
    content["auto_map"] = {kind: value}
    if kind == "AutoConfig":
        content["model_type"] = "evil"
    elif kind == "AutoTokenizer":
        content["tokenizer_class"] = "Evil"
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"])
@pytest.mark.parametrize("where", ["base", "checkpoint"])
def test_no_code_of_a_model_runs_unless_it_is_asked_for(
    nursery, training_settings, base_dir, l2d_dir, tmp_path, kind, where
):
    sprung = tmp_path / "sprung"
    folder = _with_code(tmp_path / where, base_dir if where == "base" else l2d_dir, sprung, kind)
    options = {"base": folder} if where == "base" else {}
    try:
        L2DForCausalLM.from_pretrained(l2d_dir if where == "base" else folder, **options)
    except ValueError as error:
        assert "\n" not in str(error)
    words = ["trace", l2d_dir if where == "base" else folder, "--prompt", "What?", "--max-new-tokens", 1]
    nursery.run(TOOL, *words, *(["--base", folder] if where == "base" else []))
    model_args = f"pretrained={l2d_dir},base={folder}" if where == "base" else f"pretrained={folder}"
    words = ["run", "--model", "l2d", "--model_args", model_args, "--device", "cpu", "--limit", "1"]
    nursery.run(EVALUATE, *words, "--tasks", "l2d_test_choice", "--include_path", TASKS)
    settings = {**training_settings, "base": folder, "output_dir": tmp_path / "out", "max_steps": 1}
    nursery.run(TRAIN, "--config", write_recipe(tmp_path / "recipe.yaml", **settings))
    assert not sprung.exists()


def test_code_of_a_base_runs_when_it_is_asked_for(nursery, training_settings, base_dir, tmp_path):
    """The control: the same folder, with `trust_remote_code`."""
    folder = _with_code(tmp_path / "base", base_dir, tmp_path / "sprung", "AutoConfig")
    settings = {**training_settings, "base": folder, "output_dir": tmp_path / "out", "trust_remote_code": True}
    nursery.run(TRAIN, "--config", write_recipe(tmp_path / "recipe.yaml", **settings))
    assert (tmp_path / "sprung").exists()


def test_no_code_of_a_data_set_runs(nursery, training_settings, tmp_path):
    folder, sprung = tmp_path / "data", tmp_path / "sprung"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 50)
    settings = {**training_settings, "output_dir": tmp_path / "out", "max_steps": 1}
    for dataset in (folder, folder / "data.py"):
        done = nursery.run(TRAIN, "--config", write_recipe(tmp_path / "r.yaml", **{**settings, "dataset": dataset}))
        refused(done, "error: ", str(dataset))
    assert not sprung.exists()


def test_code_benchmarks_need_the_confirmation_of_the_harness(nursery, l2d_dir, tmp_path):
    """A task that is marked as unsafe, as humaneval and mbpp are, and the metric would run what the model wrote."""
    task = (TASKS / "l2d_test_generate.yaml").read_text() + "\nunsafe_code: true\n"
    (tmp_path / "unsafe.yaml").write_text(task.replace("l2d_test_generate", "l2d_unsafe"))
    for file in TASKS.glob("*.py"):
        shutil.copy(file, tmp_path)
    words = ["run", "--model", "l2d", "--model_args", f"pretrained={l2d_dir},diffusion_budget=1", "--device", "cpu"]
    words += ["--tasks", "l2d_unsafe", "--include_path", tmp_path, "--limit", "1", "--gen_kwargs", "max_gen_toks=2"]
    done = nursery.run(EVALUATE, *words)
    assert done.returncode != 0 and "marked as unsafe" in done.text, done.text
    done = nursery.run(EVALUATE, *words, "--confirm_run_unsafe_code")
    assert done.returncode == 0, done.text


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_the_code_benchmarks_are_marked_as_unsafe(task):
    """The harness's own and those of the released protocol."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    theirs = (Path(lm_eval.__file__).parent / "tasks" / task / f"{task}.yaml").read_text()
    assert re.search(r"^unsafe_code: true", theirs, re.M)
    for ending in ("", "_greedy"):
        file = REPOSITORY / "lm_eval_ext" / "tasks" / "released" / f"l2d_released_{task}{ending}.yaml"
        assert load_yaml(file, resolve_func=False)["unsafe_code"] is True


def test_our_own_code_calls_no_loader_that_runs_pickles():
    """`torch.load` only with `weights_only=True`; no pickle, joblib, dill, or unsafe YAML."""
    found = []
    for file in [f for package in ("l2d", "lm_eval_ext", "training") for f in (REPOSITORY / package).rglob("*.py")]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            bad = re.search(
                r"\b(pickle|joblib|dill|marshal|shelve)\.loads?\(|np\.load\(|yaml\.(unsafe|full)_load", line
            )
            if (
                bad
                or "torch.load(" in line
                and "weights_only=True" not in line
                or re.search(r"(?<!\.)\b(eval|exec)\(", line)
                and file.name != "runner.py"  # it runs the programs of code benchmarks, which is what it is for
            ):
                found.append(f"{file.name}:{number}: {line.strip()}")
    assert not found
