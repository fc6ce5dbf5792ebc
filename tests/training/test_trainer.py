"""The loss, its normalisation, and evaluation. `python -m pytest tests/training/test_trainer.py`"""

import datasets
import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from l2d import L2DConfig, L2DForCausalLM
from l2d.network.diffusion_path import NoisedTargets, PathInputs
from tests.conftest import randomise_path
from tests.training_runs import same_bits, sums
from training.config import L2DTrainingConfig
from training.data.ready import encode
from training.draws import keyed_generator, split_targets
from training.planning import estimates
from training.trainer import (
    L2DTrainer,
    classes_at,
    metrics_by_bin,
    response_positions,
    sums_by_bin,
)


@pytest.fixture
def make_trainer(base_dir, tokenizer, tmp_path):
    """`make_trainer(classes, variant, count, carried_state, **settings)`: a trainer with a path that matters."""

    def make(classes=None, variant="full", count=8, carried_state=False, **settings):
        shape = dict(diffusion_dim=8, input_width=8, conditioning_width=8, frequency_width=8, noise_std=2.0)
        torch.manual_seed(0)
        config = L2DConfig(variant=variant, guidance_classes=classes, carried_state=carried_state, **shape)
        model = L2DForCausalLM.from_base(str(base_dir), config, dtype=torch.float32)
        randomise_path(model)
        defaults = {"activation_checkpointing": False, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
        args = L2DTrainingConfig(output_dir=str(tmp_path / "out"), **{**defaults, **settings})
        rows = datasets.Dataset.from_list(sums(count))
        if classes:
            rows = rows.add_column("guidance_class", [i % (len(classes) + 1) for i in range(count)])
        encoded, _ = encode(rows, tokenizer, args, 128, "train")
        return L2DTrainer(
            model=model, args=args, train_dataset=encoded, eval_dataset=encoded, processing_class=tokenizer
        )

    return make


def batch_of(trainer, rows) -> dict[str, torch.Tensor]:
    """A padded batch of some training rows."""
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


def fix_noise(trainer) -> None:
    """Training draws what evaluation would: a function of the example alone."""
    trainer._draw = lambda inputs, index, targets: trainer.evaluation_targets(inputs)


def test_response_positions():
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7], [9, 8, -100, -100, -100, -100], [-100] * 6])
    index, targets = response_positions(labels)
    assert index.tolist() == [[1, 2, 4], [0, -1, -1], [-1, -1, -1]]
    assert targets.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_loss_equals_all_positions_by_hand(make_trainer, variant):
    """Query everywhere, one draw at a time, and average the targets' cross-entropies."""
    trainer = make_trainer(variant=variant, draws=3, eval_draws=3, time_power=2.0)
    model, batch = trainer.model, batch_of(trainer, range(4))
    fix_noise(trainer)
    loss = trainer.compute_loss(model, batch, num_items_in_batch=None)
    noised = trainer.evaluation_targets(batch)
    rows, length = batch["input_ids"].shape
    state = model.paths.main_path(batch["input_ids"], batch["attention_mask"])
    losses = []
    for draw in range(3):
        x, time = torch.randn(rows, length, 8), torch.rand(rows, length)  # elsewhere: anything
        for row in range(rows):
            for slot, position in enumerate(noised.index[row].tolist()):
                if position >= 0:
                    t = noised.time[draw, row, slot]
                    clean = model.paths.vocabulary_table()[noised.targets[row, slot]]
                    x[row, position] = (1 - t) * 2.0 * noised.noise[draw, row, slot] + t * clean
                    time[row, position] = t
        everywhere = torch.arange(length).expand(rows, -1)
        logits = model.paths.path_logits(state, PathInputs(everywhere, x, time))
        losses.append(cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def gradients(trainer, batches) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradient of accumulated batches."""
    trainer.model.zero_grad()
    _, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=items) for batch in batches]
    sum(losses).backward()
    trained = [(name, p) for name, p in trainer.model.trained_parameters() if p.requires_grad]
    return sum(losses).item(), {name: p.grad.clone() for name, p in trained}


def test_accumulation_changes_nothing(make_trainer):
    """1 x 8, 2 x 4 and 4 x 2 examples of unequal lengths: the same loss and gradient."""
    trainer = make_trainer(draws=2, eval_draws=2)
    fix_noise(trainer)
    whole, expected = gradients(trainer, [batch_of(trainer, range(8))])
    for size in (4, 2):
        split = [batch_of(trainer, range(start, start + size)) for start in range(0, 8, size)]
        loss, found = gradients(trainer, split)
        assert loss == pytest.approx(whole, abs=2e-6)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


@pytest.mark.parametrize("most", [3, 17, 40, 1000])
def test_pieces_change_nothing(make_trainer, most):
    """However many evaluations go through the path at a time: the same loss, gradients and metrics."""
    found = []
    for limit in (10**6, most):
        trainer = make_trainer(classes=["math"], draws=3, eval_draws=3, max_evaluations_per_pass=limit)
        fix_noise(trainer)
        trainer.model.zero_grad()
        batch = batch_of(trainer, range(4))
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(30))
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in trainer.model.trained_parameters()}
        found.append((loss.detach(), gradient, trainer._sums.clone()))
    pieces = split_targets(trainer.evaluation_targets(batch), most)
    assert all((piece.index >= 0).sum() * piece.time.shape[0] <= most for piece in pieces)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-6, atol=1e-6)


def flat(noised: NoisedTargets, lengths: list[int]) -> NoisedTargets:
    """The same targets for examples that stand one after the other in a single row."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    rows, slots = torch.nonzero(noised.index >= 0, as_tuple=True)
    index = (noised.index + starts[:, None])[rows, slots][None]
    classes = None if noised.classes is None else noised.classes[:, rows, slots][:, None]
    time, noise = noised.time[:, rows, slots][:, None], noised.noise[:, rows, slots][:, None]
    return NoisedTargets(index, noised.targets[rows, slots][None], time, noise, classes)


def test_padding_free_equals_padded(make_trainer):
    """Examples one after the other in a row: the same losses, classes included, and evaluation stays padded."""
    padded = make_trainer(classes=["math", "code"], eval_draws=2)
    free = make_trainer(classes=["math", "code"], eval_draws=2, padding_free=True, max_length=None)
    batch, row = batch_of(padded, range(5)), batch_of(free, range(5))
    lengths = [len(padded.train_dataset[number]["input_ids"]) for number in range(5)]
    assert row["input_ids"].shape == (1, sum(lengths)) and "attention_mask" not in row
    noised = padded.evaluation_targets(batch)
    index, targets = response_positions(row["labels"])
    joined = flat(noised, lengths)
    assert torch.equal(index, joined.index) and torch.equal(targets, joined.targets)
    assert torch.equal(classes_at(row["guidance_class"], index)[0], joined.classes[0, 0])
    expected = padded.model(batch["input_ids"], batch["attention_mask"], noised_targets=noised)
    found = padded.model(row["input_ids"], position_ids=row["position_ids"], noised_targets=joined)
    torch.testing.assert_close(found.nll[:, 0], expected.nll[:, expected.valid], rtol=1e-5, atol=1e-5)
    metrics = [{k: v for k, v in t.evaluate().items() if "loss" in k or "accuracy" in k} for t in (padded, free)]
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-6)
    free._draw(row, index, targets)


def test_items_are_the_targets(make_trainer):
    trainer = make_trainer()
    batch = batch_of(trainer, range(8))
    _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    assert items == (response_positions(batch["labels"])[0] >= 0).sum()


def test_only_the_path_is_trained(make_trainer):
    trainer = make_trainer(learning_rate=0.01, report_to="none")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trained = {name for name, _ in trainer.model.trained_parameters()}
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= trained
    assert all(p.requires_grad == (name in trained) for name, p in trainer.model.named_parameters())
    # w's last bias cancels in w(t) - w(0); everything else has a gradient
    assert {name for name in trained - changed} <= {"path.output_modulation.2.bias"}


def test_rows_without_responses_are_harmless(make_trainer):
    trainer = make_trainer(eval_draws=1)
    fix_noise(trainer)
    batch = batch_of(trainer, range(2))
    expected = trainer.compute_loss(trainer.model, batch_of(trainer, [0]), num_items_in_batch=torch.tensor(5))
    batch["labels"][1] = -100
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_draws(make_trainer):
    trainer = make_trainer(classes=["math", "code"], draws=40, time_power=3.0, guidance_dropout=0.2)
    batch = batch_of(trainer, [0, 1, 2] * 40)
    noised = trainer._draw(batch, *response_positions(batch["labels"]))
    valid = (noised.index >= 0).expand_as(noised.time)
    times, classes = noised.time[valid], noised.classes
    assert noised.noise.shape == (*noised.time.shape, 8)
    assert times.min() >= 0 and times.max() < 1 and times.mean() == pytest.approx(1 / 4, abs=0.01)  # E[u^3]
    assert noised.noise.std() == pytest.approx(1, abs=0.01)
    assert (classes[:, 2::3] == 2).all()  # an example of no class stays so
    for row, name in ((0, 0), (1, 1)):
        drawn = classes[:, row::3][valid[:, row::3]]
        assert set(drawn.tolist()) == {name, 2}
        assert (drawn == 2).double().mean() == pytest.approx(0.2, abs=0.02)


def test_noise_is_never_repeated(make_trainer):
    """Other batches, steps, processes and seeds: other noise; the same key: the same."""
    trainer = make_trainer()
    batch = batch_of(trainer, range(2))
    drawn = []
    for step in (0, 0, 1, 1, 2):
        trainer.state.global_step = step
        drawn.append(trainer._draw(batch, *response_positions(batch["labels"])).noise[0, 0, 0, 0].item())
    first = [torch.randn(1, generator=keyed_generator(*key)).item() for key in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert len(set(drawn)) == 5 and len(set(first)) == 3 and first[0] == first[3]


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_checkpointing_changes_nothing(make_trainer, variant):
    """Recomputed activations (TRL's default) give the same gradients."""
    found = []
    for on in (False, True):
        trainer = make_trainer(variant=variant, activation_checkpointing=on, learning_rate=0.01, report_to="none")
        trainer.train()
        found.append({name: p.detach().clone() for name, p in trainer.model.trained_parameters()})
    assert trainer.model.is_activation_checkpointing
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "memory", "on"),
    [({}, 1 << 40, False), ({}, 1 << 20, True), ({"activation_checkpointing": True}, 1 << 40, True),
     ({"gradient_checkpointing": True}, 1 << 40, True)],
)  # fmt: skip
def test_a_trainer_keeps_activations_where_memory_is_plenty_unless_it_is_told(
    make_trainer, monkeypatch, capsys, settings, memory, on
):
    monkeypatch.setattr(estimates, "memory_of", lambda device: memory)
    trainer = make_trainer(**{"activation_checkpointing": None, **settings})
    assert trainer.args.activation_checkpointing is trainer.args.gradient_checkpointing is on
    assert ("activation checkpointing is off" in capsys.readouterr().out) == (not on)


def test_evaluation_does_not_depend_on_batches(make_trainer):
    """Batches of 1, 3 and 8, in another order, after other noise: the same loss, and the random stream stays."""
    trainer = make_trainer(eval_draws=4, report_to="none")
    found = []
    for size, order in ((1, range(8)), (3, range(8)), (8, range(7, -1, -1))):
        trainer.args.per_device_eval_batch_size = size
        state = torch.random.get_rng_state()
        metrics = trainer.evaluate(trainer.eval_dataset.select(order))
        assert torch.equal(state, torch.random.get_rng_state())
        found.append({name: value for name, value in metrics.items() if "loss" in name or "accuracy" in name})
        torch.rand(3)
    assert set(found[0]) == {"eval_loss", "eval_accuracy"} | {
        f"eval_{what}_t_{low:.2f}_{low + 0.25:.2f}" for what in ("loss", "accuracy") for low in (0.0, 0.25, 0.5, 0.75)
    }
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-6)


def test_evaluation_by_hand(make_trainer):
    """The whole is the mean over targets and draws; the bins add up to it."""
    trainer = make_trainer(eval_draws=2, time_bins=3, report_to="none")
    batch = batch_of(trainer, range(8))
    noised = trainer.evaluation_targets(batch)
    output = trainer.model(batch["input_ids"], batch["attention_mask"], noised_targets=noised)
    metrics = trainer.evaluate()
    count = output.valid.sum() * 2
    assert metrics["eval_loss"] == pytest.approx((output.nll.sum() / count).item(), abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((output.correct.sum() / count).item(), abs=1e-6)
    middle = (noised.time >= 1 / 3) & (noised.time < 2 / 3) & output.valid
    assert metrics["eval_loss_t_0.33_0.67"] == pytest.approx(output.nll[middle].mean().item(), abs=1e-5)


def test_accuracy_at_budgets(make_trainer):
    """At budget 1 it is the base's own accuracy; the path matters at others; the random stream stays."""
    trainer = make_trainer(eval_budgets=[1, 3, 15], eval_budget_examples=5, report_to="none")
    state = torch.random.get_rng_state()
    metrics = trainer.evaluate()
    assert torch.equal(state, torch.random.get_rng_state())
    hits = count = 0
    for row in trainer.eval_dataset.select(range(5)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        chosen = trainer.model.base(ids).logits.argmax(-1)[:, :-1]
        hits += (chosen == labels[:, 1:]).sum().item()
        count += (labels[:, 1:] != -100).sum().item()
    assert metrics["eval_accuracy_budget_1"] == pytest.approx(hits / count, abs=1e-9)
    assert {f"eval_accuracy_budget_{budget}" for budget in (1, 3, 15)} <= metrics.keys()
    again = trainer.evaluate()
    assert all(again[name] == metrics[name] for name in metrics if "budget" in name)


def test_sums_by_bin():
    class Output:
        nll = torch.tensor([[[1.0, 2.0]], [[4.0, 0.0]]])
        correct = torch.tensor([[[True, False]], [[True, True]]])
        valid = torch.tensor([[True, False]])

    found = sums_by_bin(Output, torch.tensor([[[0.1, 0.2]], [[0.999, 1.0]]]), bins=2)
    assert found.tolist() == [[[1, 1, 1], [4, 1, 1]]] or found.tolist() == [[[3, 1, 1], [4, 1, 1]]]
    assert metrics_by_bin(torch.tensor([[2.0, 1.0, 4.0], [0.0, 0.0, 0.0]]), "eval_") == {
        "eval_accuracy": 0.25,
        "eval_loss_t_0.00_0.50": 0.5,
        "eval_accuracy_t_0.00_0.50": 0.25,
    }


def test_bfloat16_autocast(make_trainer):
    """Float32 weights under bf16 autocast (variant full): near the float32 loss, float32 gradients."""
    trainer = make_trainer(bf16=True, eval_draws=2, draws=2)
    fix_noise(trainer)
    batch = batch_of(trainer, range(8))
    plain = trainer.compute_loss(trainer.model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=0.02)
    assert all(p.dtype == p.grad.dtype == torch.float32 for _, p in trainer.model.trained_parameters())
    trainer.args.max_steps, trainer.args.max_evaluations_per_pass = 2, 5
    assert trainer.train().training_loss > 0


def test_ignored_arguments_are_refused(make_trainer):
    trainer = make_trainer()
    common = dict(model=trainer.model, args=trainer.args, train_dataset=trainer.train_dataset)
    with pytest.raises(ValueError, match="peft_config has no effect"):
        L2DTrainer(**common, peft_config=LoraConfig())
    with pytest.raises(ValueError, match="compute_metrics has no effect"):
        L2DTrainer(**common, compute_metrics=lambda prediction: {})
    trainer.args.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1"):
        L2DTrainer(**common)


def test_times_respect_min_noise(make_trainer):
    trainer = make_trainer()
    trainer.model.config.min_noise = 0.25
    batch = batch_of(trainer, range(8))
    noised: NoisedTargets = trainer._draw(batch, *response_positions(batch["labels"]))
    assert noised.time.max() <= 0.75


def test_resumes_from_python_as_trainers_do(make_trainer, tmp_path):
    """`train(resume_from_checkpoint=True)` goes on from the newest checkpoint, and ends where the first run did."""
    whole = make_trainer(save_strategy="steps", save_steps=1)
    whole.train()
    (tmp_path / "out" / "checkpoint-2").rename(tmp_path / "last")
    again = make_trainer(save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert again.resumed_from == str(tmp_path / "out" / "checkpoint-1")
    assert same_bits(dict(whole.model.trained_parameters()), dict(again.model.trained_parameters()))
    (tmp_path / "out" / "checkpoint-1" / "optimizer.pt").unlink()
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="needs a complete checkpoint .*lacks optimizer.pt"):
        again.train(resume_from_checkpoint=True)


def test_parts_of_another_kind_are_refused(make_trainer, base_dir, tokenizer):
    made = make_trainer()
    given = dict(model=made.model, args=made.args, train_dataset=made.train_dataset, processing_class=tokenizer)
    for name, other in (
        ("model", str(base_dir)),
        ("args", SFTConfig(report_to="none", use_cpu=True)),
        ("processing_class", None),
    ):
        with pytest.raises(ValueError, match=f"^{name} is"):
            L2DTrainer(**{**given, name: other})


def test_a_base_on_several_devices_says_so_of_the_whole_model(base_dir, tmp_path, tokenizer):
    """As transformers does of its own models: a trainer would otherwise move all of it to one device."""
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    assert not hasattr(L2DForCausalLM.from_base(base), "hf_device_map")
    base.hf_device_map = {"model.embed_tokens": 0, "lm_head": 1}
    model = L2DForCausalLM.from_base(base)
    assert model.hf_device_map == {"base.model.embed_tokens": 0, "base.lm_head": 1}
    args = L2DTrainingConfig(output_dir=str(tmp_path), use_cpu=True)
    rows = datasets.Dataset.from_list([{"text": "The cat sat."}])
    trainer = L2DTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.is_model_parallel
    trainer.save_model(str(tmp_path / "out"))
    L2DForCausalLM.from_pretrained(tmp_path / "out", base=base_dir)
