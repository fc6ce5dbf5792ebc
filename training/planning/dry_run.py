"""What a recipe would do, without weights: `python -m training.train --config RECIPE.yaml --dry_run`.

- `dry_run`: builds the model on the meta device, reads the data, prints, and stops
- `coloured`: a decoded example with its targets marked
- `write_examples`: all of them, for programs
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import datasets
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from l2d.checkpoint import bases
from l2d.checkpoint.quantization import quantizing
from training.checks import longest_example
from training.config import L2DTrainingConfig, ModelArguments
from training.console import say
from training.data.options import named
from training.data.ready import encode, keep
from training.data.tokenizer import base_of, generation_config, load_tokenizer
from training.data.tokenizing import IGNORED, runs_of, target_texts, tokenize
from training.data.values import Unavailable
from training.planning import estimates
from training.planning.estimates import GIB, STATE, Shape, counts, estimate_flops, estimate_memory
from training.recipe import Recipe

ASSUMED_LENGTH, ASSUMED_RESPONSE = 700, 0.5  # mean tokens per example and share of targets, where the data are not here
FLOPS_PER_S = 0.4 * 989e12  # 40 % of an H100's bfloat16 peak
STREAMED = 1000  # examples of a stream that are read, and of others that are averaged over
_GREEN, _GREY, _END = "\033[1;32m", "\033[90m", "\033[0m"


def dry_run(recipe: Recipe) -> None:
    """Print parameters, memory, some examples and the schedule. Raises `ValueError` as a real run would."""
    model = build_on_meta(recipe)
    trained, frozen = counts(model)
    say(f"{recipe.model.method}: {trained:,} trained parameters, {frozen:,} frozen")
    encoded = read_data(recipe)
    if encoded is None:
        expected = recipe.data.expected_examples
        examples, length, response = expected[0] if expected else None, ASSUMED_LENGTH, ASSUMED_RESPONSE
        say(f"assumed below: {length} tokens per example, {response:.0%} of them targets")
    else:
        examples, length, response = describe(encoded)
    shape = shape_of(recipe, model, length, response)
    say_memory(shape, recipe)
    say_schedule(recipe.training, examples, shape)


# ---- model and data ----------------------------------------------------------------------------------------------


def base_configuration(recipe: Recipe) -> PreTrainedConfig:
    """The base's configuration: of the folder `base`, from `base_config`, or from the hub. Raises `ValueError`."""
    model, base = recipe.model, named("base", recipe.model.base)
    if model.base_config is not None and not os.path.isdir(base):
        with open(model.base_config, encoding="utf-8") as file:
            return AutoConfig.for_model(**json.load(file))
    try:
        return bases.base_configuration(
            base, **model.base_options(), trust_remote_code=recipe.training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base={base!r} is neither a model's folder nor a model on the hub; a dry run can do with its "
            f"configuration alone: set base_config. ({error})"
        ) from error


def build_on_meta(recipe: Recipe) -> PreTrainedModel:
    """The model that would be trained, with a base that has shapes and no weights."""
    config = base_configuration(recipe)
    if config.model_type == "l2d":
        raise ValueError(f"base={recipe.model.base!r} is an L2D checkpoint: name the model that it was trained on.")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if recipe.model.method == "l2d":
        from l2d import L2DForCausalLM

        with init_empty_weights():
            return L2DForCausalLM.from_base(base, recipe.model.l2d_config())
    if recipe.model.method == "lora_sft":
        from peft import get_peft_model

        return get_peft_model(base, recipe.model.lora_config())
    return base


def read_data(recipe: Recipe) -> Any:
    """The encoded training examples, after printing some of them; `None`, with a note, if they are not at hand."""
    from training.data.loading import load_examples

    model, data, training, command = recipe.model, recipe.data, recipe.training, recipe.command
    config = base_configuration(recipe)
    limit = longest_example(config, model.base, training.max_length)
    try:
        tokenizer = load_tokenizer(model, training)
        train, evaluation = load_examples(data, model.guidance_classes, training.seed, training.dataset_num_proc)
    except Unavailable as error:
        if command.dry_run_json is not None:
            raise
        say(f"examples are not shown: {' '.join(str(error).split())[:200]}")
        return None
    base = base_of(config, generation_config(model, config))
    if evaluation is not None:
        say(encode(evaluation, tokenizer, training, limit, "eval", base)[1])
    if data.streaming:
        train = datasets.Dataset.from_list(list(itertools.islice(train, STREAMED)), features=train.features)
        say(f"train: streamed, of which the first {len(train):,} examples are read here")
    tokenized = tokenize(train, tokenizer, training, limit, "train", base)
    if command.dry_run_json is not None:
        write_examples(command.dry_run_json, tokenized, tokenizer)
    encoded, summary = keep(tokenized, training, limit, "train")
    say(summary)
    for number in range(min(command.dry_run_examples, len(encoded))):
        say(f"--- example {number + 1}: targets are green\n{coloured(encoded[number], tokenizer)}")
    return encoded


def write_examples(path: str, tokenized: datasets.Dataset, tokenizer: Any) -> None:
    """Write every example, in order: number in the file, text, texts of the targets, and why it is left out or null."""
    with writable(path), open(path, "w", encoding="utf-8") as file:
        file.write('{"examples": [')
        for number, row in enumerate(tokenized):
            text, targets = target_texts(row, tokenizer)
            line = {"number": row["number"], "text": text, "targets": targets, "left_out": row["left_out"]}
            file.write((",\n" if number else "\n") + json.dumps(line, ensure_ascii=False))
        file.write("\n]}\n")


@contextlib.contextmanager
def writable(path: str) -> Iterator[None]:
    """Raise `ValueError` where `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"dry_run_json={path!r} cannot be written ({error.strerror}): name another file.") from error


def coloured(example: dict[str, Any], tokenizer: Any) -> str:
    """The decoded example, what is trained on in bold green and what is not in grey."""
    return "".join(f"{_GREEN if trained else _GREY}{text}{_END}" for text, trained in runs_of(example, tokenizer))


def describe(encoded: Any) -> tuple[int, int, float]:
    """Number of examples, their mean length and their share of targets, the latter from up to 1,000 of them."""
    sample = encoded.select(range(min(len(encoded), STREAMED)))
    tokens = sum(len(row) for row in sample["labels"])
    targets = sum(label != IGNORED for row in sample["labels"] for label in row[1:])
    return len(encoded), max(round(tokens / len(sample)), 1), targets / tokens


# ---- estimates ---------------------------------------------------------------------------------------------------


def shape_of(recipe: Recipe, model: PreTrainedModel, length: int, response: float) -> Shape:
    """The run's shape: memory is for a batch of the longest examples, with their usual share of targets."""
    training, mixed = recipe.training, recipe.training.bf16 or recipe.training.fp16
    method, variant, device = recipe.model.method, recipe.model.variant, "cuda" if mixed else "cpu"
    shape = estimates.shape_of(model, training, method, variant, length, response, device)
    return dataclasses.replace(
        shape, length=training.max_length or length, frozen_bytes=_frozen_bytes(recipe.model, mixed)
    )


def _frozen_bytes(model: ModelArguments, mixed: bool) -> float:
    """Bytes per weight of the frozen base; with scales for 64 values each in 4 bits."""
    if quantizing(vars(model)):
        return 0.5 + 4 / 64 if model.load_in_4bit else 1
    return 4 if model.dtype == "float32" or (model.dtype is None and not mixed) else 2


def say_memory(shape: Shape, recipe: Recipe) -> None:
    """Print the memory of one device, and with the trained state sharded over eight."""
    parts = estimate_memory(shape)
    total = sum(parts.values())
    lines = [f"  {value / GIB:7.1f} GiB  {name}" for name, value in parts.items()]
    say(f"memory per device, estimated for {shape.rows} x {shape.length} tokens:\n" + "\n".join(lines))
    sharded = total - parts[STATE] * 7 / 8
    say(f"  {total / GIB:7.1f} GiB  in all; {sharded / GIB:.1f} GiB with the trained state sharded over 8 devices")


def say_schedule(training: L2DTrainingConfig, examples: int | None, shape: Shape) -> None:
    """Print steps, warm-up and learning rates, and the time that eight H100 would take."""
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = training.max_steps
    if steps <= 0 and examples:
        steps = math.ceil(math.ceil(examples / batch) * training.num_train_epochs)
    many = f"{steps:,} steps" if steps > 0 else f"{training.num_train_epochs:g} epochs"
    kind = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    say(
        f"schedule: {many} of {batch} examples ({training.per_device_train_batch_size} x "
        f"{training.gradient_accumulation_steps} accumulated x {training.world_size} processes), {kind} from "
        f"{training.learning_rate:g} after {training.warmup_steps:g} warm-up steps, "
        f"{training.lr_scheduler_kwargs or 'to 0'}"
    )
    if steps > 0:
        work = estimate_flops(shape) * steps * batch
        say(f"work: {work:.2e} floating-point operations, {work / FLOPS_PER_S / 8 / 3600:.1f} hours on 8 H100 at 40 %")
