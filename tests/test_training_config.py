"""Recipes: what is read, and what is refused in one sentence. `python -m pytest tests/test_training_config.py`"""

import pytest
import yaml

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
