"""Recipes: what is read, and what is refused in one sentence. `python -m pytest tests/training/test_config.py`"""

import pytest
import yaml
from huggingface_hub import constants

from tests.training_runs import (
    BASELINE,
    REPOSITORY,
    SMALL,
    sums,
    train_here,
    train_in_process,
    write_jsonl,
    write_recipe,
)
from training.config import L2DTrainingConfig, ModelArguments
from training.data.loading import load_split
from training.data.options import DataArguments
from training.data.tokenizer import load_tokenizer
from training.recipe import read_recipe


@pytest.fixture
def recipe(tmp_path, base_dir):
    """`recipe(**settings)`: a recipe file that would train, with changes."""
    data = write_jsonl(tmp_path / "data.jsonl", sums(12))

    def write(**settings):
        start = SMALL if settings.get("method", "l2d") == "l2d" else BASELINE
        fixed = {"base": base_dir, "dataset": data, "output_dir": tmp_path / "out"}
        return write_recipe(tmp_path / "recipe.yaml", **{**start, **fixed, **settings})

    return write


def test_settings_and_command_line(recipe):
    read = read_recipe(
        [
            "--config",
            str(recipe(draws=4, time_power=4)),
            "--save_strategy",
            "epoch",
            "--learning_rate",
            "1e-4",
            "--seed",
            "7",
        ]
    )
    assert yaml.safe_load(yaml.safe_dump(read.settings)) == read.settings
    assert (read.training.draws, read.training.time_power, read.model.variant) == (4, 4.0, "full")
    assert (read.training.learning_rate, read.training.seed) == (1e-4, 7)
    assert read.settings["learning_rate"] == 1e-4 and read.settings["draws"] == 4
    assert read.training.ddp_find_unused_parameters is False and read.training.bf16 is False


def test_yaml_means_what_people_mean(recipe, tmp_path):
    path = recipe()
    path.write_text(
        path.read_text()
        + "eval_strategy: no\nlr_scheduler_type: polynomial\n"
        + "lr_scheduler_kwargs: {lr_end: 1e-6, power: 1}\nadam_epsilon: 1e-7\n"
    )
    read = read_recipe(["--config", str(path)])
    assert read.training.lr_scheduler_kwargs == {"lr_end": 1e-6, "power": 1}
    assert read.training.eval_strategy == "no" and read.training.adam_epsilon == 1e-7


def test_relative_base_becomes_absolute(recipe, base_dir, monkeypatch):
    monkeypatch.chdir(base_dir.parent)
    assert read_recipe(["--config", str(recipe(base=base_dir.name))]).model.base == str(base_dir)
    assert read_recipe(["--config", str(recipe(base="owner/model"))]).model.base == "owner/model"


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "training" / "recipes").glob("*.yaml")), ids=lambda path: path.name
)
def test_recipes_in_the_repository(path):
    assert read_recipe(["--config", str(path)]).training.output_dir


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
        "save_steps": 1, "eval_holdout": 2}  # fmt: skip
REFUSED = {
    "unknown": ({"learning_rat": 1e-4}, "did you mean 'learning_rate'"),
    "method": ({"method": "dpo"}, "l2d, lora_sft, full_sft"),
    "text for a number": ({"draws": "four"}, "draws='four'"),
    "number for a word": ({"method": 3}, "method=3"),
    "fraction of a draw": ({"draws": 1.5}, "draws=1.5"),
    "no draws": ({"draws": 0}, "draws=0"),
    "time power": ({"time_power": 0.0}, "time_power=0.0"),
    "dropout": ({"guidance_dropout": 1.5}, "guidance_dropout=1.5"),
    "policy": ({"too_long": "ignore"}, "error, drop, truncate"),
    "no base": ({"base": None}, "base is not set"),
    "no data": ({"dataset": None}, "dataset is not set"),
    "no folder": ({"output_dir": None}, "output_dir is not set"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    "loss type": ({"loss_type": "dft"}, "loss_type=dft"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
    "offloading": ({"activation_offloading": True}, "activation_offloading=True"),
    "packing without length": ({"packing": True}, "packing=True fills rows up to max_length"),
    "packing strategy": ({"packing": True, "max_length": 64, "packing_strategy": "wrapped"}, "choose bfd"),
    "packing with classes": (
        {"packing": True, "max_length": 64, "guidance_classes": ["math"], "guidance_class": "math"},
        "padding_free",
    ),
    "eval packing": ({"eval_packing": True}, "eval_packing=True"),
    "budget": ({"eval_budgets": [3, 4], "eval_holdout": 2}, "budget"),
    "budgets without data": ({"eval_budgets": [3]}, "need evaluation data"),
    "budgets of a baseline": ({"method": "full_sft", "eval_budgets": [3], "eval_holdout": 2}, "eval_budgets would"),
    "model_init_kwargs": ({"model_init_kwargs": {"a": 1}}, "model_init_kwargs would be ignored"),
    "rank of full": ({"lora_rank": 8}, "lora_rank would be ignored by variant full"),
    "l2d options of a baseline": ({"method": "full_sft", "draws": 4}, "draws would be ignored by method full_sft"),
    "eval without data": ({"eval_strategy": "steps", "eval_steps": 1}, "eval_split or eval_holdout"),
    "two eval sources": ({"eval_holdout": 2, "eval_split": "test"}, "keep one"),
    "classes without source": ({"guidance_classes": ["math"]}, "guidance_column or guidance_class"),
    "class without classes": ({"guidance_class": "math"}, "guidance_classes"),
    "foreign class": ({"guidance_classes": ["math"], "guidance_class": "code"}, "'code'"),
    "corruption rate": ({"corruption_rate": 1.5}, "corruption_rate=1.5"),
    "rate of easy targets": ({"easy_target_rate": -0.1}, "easy_target_rate=-0.1 must be a probability"),
    "share of no corruption": ({"corruption_base_share": 0.2}, "set corruption_rate too"),
    "corrupted rollout": ({"corruption_rate": 0.3, "rollout_evaluations": 8}, "corruption_rate=0.3 changes the tokens"),
    "window without rollout": ({"rollout_window": 4}, "set rollout_evaluations too"),
    "window too long": ({"rollout_window": 9, "rollout_evaluations": 8}, "at most rollout_evaluations=8"),
    "no rollout": ({"rollout_evaluations": 0}, "rollout_evaluations=0"),
    "rollout at chosen times": ({"rollout_evaluations": 8, "time_power": 2.0}, "time_power=2.0"),
    "carried nowhere": ({"carried_state": True}, "set rollout_evaluations"),
    "carried without noise": ({"carried_state": True, "noise_free": True}, "evaluated once"),
    "corrupted without noise": ({"noise_free": True, "corruption_rate": 0.3}, "corruption_rate=0.3 has no effect"),
    "draws without noise": ({"noise_free": True, "draws": 4}, "draws=4 has no effect"),
    "budget without noise": ({"noise_free": True, "eval_budgets": [15], "eval_holdout": 2}, "use diffusion_budget=2"),
    "options of a baseline": ({"method": "lora_sft", "rollout_evaluations": 8}, "ignored by method lora_sft"),
    "logger that is not there": ({"report_to": "flyte"}, "report_to=flyte cannot be followed"),
    "compiler": ({"torch_compile": True, "torch_compile_backend": "gcc"}, "torch_compile_backend='gcc'"),
    "compiler's mode": ({"torch_compile_mode": "max-autotune"}, "torch_compile_mode=max-autotune"),
    "half precision on a CPU": ({"fp16": True}, "fp16=True would be ignored on a CPU"),
    "best of nothing": ({"load_best_model_at_end": True}, "load_best_model_at_end would be ignored"),
    "best by nothing": ({**BEST, "metric_for_best_model": "acc"}, "metric_for_best_model='acc' is not measured"),
    "best by another budget": (
        {**BEST, "metric_for_best_model": "accuracy_budget_3", "eval_budgets": [7]},
        "accuracy, accuracy_budget_7",
    ),
    "two batch sizes": ({"auto_find_batch_size": True, "total_batch_size": 8}, "keep one of them"),
    "split batches": ({"accelerator_config": {"split_batches": True}, "total_batch_size": 8}, "splits batches"),
    "accelerator": ({"accelerator_config": {"splitbatches": True}}, "accelerator_config='splitbatches'"),
    "nothing to resume": ({"save_only_model": True, "resume_from_checkpoint": "auto"}, "save_only_model"),
    "labels": ({"label_names": ["answer"]}, "label_names would be ignored"),
    "predictions": ({"include_for_metrics": ["loss"]}, "include_for_metrics would be ignored"),
    "another SIGTERM": ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint would be ignored"),
    "strategy of no packing": ({"packing_strategy": "wrapped"}, "packing_strategy would be ignored: set packing too"),
    "dropout of no class": ({"guidance_dropout": 0.1}, "guidance_dropout would be ignored: set guidance_classes"),
    "tokens of no sample": ({"eval_sample_tokens": 9}, "eval_sample_tokens would be ignored"),
    "workers of nothing": ({"dataloader_persistent_workers": True}, "set dataloader_num_workers too"),
    "revision of a folder": ({"base_revision": "main"}, "base_revision='main' means nothing for a folder"),
    "batch larger than the data": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
        "leaves nothing of 12 examples",
    ),
    "sampler": ({"sampler": {"budget": 4}}, "diffusion_budget=4"),
    "sampler name": ({"sampler": {"bugdet": 3}}, "did you mean 'budget'"),
}


@pytest.mark.parametrize("settings, words", REFUSED.values(), ids=REFUSED)
def test_refused(recipe, capsys, settings, words):
    with pytest.raises(SystemExit) as exit:
        train_here(recipe(**settings))
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


OF_OTHERS = {
    "optimizer's words": ({"optim_args": "foo"}, "optim_args=foo"),
    "optimizer's value": ({"optim": "sgd", "optim_args": "momentum=a"}, "optim=sgd, optim_args=momentum=a"),
    "optimizer that is not there": ({"optim": "lomo"}, "optim=lomo"),
    "schedule's unknown": ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs={'foo': 1}"),
    "schedule without its end": ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    "schedule of words": ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "a"}}, "'power': 'a'"),
}


@pytest.mark.parametrize("settings, words", OF_OTHERS.values(), ids=OF_OTHERS)
def test_what_optimizers_and_schedules_refuse_ends_in_a_sentence(recipe, capsys, settings, words):
    """They are asked when they are made; no model is left."""
    path = recipe(**settings)
    with pytest.raises(SystemExit) as exit:
        train_here(path)
    error = capsys.readouterr().err
    assert exit.value.code == 1 and words in error and "cannot be followed" in error
    assert not (path.parent / "out" / "model.safetensors").exists()


def test_null_takes_an_option_back(recipe, tmp_path):
    """On the command line and in YAML; not where null is a value of its own."""
    lora = str(recipe(variant="lora", lora_rank=4, lora_alpha=8.0, eval_budgets=[3], eval_holdout=2))
    read = read_recipe(["--config", lora, "--variant", "full", "--lora_rank", "null", "--lora-alpha=null"])
    assert not {"lora_rank", "lora_alpha"} & read.settings.keys() and read.model.variant == "full"
    path = ["--variant", "--diffusion_dim", "--input_width", "--conditioning_width", "--frequency_width", "--noise_std"]
    nulls = [word for name in [*path, "--eval_budgets"] for word in (name, "null")]
    read = read_recipe(["--config", lora, *nulls, "--method", "lora_sft"])
    assert read.model.method == "lora_sft" and read.model.lora_rank == 4 and read.training.eval_budgets is None
    with pytest.raises(ValueError, match="lora_alpha, lora_rank would be ignored.*which --lora_alpha null does"):
        read_recipe(["--config", lora, "--variant", "full"])
    for name in (["--dataset", "null"], ["--dataset=null"]):
        with pytest.raises(ValueError, match="dataset is not set"):
            read_recipe(["--config", lora, *name])
    with pytest.raises(ValueError, match="'lora_rnk'.*did you mean 'lora_rank'"):
        read_recipe(["--config", lora, "--lora_rnk", "null"])
    with pytest.raises(ValueError, match="--draws is set and reset: keep one"):
        read_recipe(["--config", lora, "--draws", "null", "--draws", "2"])
    child = tmp_path / "child.yaml"
    child.write_text("extends: recipe.yaml\nvariant: full\nlora_rank: null\nlora_alpha: null\nmax_steps: null\n")
    read = read_recipe(["--config", str(child)])
    assert read.model.variant == "full" and read.training.max_steps == -1
    for given in (["--config", lora, "--ddp_find_unused_parameters", "null"], ["--config", str(child)]):
        child.write_text("extends: recipe.yaml\nddp_find_unused_parameters: null\n")
        read = read_recipe(given)
        assert read.training.ddp_find_unused_parameters is None
        assert read.settings["ddp_find_unused_parameters"] is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config=recipe.yaml"], "--config recipe.yaml"),
        (["--config", "nowhere.yaml"], "does not exist"),
        (["--config"], "one recipe file"),
        (["--config", "RECIPE", "--draw", "3"], "did you mean 'draws'"),
        (["--config", "RECIPE", "stray"], "stray"),
        (["--config", "RECIPE", "--draws", "many"], "draws"),
    ],
)
def test_refused_on_the_command_line(recipe, arguments, words):
    path = str(recipe())
    with pytest.raises(ValueError, match=words):
        read_recipe([path if word == "RECIPE" else word for word in arguments])


def test_what_optimizers_and_schedules_take(recipe):
    """Nothing that can be followed is refused."""
    for settings in (
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}},
        {"lr_scheduler_type": "cosine"},
        {"optim": "adafactor", "report_to": "tensorboard"},
        {**BEST, "metric_for_best_model": "accuracy_budget_3", "eval_budgets": [3]},
    ):
        read_recipe(["--config", str(recipe(**settings))])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "push_to_hub=True needs a token: run hf auth login"),
        ({"hub_token": "hf_x", "hub_model_id": "a/b/c"}, "hub_model_id='a/b/c' cannot be.*OWNER/NAME"),
        ({"hub_token": "hf_x", "hub_model_id": "my model"}, "hub_model_id='my model'"),
        ({"hub_token": "hf_x", "output_dir": "runs/my model"}, "name of output_dir, 'my model', cannot be"),
    ],
)
def test_what_can_never_be_pushed_is_refused_at_once(recipe, monkeypatch, settings, words):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("training.checks.get_token", lambda: None)
    with pytest.raises(ValueError, match=words):
        read_recipe(["--config", str(recipe(push_to_hub=True, **settings))])
    read_recipe(["--config", str(recipe(push_to_hub=True, **settings)), "--dry_run", "true"])


def test_pushing_needs_a_token_a_name_and_a_hub(recipe, monkeypatch):
    path = str(recipe(push_to_hub=True, hub_model_id="someone/model"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("training.checks.get_token", lambda: "hf_x")
    read_recipe(["--config", path])
    read_recipe(["--config", str(recipe(push_to_hub=True))])  # by the name of output_dir
    monkeypatch.setattr("training.checks.get_token", lambda: None)
    monkeypatch.setattr("training.checks.RANK", 1)
    read_recipe(["--config", path])  # another process, which sends nothing
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="push_to_hub=True reaches no hub while HF_HUB_OFFLINE is set"):
        read_recipe(["--config", path])


def test_dry_runs_need_no_logger_and_no_optimizer(recipe):
    path = str(recipe(report_to="flyte", optim="schedule_free_radam"))
    read_recipe(["--config", path, "--dry_run", "true"])
    with pytest.raises(ValueError, match="report_to=flyte.*; install what it needs, or set report_to: none"):
        read_recipe(["--config", path, "--optim", "adamw_torch"])


@pytest.mark.parametrize(
    ("metric", "greater"), [("loss", False), ("loss_t_0.00_0.25", False), ("accuracy", True), ("eval_loss", False)]
)
def test_the_best_loss_is_the_lowest(recipe, metric, greater):
    read = read_recipe(["--config", str(recipe(**BEST, metric_for_best_model=metric))])
    assert read.training.greater_is_better is greater


def test_without_a_base_or_data_set_nothing_is_looked_up():
    """Of recipes both are asked for when they are read; here it is the parts, used by themselves."""
    with pytest.raises(ValueError, match="base is not set: give a folder"):
        load_tokenizer(ModelArguments(), L2DTrainingConfig())
    with pytest.raises(ValueError, match="dataset is not set: give a folder"):
        load_split("dataset", DataArguments())


@pytest.mark.parametrize(
    ("settings", "on"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"activation_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
    ],
)
def test_checkpointing_goes_by_either_name_and_without_a_warning(tmp_path, recwarn, settings, on):
    made = L2DTrainingConfig(output_dir=str(tmp_path), **settings)
    assert made.activation_checkpointing is made.gradient_checkpointing is on
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_twice_or_no_mapping(recipe, tmp_path):
    path = recipe()
    path.write_text(path.read_text() + "draws: 1\ndraws: 2\n")
    with pytest.raises(ValueError, match="'draws' is set twice"):
        read_recipe(["--config", str(path)])
    path.write_text("- draws\n")
    with pytest.raises(ValueError, match="mapping"):
        read_recipe(["--config", str(path)])


def test_exit_status_and_one_line(recipe):
    """The user sees one line, and no weights are read."""
    done = train_in_process(["--config", str(recipe(base="no/such-model"))])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: base='no/such-model'")
    assert "Traceback" not in done.stderr and "Loading weights" not in done.stderr
