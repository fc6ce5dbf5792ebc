"""`L2DTrainer` from Python keeps what its configuration says. `python -m pytest tests/training/test_trainer_data.py`"""

import datasets
import pytest

from l2d import L2DConfig, L2DForCausalLM
from tests.training_runs import same_bits, sums
from training.config import L2DTrainingConfig
from training.trainer import L2DTrainer

TALK = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": "9 cats"},
]
ROWS = [{"messages": TALK}] * 6


@pytest.fixture
def make(base_dir, tokenizer, tmp_path):
    """`make(rows, evaluation, tokenizer=..., **settings)`: a trainer as the README makes one."""

    def build(rows=ROWS, evaluation=None, processing_class=tokenizer, **settings):
        shape = dict(diffusion_dim=8, input_width=8, conditioning_width=8, frequency_width=8)
        model = L2DForCausalLM.from_base(str(base_dir), L2DConfig(variant="full", **shape))
        fixed = {"report_to": "none", "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
        args = L2DTrainingConfig(**{"output_dir": str(tmp_path / "out"), **fixed, **settings})
        data = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
        trainer = L2DTrainer(
            model, args, train_dataset=data, eval_dataset=evaluation, processing_class=processing_class
        )
        trainer.given = args
        return trainer

    return build


def targets(trainer, tokenizer, row=0) -> str:
    """The text of what is trained on."""
    return tokenizer.decode([label for label in trainer.train_dataset[row]["labels"] if label != -100])


def test_messages_train_the_assistants_turns(make, tokenizer):
    assert targets(make(), tokenizer) == "5</s>9 cats</s>"
    everything = targets(make(assistant_only_loss=False), tokenizer)
    assert "What is 2 + 3?" in everything and "9 cats</s>" in everything


def test_what_is_given_stays_unchanged(make, tokenizer):
    trainer = make(max_length=100)
    assert trainer.given.max_length == 100 and trainer.given.assistant_only_loss is None
    assert trainer.processing_class is not tokenizer and trainer.args is not trainer.given


@pytest.mark.parametrize("tokenized", [False, True])
def test_examples_that_are_too_long(make, tokenizer, tokenized):
    """An error unless something else is said; nothing is cut silently."""
    rows = [*sums(2), {"prompt": "Q", "completion": " 7" * 50}]
    if tokenized:
        ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
        rows = [{"input_ids": tokens, "labels": tokens} for tokens in ids]
    with pytest.raises(ValueError, match="example 3 has (more than|.* tokens, more than) max_length=40"):
        make(rows, max_length=40)
    assert len(make(rows, max_length=40, too_long="drop").train_dataset) == 2
    cut = make(rows, max_length=40, too_long="truncate").train_dataset
    assert [len(row["input_ids"]) for row in cut][2] == 40 == len(cut[2]["labels"])
    with pytest.raises(ValueError, match="max_length=5000 is more than base=.* takes: use at most 4096"):
        make(rows, max_length=5000)


def test_batches_and_the_date(make, tokenizer):
    assert make(total_batch_size=12, per_device_train_batch_size=3).args.gradient_accumulation_steps == 4
    with pytest.raises(ValueError, match="total_batch_size=10 is not divisible by 3"):
        make(total_batch_size=10, per_device_train_batch_size=3)
    with pytest.raises(ValueError, match="the chat template uses no date_string"):
        make(chat_template_date="26 Jul 2024")
    tokenizer.chat_template, kept = "{{ date_string }}" + tokenizer.chat_template, tokenizer.chat_template
    try:
        trainer = make(chat_template_date="26 Jul 2024")
    finally:
        tokenizer.chat_template = kept
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("26 Jul 2024")


def test_what_only_the_command_does_is_no_option(make):
    for name in ("dry_run", "dry_run_json", "dry_run_examples"):
        with pytest.raises(TypeError, match=name):
            make(**{name: True})
    for name, value in (("eval_packing", True), ("model_init_kwargs", {"dtype": "float32"})):
        with pytest.raises(ValueError, match=name):
            make(**{name: value})


def test_folders_are_neither_overwritten_nor_ignored(make, tmp_path):
    whole = make(save_strategy="steps", save_steps=1, max_steps=3)
    whole.train()
    (tmp_path / "out" / "checkpoint-3").rename(tmp_path / "last")
    with pytest.raises(ValueError, match="output_dir=.* already holds 'checkpoint-1'"):
        make().train()
    again = make(save_strategy="steps", save_steps=1, max_steps=3, resume_from_checkpoint="auto")
    again.train()
    assert again.began_at == 2
    assert same_bits(dict(whole.model.trained_parameters()), dict(again.model.trained_parameters()))
    fresh = make(overwrite_output_dir=True)
    fresh.train()
    assert fresh.began_at == 0 and not list((tmp_path / "out").glob("checkpoint-*"))
    fresh.train()  # what is there is its own
    elsewhere = make(resume_from_checkpoint="auto", output_dir=str(tmp_path / "new"))
    elsewhere.train()
    assert elsewhere.began_at == 0 and elsewhere.state.global_step == 2


def test_streams(make, tokenizer, tmp_path):
    """Evaluation data that stream give what they give when they are at hand, budgets and samples included."""
    rows = datasets.Dataset.from_list(ROWS)
    options = {"eval_budgets": [3], "eval_budget_examples": 2, "eval_samples": 1, "eval_sample_tokens": 2}
    found = []
    for evaluation in (rows, rows.to_iterable_dataset()):
        metrics = make(evaluation=evaluation, eval_strategy="steps", eval_steps=1, **options).evaluate()
        found.append({name: metrics[name] for name in ("eval_loss", "eval_accuracy", "eval_accuracy_budget_3")})
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    trainer = make(rows.to_iterable_dataset(), max_length=100, output_dir=str(tmp_path / "new"))
    assert targets_of(next(iter(trainer.train_dataset)), tokenizer) == "5</s>9 cats</s>"
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="example 1 has .* more than max_length=10"):
        next(iter(make(rows.to_iterable_dataset(), max_length=10).train_dataset))


def targets_of(row, tokenizer) -> str:
    """The text of what an encoded example trains."""
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_evaluation_of_other_data(make):
    """Data that are handed to `evaluate` are prepared like the others, also several by name."""
    rows = datasets.Dataset.from_list(ROWS)
    trainer = make(evaluation={"one": rows, "two": rows.select([0])})
    metrics = trainer.evaluate()
    assert metrics["eval_one_loss"] == pytest.approx(metrics["eval_two_loss"], abs=1e-6)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(metrics["eval_one_loss"], abs=1e-6)


def test_other_ways_to_name_texts(make, base_dir, tokenizer, tmp_path):
    """`dataset_text_field` and `formatting_func`, as `SFTTrainer` takes them."""
    trainer = make([{"words": "The cat sat."}], dataset_text_field="words")
    assert tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == "<s>The cat sat.</s>"
    model, args = trainer.model, L2DTrainingConfig(output_dir=str(tmp_path / "out"), report_to="none")
    data = datasets.Dataset.from_list(sums(1))
    formatted = L2DTrainer(
        model, args, train_dataset=data, processing_class=tokenizer, formatting_func=lambda row: row["completion"] + "!"
    )
    assert tokenizer.decode(formatted.train_dataset[0]["input_ids"]) == "<s> 0!</s>"
