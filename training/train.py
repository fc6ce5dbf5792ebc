"""Trains an L2D model, or one of the finetuning baselines, from a recipe.

    python -m training.train --config training/recipes/gsm8k_lora.yaml
    accelerate launch --config_file training/accelerate_configs/ddp.yaml -m training.train --config RECIPE.yaml

Options on the command line (`--learning_rate 3e-5`) override those of the recipe. What cannot be followed is refused
in one sentence with exit status 2, before the base is loaded; `--dry_run` shows what would be done and stops. A full
disk ends the run with one sentence and status 1; the checkpoints before it stay as they are.
What is left in `output_dir`:

- `l2d`: the trained tensors, for `L2DForCausalLM.from_pretrained` and `lm_eval --model l2d`
- `lora_sft`: the base with the deltas merged in, a plain checkpoint for `--model hf` (the adapter is in `adapter/`)
- `full_sft`: the finetuned base, a plain checkpoint
- always: tokenizer, `recipe.yaml`, `train_results.json`, `eval_results.json`, `all_results.json`, `checkpoint-*`
"""

import atexit
import contextlib
import dataclasses
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import yaml

from training.checkpointing.disk_errors import Disconnected, Interrupted, connected, writing
from training.checkpointing.resume import (
    check_output_dir,
    check_same_model,
    choose_checkpoint,
    saved_step,
)
from training.console import LOCAL_RANK, PROCESSES, RANK, end, say, show_log_lines
from training.recipe import Recipe, read_recipe


@dataclasses.dataclass
class Job:
    """Everything that training needs, checked, before any weights are loaded."""

    recipe: Recipe
    tokenizer: Any
    train: Any
    evaluation: Any
    checkpoint: str | None
    limit: int  # of an example, in tokens


def main(arguments: list[str] | None = None) -> None:
    """Run the command; user errors end with one line on standard error and exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with no_collection():
            recipe = read_recipe(sys.argv[1:] if arguments is None else arguments)
        if recipe.command.dry_run:
            from training.planning.dry_run import dry_run

            dry_run(recipe)
            return
        job = prepare(recipe)
        trainer = build_trainer(job)
        show_log_lines(trainer)
    except (ImportError, OSError, ValueError) as error:
        end(error, 2)
    from training.data.values import DataError

    try:
        with connected():
            run(trainer, job)
    except Disconnected as error:
        end(error, 1, by=LOCAL_RANK)
    except (Interrupted, DataError) as error:  # the latter where examples are read while training
        end(error, 1)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No looking for garbage: while libraries are imported there is none, and the search takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def prepare(recipe: Recipe) -> Job:
    """Check the folders, read and encode the data. Raises `ValueError`."""
    from training.data.options import named

    model, data, training = recipe.model, recipe.data, recipe.training
    base = named("base", model.base)
    check_output_dir(training.output_dir, training.resume_from_checkpoint, training.overwrite_output_dir, base)
    checkpoint, _ = choose_checkpoint(training.resume_from_checkpoint, training.output_dir, PROCESSES)
    config = base_config(recipe)

    from training.checks import longest_example
    from training.data.loading import load_examples
    from training.data.ready import encode, stream
    from training.data.tokenizer import base_of, generation_config, load_tokenizer

    limit = longest_example(config, base, training.max_length)
    with training.main_process_first(desc="preparing data"):
        tokenizer = load_tokenizer(model, training)
        facts = base_of(config, generation_config(model, config))
        train, evaluation = load_examples(data, model.guidance_classes, training.seed, training.dataset_num_proc)
        if evaluation is not None:
            evaluation, summary = encode(evaluation, tokenizer, training, limit, "eval", facts)
            say(summary)
        if data.streaming:
            train = stream(train, tokenizer, training, limit, "train", facts)
            return Job(recipe, tokenizer, train, evaluation, checkpoint, limit)
        train, summary = encode(train, tokenizer, training, limit, "train", facts)
        say(summary)
    say_expected(data, train, evaluation)
    at_once = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and not training.packing and len(train) < at_once:
        raise ValueError(
            f"dataloader_drop_last leaves nothing of {len(train)} examples, fewer than the {at_once} of a batch: leave "
            "it out, or lower per_device_train_batch_size."
        )
    return Job(recipe, tokenizer, train, evaluation, checkpoint, limit)


def say_expected(data: Any, train: Any, evaluation: Any) -> None:
    """Compare the numbers of examples with those that the recipe expects."""
    for expected, part, name in zip(data.expected_examples or [], (train, evaluation), ("train", "eval"), strict=False):
        if part is not None:
            same = "as expected" if len(part) == expected else f"{expected:,} were expected"
            say(f"{name}: {len(part):,} examples, {same}")


def base_config(recipe: Recipe) -> Any:
    """The base's configuration. Raises `ValueError`."""
    from l2d.checkpoint.bases import base_configuration
    from training.data.options import named

    model, training = recipe.model, recipe.training
    base = named("base", model.base)
    try:
        config = base_configuration(base, **model.base_options(), trust_remote_code=training.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"base={model.base!r} is neither a model's folder nor a model on the hub: {error}") from error
    if config.model_type == "l2d":
        raise ValueError(f"base={model.base!r} is an L2D checkpoint: name the model that it was trained on.")
    return config


def base_options(recipe: Recipe) -> dict[str, Any]:
    """How the base is loaded."""
    import torch

    model, training = recipe.model, recipe.training
    mixed = training.bf16 or training.fp16
    dtype = model.dtype or ("auto" if mixed and model.method != "full_sft" else "float32")
    if in_dtype_of_run(recipe):
        dtype = "bfloat16"
    options = {
        **model.base_options(),
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": training.trust_remote_code,
    }
    return {name: value for name, value in options.items() if value is not None}


def in_dtype_of_run(recipe: Recipe) -> bool:
    """Whether the base is loaded in bfloat16 because the run computes in it: autocast would cast float32 weights anew
    in every piece of a batch.
    """
    return recipe.model.method == "l2d" and bool(recipe.training.bf16) and recipe.model.dtype is None


def about_dtype(recipe: Recipe) -> Iterator[str]:
    """Lines about a base that is loaded in another dtype than it is stored in, and about a processor's slow dtype."""
    import torch

    from l2d.network.onednn import slow_dtype

    stored = getattr(base_config(recipe).get_text_config(), "dtype", None)
    if in_dtype_of_run(recipe) and stored not in (None, torch.bfloat16):
        yield (
            f"base: stored in {str(stored).removeprefix('torch.')}, loaded in bfloat16, in which the run computes "
            "(dtype: auto keeps it)"
        )
    if recipe.training.bf16 and slow_dtype(torch.bfloat16, recipe.training.device):
        yield "bf16: this processor has no instructions for it; bf16: false is several times as fast"


def build_trainer(job: Job) -> Any:
    """Load the base and wrap it in the trainer of the method."""
    from transformers import set_seed

    from l2d.checkpoint.bases import load_base
    from training.checkpointing.sharding import whole_loading
    from training.data.options import named

    model, training = job.recipe.model, job.recipe.training
    set_seed(training.seed)
    for line in about_dtype(job.recipe):
        say(line)
    options = base_options(job.recipe)
    common = {
        "args": training,
        "train_dataset": job.train,
        "eval_dataset": job.evaluation,
        "processing_class": job.tokenizer,
    }
    if model.method == "l2d":
        from l2d import L2DForCausalLM
        from training.trainer import L2DTrainer

        options |= model.quantization()
        with whole_loading(training):
            built = L2DForCausalLM.from_base(model.base, model.l2d_config(), **options)
        trainer = L2DTrainer(model=built, **common)
    else:
        with whole_loading(training):
            base = load_base(named("base", model.base), **options)
        from training.checkpointing.atomic import BaselineTrainer
        from training.data.ready import for_encoded_data

        common["args"] = for_encoded_data(training, job.limit)
        trainer = BaselineTrainer(model=base, peft_config=model.lora_config(), **common)
    if job.checkpoint is not None:
        check_same_model(job.checkpoint, trainer.model)
    return trainer


def run(trainer: Any, job: Job) -> None:
    """Train, evaluate, and leave the final model and its metrics in `output_dir`."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in trainer.model.parameters())
    say(f"{job.recipe.model.method}: {trained:,} trained parameters, {every - trained:,} frozen")
    with writing(job.recipe.training.output_dir):  # checkpoints, and what loggers write on the way
        metrics = trainer.train().metrics
    if trainer.stop.stopped:
        say(
            f"stopped by SIGTERM after step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved; "
            "run the same command with resume_from_checkpoint: auto to go on"
        )
    else:
        check_finite(trainer)
        with writing(job.recipe.training.output_dir):
            leave_results(trainer, job, metrics)
    finish(trainer)


def finish(trainer: Any) -> None:
    """End trackers and process groups; with FSDP also the process.

    Of some fifty sharded runs torch aborted one ("terminate called without an active exception") while the interpreter
    took itself down, and one did not return in a minute, all results being written. The cause is not known.
    """
    if not (trainer.is_fsdp_enabled and PROCESSES > 1):
        trainer.end()
        return
    for tracker in trainer.accelerator.trackers:
        tracker.finish()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    trainer.accelerator.wait_for_everyone()
    os._exit(0)


def check_finite(trainer: Any) -> None:
    """Raise `Interrupted` if training diverged: weights that are no numbers are not saved as a model."""
    import torch

    from training.checkpointing.sharding import part_of

    trained = [part_of(p) for p in trainer.model.parameters() if p.requires_grad]
    wrong = sum((~torch.isfinite(p)).any().float() for p in trained)
    if trainer.accelerator.reduce(torch.as_tensor(wrong, device=trainer.args.device), "sum").item():
        raise Interrupted(
            "training diverged, its weights are not finite and no model is saved: lower learning_rate, or use "
            "resume_from_checkpoint with a checkpoint from before."
        )


def leave_results(trainer: Any, job: Job, metrics: dict[str, float]) -> None:
    """Evaluate, and write metrics and the final model."""
    folder, step = job.recipe.training.output_dir, trainer.state.global_step
    if trainer.made_steps:
        metrics = {name: value for name, value in metrics.items() if value or name != "total_flos"}  # not counted
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    else:
        there = os.path.isfile(os.path.join(folder, "train_results.json"))
        kept = "train_results.json stays as it is" if there else "their train_results.json was never written"
        say(f"all {step} steps were made before, {kept}: only evaluating and saving the final model")
    if trainer.made_steps or saved_step(folder) != step:
        trainer.save_state()
    if job.evaluation is not None:
        metrics = last_evaluation(trainer) or trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    save(trainer, job)


def last_evaluation(trainer: Any) -> dict[str, float] | None:
    """What was measured after the last step, if anything was, of the weights that are kept."""
    if trainer.args.load_best_model_at_end:
        return None
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e and e["step"] == trainer.state.global_step]
    return {name: value for name, value in evaluations[-1].items() if name != "step"} if evaluations else None


def save(trainer: Any, job: Job) -> None:
    """Write the final model, its tokenizer and the recipe."""
    folder = job.recipe.training.output_dir
    adapter = os.path.join(folder, "adapter")
    if job.recipe.model.method == "lora_sft":
        trainer.save_model(adapter, _internal_call=True)
    if job.recipe.model.method == "lora_sft" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        if trainer.args.should_save:  # the trainer's own base is spread over all processes
            trainer.save_whole(merged(job.recipe, adapter), folder)
    else:
        if job.recipe.model.method == "lora_sft":
            trainer.model = trainer.accelerator.unwrap_model(trainer.model_wrapped).merge_and_unload()
        trainer.save_model(folder, _internal_call=True)  # pushed once, when all is there
    if RANK == 0:
        with open(os.path.join(folder, "recipe.yaml"), "w", encoding="utf-8") as file:
            yaml.safe_dump(job.recipe.settings, file, sort_keys=False)
        trainer.create_model_card()
    if job.recipe.training.push_to_hub:
        trainer.push_to_hub()
    say(f"saved to {folder}")


def merged(recipe: Recipe, adapter: str) -> Any:
    """The recipe's base, loaded again, with the deltas in the folder `adapter` merged in."""
    from peft import PeftModel

    from l2d.checkpoint.bases import load_base
    from training.checkpointing.sharding import whole_loading
    from training.data.options import named

    with whole_loading(recipe.training):
        base = load_base(named("base", recipe.model.base), **base_options(recipe))
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


if __name__ == "__main__":
    try:
        main()
    finally:
        gc.freeze()  # at the end, no looking for garbage among all that was imported: a second less
