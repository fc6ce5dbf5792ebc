"""What a run needs, estimated from shapes alone.

- `Shape`, `shape_of`: what estimates know of a run
- `estimate_memory`: bytes per device, `estimate_flops`: operations of an example
- `without_checkpointing`: whether an L2D run has memory enough to keep all activations

Estimates count what dominates: weights, gradients and AdamW's two moments, activations kept for the backward pass,
keys and values of the main path, and one chunk of logits. Attention's own operations and buffers of communication are
left out.
"""

import dataclasses
import math
import os
from typing import Any

import datasets
import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from l2d.network.cross_entropy import chunk_rows
from training.config import L2DTrainingConfig
from training.draws import default_evaluations, layer_bytes, window_length

GIB = 2**30
STATE = "trained weights, gradients, AdamW"
_PLENTY = 0.5  # part of a device's memory up to which activations are kept


@dataclasses.dataclass
class Shape:
    """What estimates need to know of a run, per device."""

    base: PreTrainedConfig
    method: str
    variant: str
    trained: int
    frozen: int
    frozen_bytes: float  # per weight of the frozen base
    stream_bytes: int  # per activation
    rows: int
    length: int
    mean_length: int  # tokens of an example, of which `response` are targets
    response: float
    draws: int
    max_evaluations_per_pass: int
    checkpointing: bool
    device: str = "cuda"  # kind that it will run on
    scored: int = 1  # evaluations of each draw that have a loss,
    unscored: float = 0.0  # and on average before them, for a rollout


def counts(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of weights that are trained, and that are not."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained


def shape_of(
    model: PreTrainedModel,
    training: L2DTrainingConfig,
    method: str,
    variant: str,
    length: int,
    response: float,
    device: str,
) -> Shape:
    """The shape of a run on a kind of `device`, of examples of `length` tokens, of which `response` are targets."""
    l2d = method == "l2d"
    rollout: dict[str, Any] = {}
    if l2d and training.rollout_evaluations is not None:
        window = window_length(training)
        rollout = {"scored": window, "unscored": (training.rollout_evaluations - window) / 2}
    base, stream_bytes = (
        (model.base if l2d else model).config.get_text_config(),
        2 if training.bf16 or training.fp16 else 4,
    )
    trained, frozen = counts(model)
    stored = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return Shape(
        base=base,
        method=method,
        variant=variant,
        trained=trained,
        frozen=frozen,
        frozen_bytes=stored / max(frozen, 1),
        stream_bytes=stream_bytes,
        rows=training.per_device_train_batch_size,
        length=length,
        mean_length=length,
        response=response,
        draws=training.draws if l2d else 1,
        max_evaluations_per_pass=training.max_evaluations_per_pass or default_evaluations(base, stream_bytes, device),
        checkpointing=bool(training.activation_checkpointing),
        device=device,
        **rollout,
    )


def estimate_memory(shape: Shape) -> dict[str, float]:
    """Bytes per device by what they are for, where nothing is sharded."""
    base, s = shape.base, shape.stream_bytes
    layers, hidden = base.num_hidden_layers, base.hidden_size
    head = getattr(base, "head_dim", None) or hidden // base.num_attention_heads
    kept, tokens = base.num_key_value_heads * head, shape.rows * shape.length
    block = layer_bytes(base, s, modulated=shape.method == "l2d")
    parts: dict[str, float] = {"frozen weights": shape.frozen * shape.frozen_bytes, STATE: shape.trained * 16}
    targets = math.ceil(tokens * shape.response)
    if shape.method == "l2d":
        targets = evaluations = min(targets * shape.draws, shape.max_evaluations_per_pass)
        per_layer = hidden * s if shape.checkpointing else block
        parts["keys and values of the main path"] = 2 * layers * kept * tokens * s
        parts["activations"] = evaluations * (layers * per_layer + (block if shape.checkpointing else 0))
    else:
        block += s * 2 * kept
        parts["activations"] = tokens * (layers * hidden * s + block if shape.checkpointing else layers * block)
    chunk = min(chunk_rows(base.vocab_size, torch.device(shape.device)), targets)
    parts["logits"] = 3 * 4 * chunk * base.vocab_size
    return parts


def without_checkpointing(
    model: PreTrainedModel, training: L2DTrainingConfig, train: Any, limit: int
) -> tuple[bool, str]:
    """Whether L2D training of `model` needs little memory if all activations are kept, and a line about it.

    Recomputing them costs a forward pass of the path and changes no result.

    Args:
        train: encoded examples. limit: the most tokens of one.
    """
    length, kind = longest_of(train, limit, training.packing), training.device.type
    shape = shape_of(model, training, "l2d", model.config.variant, length, 1.0, kind)
    need = sum(estimate_memory(dataclasses.replace(shape, checkpointing=False)).values())
    memory = memory_of(training.device)
    return need <= _PLENTY * memory, (
        f"activation checkpointing is off: without it the run needs about {need / GIB:.1f} of {memory / GIB:.1f} GiB "
        "(activation_checkpointing: true saves memory and takes longer)"
    )


def longest_of(train: Any, limit: int, packing: bool) -> int:
    """Tokens of the longest encoded example, or the most that are allowed where they are packed or streamed."""
    if packing or not isinstance(train, datasets.Dataset):
        return limit
    chunks = train.data.column("input_ids").chunks
    return max((int(chunk.value_lengths().to_numpy().max()) for chunk in chunks if len(chunk)), default=limit)


def memory_of(device: torch.device) -> float:
    """Bytes that a process may use: all of an accelerator, and its share of what is free for processes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def estimate_flops(shape: Shape) -> float:
    """Floating-point operations of one training example, attention scores left out."""
    base = shape.base
    vocabulary = base.vocab_size * base.hidden_size
    embedded = vocabulary if base.tie_word_embeddings else 2 * vocabulary
    length, targets = shape.mean_length, shape.mean_length * shape.response * shape.draws
    again = 1 if shape.checkpointing else 0
    if shape.method != "l2d":
        body = (shape.frozen or shape.trained) - embedded
        backward = 2 if shape.method == "full_sft" else 1
        adapters = 0 if shape.method == "full_sft" else 6 * shape.trained
        return length * (2 * body * (1 + backward + again) + adapters) + targets * 4 * vocabulary
    body = shape.frozen - embedded
    if shape.variant == "full":
        forward, path = 2 * shape.trained, 2 * shape.trained * (3 + again)
    else:
        forward = 2 * (body + shape.trained)
        path = 2 * body * (2 + again) + 2 * shape.trained * (3 + again)
    evaluations = shape.scored * (path + 4 * vocabulary) + shape.unscored * (forward + 2 * vocabulary)
    return length * 2 * body + targets * evaluations
