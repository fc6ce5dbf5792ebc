"""Corrupted targets, rollouts, carried state and the noise-free path in whole runs: resuming, accumulation, processes.

Run: `python -m pytest tests/training/test_options.py`. The loss itself is in `test_objective.py`.
"""

import pytest
import torch

from l2d import L2DConfig, loss
from l2d.card.text import write_card
from tests.training.test_trainer import batch_of, gradients, make_trainer  # noqa: F401  a fixture among them
from tests.training_runs import (
    SMALL,
    draw_by_example,
    launch_two,
    logged,
    same_bits,
    same_gradients,
    sums,
    train_here,
    weights,
    write_jsonl,
    write_recipe,
)
from training.draws import training_targets
from training.trainer import L2DTrainer

ROLLOUT = {"rollout_evaluations": 3, "rollout_window": 2}
OPTIONS = {
    "corrupted": {"corruption_rate": 0.5, "draws": 2},
    "rollout": {**ROLLOUT, "draws": 2},
    "carried": {**ROLLOUT, "carried_state": True},
    "noise_free": {"noise_free": True},
    "easy": {"easy_target_rate": 0.3, "draws": 2},
    "own keys and values": {"own_keys_rank": 2, "own_values_rank": 4, "warm_start": True},
}
EASY = 0.0025  # what the random base of these tests gives to half of the targets
SAME_DRAWS = f"""
import sys
import l2d.loss
from tests.training_runs import draw_by_example
from training.train import main
from training.trainer import L2DTrainer

l2d.loss.EASY = {EASY}
L2DTrainer._draw = draw_by_example
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def easy(monkeypatch):
    monkeypatch.setattr(loss, "EASY", EASY)


@pytest.mark.parametrize("option", OPTIONS)
def test_resumed_equals_unbroken(tmp_path, base_dir, option):
    """From a checkpoint in the second epoch, with accumulation and evaluation: the same bits and the same curve."""
    settings = {**SMALL, **OPTIONS[option], "base": base_dir, "output_dir": tmp_path / "out"}
    settings |= {"dataset": write_jsonl(tmp_path / "data.jsonl", sums(20)), "eval_holdout": 4, "max_steps": 6}
    settings |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}
    path = write_recipe(tmp_path / "recipe.yaml", **settings)
    train_here(path)
    out = tmp_path / "out"
    whole, curves = weights(out), [logged(out, name) for name in ("loss", "eval_loss")]
    train_here(path, "--resume_from_checkpoint", str(out / "checkpoint-3"))
    assert same_bits(whole, weights(out))
    assert curves == [logged(out, name) for name in ("loss", "eval_loss")]
    assert len(curves[0]) == 6 and len(set(curves[0].values())) == 6
    assert not same_bits(whole, weights(out / "checkpoint-3"))


def option_trainer(make, option, **settings):
    """A trainer with that option; for draws by example the window is the whole rollout."""
    whole = {"rollout_window": 3} if "rollout_evaluations" in OPTIONS[option] else {}
    chosen = {name: value for name, value in OPTIONS[option].items() if name != "carried_state"}
    return make(carried_state=option == "carried", **{**chosen, **whole, **settings})


@pytest.mark.parametrize("option", ["corrupted", "rollout", "carried", "easy"])
def test_accumulation_changes_nothing(make_trainer, monkeypatch, option):  # noqa: F811
    """1 x 8, 2 x 4 and 4 x 2 examples of unequal lengths: the same loss and gradient."""
    monkeypatch.setattr(L2DTrainer, "_draw", draw_by_example)
    trainer = option_trainer(make_trainer, option)
    whole, expected = gradients(trainer, [batch_of(trainer, range(8))])
    for size in (4, 2):
        split = [batch_of(trainer, range(start, start + size)) for start in range(0, 8, size)]
        loss, found = gradients(trainer, split)
        assert loss == pytest.approx(whole, abs=2e-6)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


@pytest.mark.parametrize("option", ["corrupted", "rollout", "carried", "easy"])
def test_pieces_change_nothing(make_trainer, option):  # noqa: F811
    """However many evaluations go through the path at a time: the same loss, gradients and metrics."""
    found = []
    for limit in (10**6, 17, 3):
        chosen = {name: value for name, value in OPTIONS[option].items() if name != "carried_state"}
        trainer = make_trainer(carried_state=option == "carried", max_evaluations_per_pass=limit, **chosen)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(4)), num_items_in_batch=torch.tensor(30))
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in trainer.model.trained_parameters() if p.requires_grad}
        found.append((loss.detach(), gradient, trainer._sums.clone()))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other[1], found[0][1], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(other[2], found[0][2], rtol=1e-6, atol=1e-6)
    trained = found[0][2][:, 2].sum()
    everything = 2 * (batch_of(trainer, range(4))["labels"][:, 1:] != -100).sum()
    assert (0.4 * everything < trained < 0.9 * everything) if option == "easy" else trained >= everything / 2


@pytest.mark.parametrize("option", ["corrupted", "carried", "easy"])
def test_two_processes_equal_one(tmp_path, base_dir, monkeypatch, option):
    """2 x 2 examples x 2 accumulated steps and 1 x 8: the same losses and weights, given the same draws."""
    script = tmp_path / "same_draws.py"
    script.write_text(SAME_DRAWS)
    settings = {**SMALL, **OPTIONS[option], "base": base_dir, "max_evaluations_per_pass": 40}
    settings["dataset"] = write_jsonl(tmp_path / "data.jsonl", sums(24))
    if option == "carried":
        settings["rollout_window"] = 3
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "two"}
    two = write_recipe(tmp_path / "two.yaml", **settings | split)
    done = launch_two(["--config", str(two)], script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(L2DTrainer, "_draw", draw_by_example)
    whole = {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"}
    train_here(write_recipe(tmp_path / "one.yaml", **settings | whole))
    for name in ("loss", "accuracy"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), abs=2e-6)
    same_gradients(tmp_path / "two", tmp_path / "one")
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=5e-5)


def test_a_window_is_the_same_in_all_processes_and_moves(make_trainer):  # noqa: F811
    """Its place is drawn per step; noise and times differ between processes."""
    trainer, index = make_trainer(rollout_evaluations=6, rollout_window=2), torch.tensor([[2, 3], [4, -1]])
    places = []
    for step in range(12):
        first, second = (
            training_targets(trainer.model.config, trainer.args, index, index.clamp(min=0), None, (0, step, 0), process)
            for process in (0, 1)
        )
        assert first.unscored == second.unscored and len(first.time) == first.unscored + 2
        assert not torch.equal(first.noise, second.noise) and not torch.equal(first.time, second.time)
        places.append(first.unscored)
    assert set(places) <= set(range(5)) and len(set(places)) > 2


@pytest.mark.parametrize(
    ("recipe", "config", "sentence"),
    [
        ("corruption_rate: 0.3", {}, "of which a share of 0.3 was built from wrong tokens"),
        ("rollout_evaluations: 8", {"carried_state": True}, "trajectories of 8 evaluations. The path carries a state"),
        ("draws: 1", {"own_values_rank": 8}, "attention reads values of its own, by a change of rank 8"),
        ("draws: 1", {"own_keys_rank": 8}, "attention reads keys of its own, by a change of rank 8"),
        ("draws: 1", {"noise_free": True}, "A control: the path was trained without noise"),
        ("easy_target_rate: 0.1", {}, "to which the base gives .9 or more were trained on at a rate of 0.1"),
        (
            "easy_target_rate: 0.0",
            {"noise_free": True},
            "without noise and is evaluated once (`diffusion_budget=2,solver"
            "=euler`, its default). Targets to which the base gives .9 or more were trained on at a rate of 0.",
        ),
        ("easy_target_rate: null", {}, "## Recipe"),
        ("draws: 4", {}, "## Recipe"),
    ],
)
def test_the_card_tells_the_options(tmp_path, recipe, config, sentence):
    (tmp_path / "recipe.yaml").write_text(f"method: l2d\n{recipe}\n")
    L2DConfig(base_name_or_path="org/base", **config).save_pretrained(tmp_path)
    card = write_card(tmp_path, "name")
    assert sentence in card
    assert ("diffusion_budget=15" in card) == ("noise_free" not in config)
    assert ("Trained on" in card) == ("corruption" in recipe or "rollout" in recipe)
