"""A killed run that is resumed equals an unbroken one, bit for bit. `python -m pytest tests/training/test_resume.py`"""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.training_runs import (
    BASELINE,
    INTERRUPTED,
    SMALL,
    logged,
    same_bits,
    sums,
    train_here,
    train_in_process,
    weights,
    write_jsonl,
    write_recipe,
)
from training.checkpointing.atomic import StopOnSignal


@pytest.fixture
def settings(tmp_path, base_dir):
    """Two epochs and a half, with accumulation and evaluation."""
    return {
        "base": base_dir,
        "dataset": write_jsonl(tmp_path / "data.jsonl", sums(44)),
        "eval_holdout": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }


def test_killed_and_resumed(tmp_path, settings):
    """SIGKILL between checkpoints, in the second epoch, and while one is written; then `auto`."""
    settings = {**SMALL, "draws": 2, **settings}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here(write_recipe(tmp_path / "whole.yaml", output_dir=whole, **settings))
    path = write_recipe(tmp_path / "broken.yaml", output_dir=broken, **settings)
    arguments = ["--config", str(path), "--resume_from_checkpoint", "auto"]
    killed = train_in_process(arguments, code=INTERRUPTED, env={"SIGNAL_AT": "3", "SIGNAL_WHERE": "saving"})
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert [folder.name for folder in broken.glob("*checkpoint-*")] == ["unfinished-checkpoint-3"]
    killed = train_in_process(arguments, code=INTERRUPTED, env={"SIGNAL_AT": "8"})
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert sorted(folder.name for folder in broken.glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    train_here(*[path, *arguments[2:]])
    assert same_bits(weights(whole), weights(broken))
    assert same_bits(weights(whole / "checkpoint-9"), weights(broken / "checkpoint-9"))
    assert logged(whole) == logged(broken) and len(logged(whole)) == 12
    assert logged(whole, "eval_loss") == logged(broken, "eval_loss")


@pytest.mark.parametrize("method", ["l2d", "full_sft"])
def test_sigterm_saves_and_ends(tmp_path, settings, method):
    """Exit status 0, a checkpoint between two log lines, no final model; resumed, the curve is the unbroken one's."""
    settings = {**(SMALL if method == "l2d" else BASELINE), **settings, "method": method}
    settings |= {"save_steps": 100, "logging_steps": 3, "eval_strategy": "no"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_here(write_recipe(tmp_path / "whole.yaml", output_dir=whole, **settings))
    path = write_recipe(tmp_path / "broken.yaml", output_dir=broken, **settings)
    ended = train_in_process(["--config", str(path)], code=INTERRUPTED, env={"SIGNAL_AT": "5", "SIGNAL": "TERM"})
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "stopped by SIGTERM after step 5 of 12" in ended.stdout and "Traceback" not in ended.stderr
    assert (broken / "checkpoint-5").is_dir() and not (broken / "model.safetensors").exists()
    train_here(path, "--resume_from_checkpoint", "auto")
    assert same_bits(weights(whole), weights(broken))
    for name in ("loss", "accuracy", "mean_token_accuracy", "loss_t_0.00_0.25"):
        assert logged(whole, name) == logged(broken, name)
    assert sorted(logged(whole)) == [3, 6, 9, 12]


def test_best_and_limited_checkpoints(tmp_path, settings):
    """The best checkpoint is kept beside the newest and becomes the final model; its place is recorded rightly."""
    out = tmp_path / "out"
    more = {"eval_steps": 3, "save_total_limit": 2, "load_best_model_at_end": True, "learning_rate": 0.5}
    train_here(write_recipe(tmp_path / "recipe.yaml", output_dir=out, **SMALL | settings | more))
    by_step = logged(out, "eval_loss")
    best = min((loss, step) for step, loss in by_step.items())[1]
    kept = sorted(int(folder.name.split("-")[1]) for folder in out.glob("checkpoint-*"))
    assert kept == sorted({best, 12} if best != 12 else {9, 12})
    assert same_bits(weights(out), weights(out / f"checkpoint-{best}"))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(out / f"checkpoint-{best}")


@pytest.mark.parametrize("method", ["lora_sft", "full_sft"])
def test_baselines_resume(tmp_path, settings, method):
    out = tmp_path / "out"
    path = write_recipe(tmp_path / "recipe.yaml", **BASELINE | settings | {"method": method, "output_dir": out})
    train_here(path)
    whole, losses = weights(out), logged(out)
    train_here(path, "--resume_from_checkpoint", str(out / "checkpoint-6"))
    assert same_bits(whole, weights(out)) and losses == logged(out)


@pytest.mark.parametrize("options", [{"noise_free": True}, {"rollout_evaluations": 2}])
def test_paths_whose_vocabulary_is_not_trained_resume(tmp_path, settings, options):
    """A checkpoint holds the vocabulary's projection all the same."""
    out = tmp_path / "out"
    path = write_recipe(tmp_path / "recipe.yaml", **SMALL | settings | options | {"output_dir": out})
    train_here(path)
    whole, losses = weights(out), logged(out)
    train_here(path, "--resume_from_checkpoint", str(out / "checkpoint-6"))
    assert same_bits(whole, weights(out)) and losses == logged(out)


@pytest.mark.parametrize("method", ["l2d", "lora_sft"])
def test_a_finished_run_that_is_started_again_keeps_its_results(tmp_path, settings, capsys, method):
    """Also one that was killed after its last checkpoint gets its model and evaluation, and no loss of 0."""
    settings = {**(SMALL if method == "l2d" else BASELINE), **settings, "method": method}
    settings |= {"eval_strategy": "no", "max_steps": 3, "output_dir": tmp_path / "out"}
    path, out = write_recipe(tmp_path / "recipe.yaml", **settings), tmp_path / "out"
    names = ("train_results.json", "eval_results.json", "all_results.json", "trainer_state.json")

    def results() -> list[dict]:
        found = [json.loads((out / name).read_text()) for name in names]
        return [{k: v for k, v in part.items() if not k.startswith("eval_") or "loss" in k} for part in found]

    train_here(path)
    before, whole = results(), weights(out)
    assert before[0]["train_loss"] > 0 and before[3]["log_history"][-1]["train_loss"] == before[0]["train_loss"]
    train_here(path, "--resume_from_checkpoint", "auto")
    assert results() == before and same_bits(weights(out), whole)
    assert "all 3 steps were made before, train_results.json stays as it is" in capsys.readouterr().out
    for name in (*names, "model.safetensors", "config.json"):
        (out / name).unlink()
    (out / "trainer_state.json").write_text("{")
    train_here(path, "--resume_from_checkpoint", "auto")
    assert "their train_results.json was never written" in capsys.readouterr().out
    assert same_bits(weights(out), whole) and not (out / "train_results.json").exists()
    (out / "train_results.json").write_text(json.dumps(before[0]))
    after = results()
    assert after[1] == before[1] and not any("train_loss" in entry for entry in after[3]["log_history"])
    assert logged(out) == {entry["step"]: entry["loss"] for entry in before[3]["log_history"] if "loss" in entry}
    train_here(path, "--resume_from_checkpoint", "auto", "--max_steps", "5")
    assert json.loads((out / "train_results.json").read_text())["train_loss"] > 0 and len(logged(out)) == 5


OTHER_MODELS = {
    "l2d": [
        ({"diffusion_dim": 16}, "diffusion_dim"),
        ({"noise_std": 3.0}, "noise_std"),
        ({"carried_state": True, "rollout_evaluations": 2}, "carried_state"),
        ({"warm_start": True}, "warm_start"),
        ({"base": "other"}, "base"),
    ],
    "lora_sft": [({"lora_rank": 8}, "lora_rank"), ({"lora_alpha": 5.0}, "lora_alpha")],
}


@pytest.mark.parametrize("method", ["l2d", "lora_sft"])
def test_a_run_goes_on_with_the_model_it_began_with(tmp_path, settings, make_base, capsys, method):
    """Another shape, scale, method or base ends in one sentence: the weights would not fit, or mean something else."""
    small = {**(SMALL if method == "l2d" else BASELINE), **settings, "method": method, "output_dir": tmp_path / "out"}
    small |= {"eval_strategy": "no", "eval_holdout": None, "max_steps": 3}
    train_here(write_recipe(tmp_path / "recipe.yaml", **small))
    before = weights(tmp_path / "out")
    plain = {**BASELINE, **settings, "method": "full_sft", "eval_strategy": "no", "eval_holdout": None}
    cases = [(small | change, name) for change, name in OTHER_MODELS[method]]
    for given, name in [*cases, (plain | {"output_dir": tmp_path / "out"}, "method")]:
        if given["base"] == "other":
            given["base"] = make_base("llama", seed=1)
        path = write_recipe(tmp_path / "other.yaml", **given)
        with pytest.raises(SystemExit) as ended:
            train_here(path, "--resume_from_checkpoint", "auto", "--max_steps", "6")
        assert ended.value.code == 2
        assert f"was trained with another {name}" in capsys.readouterr().err
    assert same_bits(before, weights(tmp_path / "out"))
    train_here(
        tmp_path / "recipe.yaml", "--resume_from_checkpoint", "auto", "--max_steps", "6", "--learning_rate", "1e-4"
    )


def test_noise_goes_on(tmp_path, base_dir, monkeypatch):
    """The steps after a resume draw new noise, the same that an uninterrupted run draws."""
    from training.trainer import L2DTrainer

    drawn, draw = [], L2DTrainer._draw

    def recorded(self, *args):
        noised = draw(self, *args)
        drawn.append(noised.noise.flatten()[:8])
        return noised

    monkeypatch.setattr(L2DTrainer, "_draw", recorded)
    settings = {**SMALL, "base": base_dir, "dataset": write_jsonl(tmp_path / "data.jsonl", sums(30))}
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "output_dir": tmp_path / "out"}
    path = write_recipe(tmp_path / "recipe.yaml", **settings)
    train_here(path)
    whole = list(drawn)
    drawn.clear()
    train_here(path, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-3"))
    assert len(whole) == 6 and len({tuple(noise.tolist()) for noise in whole}) == 6
    assert torch.equal(torch.stack(drawn), torch.stack(whole[3:]))


@pytest.mark.parametrize("method", ["full_sft", "lora_sft"])
def test_dropout_of_a_base_goes_on(tmp_path, make_base, method):
    """Its masks are torch's random numbers: resumed without their state the run would be another one."""
    base = make_base("llama", attention_dropout=0.5)
    settings = {**BASELINE, "method": method, "base": base, "dataset": write_jsonl(tmp_path / "data.jsonl", sums(30))}
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "output_dir": tmp_path / "out"}
    path = write_recipe(tmp_path / "recipe.yaml", **settings)
    train_here(path)
    whole, losses = _trained(tmp_path / "out"), logged(tmp_path / "out")
    train_here(path, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-3"))
    assert same_bits(whole, _trained(tmp_path / "out")) and losses == logged(tmp_path / "out")
    other = {**settings, "base": make_base("llama"), "overwrite_output_dir": True}
    train_here(write_recipe(tmp_path / "dry.yaml", **other))
    assert losses != logged(tmp_path / "out")  # the masks matter


def _trained(folder):
    """Tensors of a finished model or adapter."""
    return load_file(next(folder.glob("*model.safetensors")))


def test_the_curve_goes_on_between_two_lines(tmp_path, base_dir):
    """Loss, accuracy and bins of time of a line count the steps before the checkpoint, too."""
    settings = {**SMALL, "base": base_dir, "dataset": write_jsonl(tmp_path / "data.jsonl", sums(30))}
    settings |= {"max_steps": 6, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    path, out = write_recipe(tmp_path / "recipe.yaml", output_dir=tmp_path / "out", **settings), tmp_path / "out"
    train_here(path)
    curves = {name: logged(out, name) for name in ("loss", "accuracy")}
    assert all(len(curve) == 2 for curve in curves.values())
    train_here(path, "--resume_from_checkpoint", str(out / "checkpoint-2"))
    assert {name: logged(out, name) for name in curves} == curves


def test_a_training_that_begins_twice_gives_the_signal_back():
    """As it does with `auto_find_batch_size`, in one command: afterwards SIGTERM does what it did before."""
    before, stop = signal.getsignal(signal.SIGTERM), StopOnSignal(None)
    stop.on_train_begin()
    stop.on_train_begin()
    assert signal.getsignal(signal.SIGTERM) == stop._request
    stop.on_train_end()
    assert signal.getsignal(signal.SIGTERM) == before
