"""Evaluations go through the path in microbatches, forward and backward: how many at a time, and which.

- `layer_bytes`: what one layer keeps of a position for the backward pass
- `default_evaluations`: as many at a time as are fast and take little memory
- `split_targets`: the pieces
"""

import torch
from transformers import PreTrainedConfig

from l2d.network.diffusion_path import NoisedTargets

ON_ACCELERATOR = 4096
LEAST_ON_CPU, MOST_ON_CPU, BYTES_ON_CPU = 512, 2048, 1 << 28  # measured on two threads: more is no faster


def layer_bytes(base: PreTrainedConfig, stream_bytes: int, modulated: bool) -> int:
    """Bytes that the backward pass needs of one layer and position, by the sizes of the base.

    Args:
        stream_bytes: per activation.
        modulated: with scales, shifts and gates in float32, for the path.
    """
    hidden, inner = base.hidden_size, base.intermediate_size
    head = getattr(base, "head_dim", None) or hidden // base.num_attention_heads
    kept = stream_bytes * (6 * hidden + 2 * base.num_attention_heads * head + 4 * inner) + 8 * hidden
    return kept + (24 * hidden if modulated else 0)


def default_evaluations(base: PreTrainedConfig, stream_bytes: int, device: str) -> int:
    """The default of `max_evaluations_per_pass`: 4096 on an accelerator; on a CPU 512, or for small models up to 2048.

    More than 512 are taken only while they need no more than 256 MiB. Logits do not count: they are made in chunks.
    """
    if device != "cpu":
        return ON_ACCELERATOR
    fitting = BYTES_ON_CPU // (base.num_hidden_layers * layer_bytes(base, stream_bytes, modulated=True))
    return max(LEAST_ON_CPU, min(fitting, MOST_ON_CPU))


def split_targets(noised: NoisedTargets, most: int) -> list[NoisedTargets]:
    """Pieces of at most `most` scored evaluations each: some draws of all sites, or one draw of some sites."""
    valid = noised.index >= 0
    count, draws = int(valid.sum()), noised.noise.shape[0]
    most = max(1, most * draws // noised.scored_time.shape[0])
    if count * draws <= most:
        return [noised]
    groups = torch.arange(draws).split(max(1, most // max(count, 1)))
    number = valid.flatten().cumsum(0).view_as(valid) - 1  # of each position among the valid ones
    pieces = []
    for group in groups:
        draw = slice(int(group[0]), int(group[-1]) + 1)
        for start in range(0, count, most):
            chosen = valid & (number >= start) & (number < start + most)
            pieces.append(noised.select(noised.index.masked_fill(~chosen, -1), draw))
    return pieces
