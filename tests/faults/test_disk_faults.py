"""A full disk, a folder that cannot be written, a shard that cannot be read: one line, and nothing half is left.

Run: `python -m pytest tests/faults/test_disk_faults.py`. A disk is full in two ways: a small file system that fills up
(where this process may mount one), and a limit on the size of files, which works everywhere.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from l2d import L2DForCausalLM
from tests.faults.conftest import EVALUATE, REPORT, SWEEP, TOOL, TRAIN
from tests.faults.nursery import Command
from tests.faults.test_killed_evaluation import answers, write_sweep
from tests.integration.harness import TASKS
from tests.lm_eval_ext.test_leaderboard import write_demo
from tests.training_runs import same_bits, weights, write_recipe
from training.checkpointing.resume import missing_parts


def refused(done: Command, *said: str) -> str:
    """The command's one line, which names what is wrong."""
    text = done.text
    assert done.returncode not in (0, None) and done.returncode > 0, text
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if all(part in line for part in said)]
    assert len(lines) == 1, text
    return lines[0]


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_fills_the_disk_and_goes_on_when_there_is_room(
    nursery, training_settings, undisturbed, small_disk, tmp_path
):
    whole, _ = undisturbed
    size = sum(file.stat().st_size // 4096 + 1 for file in (whole / "checkpoint-2").iterdir()) * 4
    out = small_disk(3 * size) / "out"
    recipe = write_recipe(tmp_path / "recipe.yaml", output_dir=out, **training_settings)
    done = nursery.run(TRAIN, "--config", recipe)
    line = refused(done, "error: output_dir=", "cannot be written (No space left on device)")
    assert "resume_from_checkpoint: auto" in line and done.returncode == 1
    kept = sorted(path.name for path in out.glob("*checkpoint-*"))
    assert kept and "checkpoint-12" not in kept and all(name.startswith("checkpoint-") for name in kept)
    assert all(missing_parts(str(out / name)) == [] for name in kept)
    small_disk(20 * size)
    done = nursery.run(TRAIN, "--config", recipe, "--resume_from_checkpoint", "auto")
    assert done.returncode == 0, done.text
    assert same_bits(weights(out), weights(whole))


@pytest.mark.parametrize("part", ["optimizer.pt", "model.safetensors"])
def test_training_cannot_write_a_file_to_its_end(nursery, training_settings, undisturbed, tmp_path, part):
    """The first checkpoint fails in the middle of its optimizer's state, or of its weights."""
    largest = (undisturbed[0] / "checkpoint-2" / part).stat().st_size - 1000
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "recipe.yaml", output_dir=out, **training_settings)
    done = nursery.run(TRAIN, "--config", recipe, largest=largest)
    reason = "a file could not be written to its end" if part == "optimizer.pt" else "File too large"
    refused(done, "error: output_dir=", f"cannot be written ({reason})")
    assert not list(out.glob("*checkpoint-*")) and not list(out.glob("*.safetensors"))


def test_training_into_a_folder_that_cannot_be_written(nursery, training_settings, small_disk, tmp_path):
    places = {small_disk(64, "ro") / "out": "cannot be written to: choose another folder"}
    (tmp_path / "file").write_text("")
    places[tmp_path / "file" / "out"] = "is a file; give a folder"
    for out, reason in places.items():
        recipe = write_recipe(tmp_path / "recipe.yaml", output_dir=out, **training_settings)
        done = nursery.run(TRAIN, "--config", recipe)
        refused(done, "error: output_dir=", reason)
        assert done.returncode == 2


def _cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


@pytest.mark.parametrize("damage", ["cut parquet", "cut jsonl", "binary jsonl", "cut arrow", "gone"])
def test_a_shard_of_the_data_cannot_be_read(nursery, training_settings, tmp_path, damage):
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": f"{i}?", "completion": str(i)} for i in range(50)])
    kind = damage.split()[-1]
    path = tmp_path / ("data" if kind == "arrow" else f"data.{kind}" if kind != "gone" else "data.jsonl")
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "arrow":
        rows.save_to_disk(path)
    elif kind == "jsonl":
        rows.to_json(path)
    if damage == "binary jsonl":
        path.write_bytes(bytes(range(256)) * 9)
    elif damage.startswith("cut"):
        _cut(next(path.glob("*.arrow")) if kind == "arrow" else path, 0.61)
    settings = {**training_settings, "dataset": path, "output_dir": tmp_path / "out"}
    done = nursery.run(TRAIN, "--config", write_recipe(tmp_path / "recipe.yaml", **settings))
    refused(done, "error: " if kind == "jsonl" else "error: dataset=", str(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "header", "gone", "tensor", "folder"])
def test_a_shard_of_the_base_cannot_be_read(nursery, training_settings, base_dir, l2d_dir, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    base, file = tmp_path / "base", tmp_path / "base" / "model.safetensors"
    shutil.copytree(base_dir, base)
    if damage == "cut":
        _cut(file)
    elif damage == "header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif damage == "tensor":
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.unlink()
    if damage == "folder":
        file.mkdir()
    settings = {**training_settings, "base": base, "output_dir": tmp_path / "out"}
    done = nursery.run(TRAIN, "--config", write_recipe(tmp_path / "recipe.yaml", **settings))
    refused(done, "error: base=", str(base))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(ValueError, match="base="):
        L2DForCausalLM.from_pretrained(l2d_dir, base=base)


# ---- saving a model --------------------------------------------------------------------------------------------------


def test_a_model_saved_on_a_full_disk_does_not_load(l2d_dir, small_disk, tmp_path):
    model = L2DForCausalLM.from_pretrained(l2d_dir)
    out = small_disk(64)
    with pytest.raises(OSError, match="No space left on device") as caught:
        model.save_pretrained(out, max_shard_size="8KB")
    assert "\n" not in str(caught.value) and "save_directory=" in str(caught.value)
    with pytest.raises(ValueError, match="incomplete|cannot be read|damaged"):
        L2DForCausalLM.from_pretrained(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory=.* is a file"):
        model.save_pretrained(tmp_path / "file")


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_a_sweep_fills_the_disk_and_goes_on_when_there_is_room(nursery, l2d_dir, tmp_path):
    out = tmp_path / "out"
    file = write_sweep(tmp_path / "sweep.yaml", out, l2d_dir)
    done = nursery.run(SWEEP, file, largest=3000)
    assert done.returncode == 1 and "Traceback" not in done.text, done.text
    failures = [line for line in done.text.splitlines() if ": failed, " in line]
    assert len(failures) == 4 and all("could not be written" in line and "make room" in line for line in failures)
    assert all(folder.suffix == ".partial" for folder in out.glob("*/*"))
    done = nursery.run(SWEEP, file)
    assert done.returncode == 0 and len(answers(out)) == 8, done.text


def test_an_evaluation_says_that_its_results_are_lost(nursery, l2d_dir, tmp_path):
    """The harness itself only warns, exits with status 0, and leaves half a file."""
    words = ["run", "--model", "l2d", "--model_args", f"pretrained={l2d_dir},diffusion_budget=3", "--device", "cpu"]
    words += ["--tasks", "l2d_test_choice", "--include_path", TASKS, "--limit", "2", "--output_path", tmp_path / "out"]
    done = nursery.run(EVALUATE, *words, largest=3000)
    refused(done, "l2d: --output_path:", "could not be written completely", "make room")
    assert not list((tmp_path / "out").rglob("results*"))


@pytest.mark.parametrize("command", ["sweep", "report", "trace"])
def test_outputs_that_cannot_be_written(nursery, l2d_dir, tmp_path, command):
    """Below a file, and with files that must stay small; what was there before stays whole."""
    (tmp_path / "file").write_text("")
    if command == "sweep":
        done = nursery.run(SWEEP, write_sweep(tmp_path / "sweep.yaml", tmp_path / "file" / "out", l2d_dir))
        refused(done, "output=", "is a file; give a folder")
        return
    if command == "report":
        words = [REPORT, write_demo(tmp_path / "results"), "--out"]
    else:
        words = [TOOL, "trace", l2d_dir, "--prompt", "What?", "--max-new-tokens", 2, "--out"]
    refused(nursery.run(*words, tmp_path / "file" / "out"), "out=", "is a file; give a folder")
    out = tmp_path / "out"
    name = out if command == "report" else out / "trace.html"
    assert nursery.run(*words, name).returncode == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    refused(nursery.run(*words, name, largest=4000), "--out", "cannot be written (File too large)", "make room")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    if command == "trace":
        assert json.loads(before["trace.json"])["tokens"]


def test_a_damaged_checkpoint_ends_every_command_with_one_line(nursery, l2d_dir, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(l2d_dir, folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-9] ^= 4
    (folder / "model.safetensors").write_bytes(content)
    said = ("the tensors are not those that config.json was saved with", str(folder))
    refused(nursery.run(TOOL, "trace", folder, "--prompt", "What?"), "l2d: ", *said)
    refused(nursery.run(TOOL, "chat", folder), "l2d: ", *said)
    words = ["run", "--model", "l2d", "--model_args", f"pretrained={folder}", "--device", "cpu"]
    refused(nursery.run(EVALUATE, *words, "--tasks", "l2d_test_choice", "--include_path", TASKS), "l2d: ", *said)
