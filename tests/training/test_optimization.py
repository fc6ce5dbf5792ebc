"""What the release does differently in an optimizer step. `python -m pytest tests/training/test_optimization.py`

- averages over examples: by hand, and however the batch is split; for baselines as well
- the logarithmic warm-up, at steps worked out by hand
- parameters without weight decay
"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.training.test_trainer import batch_of, fix_noise, gradients, make_trainer  # noqa: F401
from tests.training_runs import sums
from training.checkpointing.atomic import BaselineTrainer
from training.config import L2DTrainingConfig
from training.data.ready import encode
from training.optimization import first_targets, logarithmic_warmup


def test_first_targets():
    labels = torch.tensor([[5, -100, 6, 7], [-100, 8, 9, -100], [4, -100, -100, -100]])
    assert first_targets(labels).tolist() == [[-100, -100, 6, -100], [-100, 8, -100, -100], [-100] * 4]


def test_examples_weigh_the_same(make_trainer):  # noqa: F811
    """The mean over examples of each one's mean, however they are batched; targets weigh differently without it."""
    trainer = make_trainer(loss_average="example", draws=2, eval_draws=2)
    fix_noise(trainer)
    batch = batch_of(trainer, range(8))
    whole, expected = gradients(trainer, [batch])
    output = trainer.model(**{k: batch[k] for k in ("input_ids", "attention_mask")},
                           noised_targets=trainer.evaluation_targets(batch))  # fmt: skip
    counts = output.valid.sum(1)
    means = (output.nll * output.valid).sum((0, 2)) / (2 * counts)
    assert len(set(counts.tolist())) > 1 and whole == pytest.approx(means.mean().item(), abs=2e-6)
    by_target = (output.nll * output.valid).sum() / (2 * counts.sum())
    assert abs(by_target.item() - whole) > 1e-4
    for size in (4, 1):
        loss, found = gradients(trainer, [batch_of(trainer, range(n, n + size)) for n in range(0, 8, size)])
        assert loss == pytest.approx(whole, abs=2e-6)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("average", ["example", "token"])
def test_baselines_average_alike(base_dir, tokenizer, tmp_path, average):
    args = L2DTrainingConfig(
        output_dir=str(tmp_path), loss_average=average, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        activation_checkpointing=False, report_to="none",
    )  # fmt: skip
    import datasets

    encoded, _ = encode(datasets.Dataset.from_list(sums(4)), tokenizer, args, 128, "train")
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    trainer = BaselineTrainer(model=base, args=args, train_dataset=encoded, processing_class=tokenizer)
    batches = [batch_of(trainer, [row]) for row in range(4)]
    losses = []
    for batch in batches:
        logits = base(input_ids=batch["input_ids"]).logits[0, :-1]
        losses.append(cross_entropy(logits, batch["labels"][0, 1:], reduction="none", ignore_index=-100))
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    means = [loss.sum() / count for loss, count in zip(losses, counts, strict=True)]
    expected = sum(means) / 4 if average == "example" else sum(loss.sum() for loss in losses) / sum(counts)
    _, items = trainer.get_batch_samples(iter(batches), 4, trainer.args.device)
    loss = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=items) for batch in batches)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_logarithmic_warmup(make_trainer):  # noqa: F811
    """From 1e-6 with log(step + 1) / log(100) to 1e-4 after 100 steps, and linearly back to 1e-6 at step 1,100."""
    for step, rate in ((0, 1e-6), (9, 1e-6 + 0.5 * 99e-6), (99, 1e-4), (100, 1e-4), (600, 50.5e-6), (1100, 1e-6)):
        assert 1e-4 * logarithmic_warmup(step, 100, 1100, 0.01) == pytest.approx(rate, rel=1e-9)
    trainer = make_trainer(
        warmup_shape="logarithmic", warmup_steps=10, learning_rate=1e-2, max_steps=30, lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": 1e-3},
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(30)
    rates = []
    for _ in range(31):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == pytest.approx(1e-3) and rates[4] == pytest.approx(1e-3 + 9e-3 * math.log(5) / math.log(10))
    assert max(rates) == rates[10] == pytest.approx(1e-2) and rates[30] == pytest.approx(1e-3)


def test_weight_decay_exempt(make_trainer):  # noqa: F811
    trainer = make_trainer(weight_decay=0.1, weight_decay_exempt=["bias", "class_embedding"], classes=["math"])
    trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in trainer.optimizer.param_groups}
    trained = {name for name, _ in trainer.model.trained_parameters()}
    exempt = {name for name in trained if "bias" in name or "class_embedding" in name}
    assert exempt and groups == {0.0: exempt, 0.1: trained - exempt}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_average": "sequence"}, "loss_average='sequence' is not known"),
        ({"loss_average": "example", "padding_free": True}, "one example per row"),
        ({"loss_average": "example", "packing": True, "max_length": 64}, "one example per row"),
        ({"warmup_shape": "square"}, "warmup_shape='square' is not known"),
        ({"warmup_shape": "logarithmic", "lr_scheduler_type": "cosine"}, "lr_scheduler_type"),
        (
            {"warmup_shape": "logarithmic", "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
            "power=2.0 must be 1",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        L2DTrainingConfig(output_dir=str(tmp_path), **settings)
