"""Which noise, times and tokens the path is trained on: the draws of one batch, and its microbatches.

- `training_targets`: as published, corrupted (`corruption_rate`), rolled out (`rollout_evaluations`), or noise-free;
  some are spared where the base knows them (`easy_target_rate`)
- `evaluation_targets`: stratified times, and noise that belongs to an example
- `split_targets`: microbatches of evaluations, which go through the path one after the other, forward and backward
- `default_evaluations`, `layer_bytes`: how many evaluations a microbatch has, and what they keep in memory

Legend: B rows, Q targets per row, K draws, R evaluations of a whole rollout, J those up to the end of the window.
"""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedConfig

from l2d.config import L2DConfig
from l2d.network.diffusion_path import NoisedTargets
from training.config import L2DTrainingConfig

ON_ACCELERATOR = 4096
LEAST_ON_CPU, MOST_ON_CPU, BYTES_ON_CPU = 512, 2048, 1 << 28  # measured on two threads: more is no faster


def window_length(args: L2DTrainingConfig) -> int:
    """Evaluations of a rollout that have a loss: `rollout_window`, by default 4, or all where there are fewer."""
    return args.rollout_window or min(4, args.rollout_evaluations or 0)


def training_targets(
    config: L2DConfig,
    args: L2DTrainingConfig,
    index: torch.Tensor,
    targets: torch.Tensor,
    classes: torch.Tensor | None,
    key: tuple[int, ...],
    process: int,
) -> NoisedTargets:
    """Fresh targets for sites index (B, Q), -1 at padding, and targets (B, Q): a function of `key` and `process`.

    Args:
        classes: (B, Q) class of each position before dropout, or `None`.
        key: seed, step and batch within the step; the window of a rollout depends on it alone, so that all processes
            do the same amount of work.
    """
    generator = keyed_generator(key[0], process, *key[1:], device=index.device)
    shape = (args.draws, *index.shape)
    options: dict[str, Any] = {"device": index.device, "generator": generator}
    uniform = torch.rand(shape, **options)
    noise = torch.randn(*shape, config.diffusion_dim, **options)
    if classes is not None:
        dropped = torch.rand(shape, **options) < args.guidance_dropout
        classes = classes.expand(shape).masked_fill(dropped, len(config.guidance_classes or []))
    noised = NoisedTargets(index, targets, _times(uniform, config, args), noise, classes)
    if args.easy_target_rate < 1:
        noised.spared = torch.rand(index.shape, **options) >= args.easy_target_rate
    if args.corruption_rate:
        corrupt(noised, args.corruption_rate, args.corruption_base_share, options)
    if args.rollout_evaluations is not None:
        evaluations, window = args.rollout_evaluations, window_length(args)
        start = torch.randint(evaluations - window + 1, (), generator=keyed_generator(*key, evaluations))
        noised.unscored = int(start)
        offsets = torch.rand((noised.unscored + window, *shape), **options)
        noised.time = _rollout_times(offsets, evaluations, config)
    return noised


def evaluation_targets(
    config: L2DConfig,
    args: L2DTrainingConfig,
    index: torch.Tensor,
    targets: torch.Tensor,
    classes: torch.Tensor | None,
    examples: list[list[int]],
) -> NoisedTargets:
    """Targets whose times (stratified over the draws) and noise depend on the seed and an example's own tokens only.

    A rollout is evaluated whole, with a loss at every evaluation; targets are not corrupted.

    Args:
        classes: (B, Q) class of each position, or `None`.
        examples: the tokens of each row, without padding.
    """
    draws, evaluations = args.eval_draws, args.rollout_evaluations
    uniform = torch.zeros(draws, *index.shape)
    noise = torch.zeros(*uniform.shape, config.diffusion_dim)
    offsets = torch.zeros(evaluations or 0, *uniform.shape)
    for row, count in enumerate((index >= 0).sum(1).tolist()):
        generator = keyed_generator(args.seed, examples[row])
        strata = torch.arange(draws).unsqueeze(1) + torch.rand(draws, count, generator=generator)
        uniform[:, row, :count] = strata / draws
        noise[:, row, :count] = torch.randn(draws, count, config.diffusion_dim, generator=generator)
        offsets[:, :, row, :count] = torch.rand(len(offsets), draws, count, generator=generator)
    classes = None if classes is None else classes.expand(uniform.shape)
    time, unscored = _times(uniform, config, args), None
    if evaluations is not None:
        time, unscored = _rollout_times(offsets, evaluations, config), 0
    return NoisedTargets(index, targets, time.to(index.device), noise.to(index.device), classes, unscored=unscored)


def _times(uniform: torch.Tensor, config: L2DConfig, args: L2DTrainingConfig) -> torch.Tensor:
    if config.noise_free:
        return torch.ones_like(uniform)
    return uniform**args.time_power * (1 - config.min_noise)


def _rollout_times(offsets: torch.Tensor, evaluations: int, config: L2DConfig) -> torch.Tensor:
    """Times `(j + u) / R` of the first evaluations of a rollout, from offsets u (J, K, B, Q)."""
    number = torch.arange(len(offsets), device=offsets.device).view(-1, 1, 1, 1)
    return (number + offsets) / evaluations * (1 - config.min_noise)


def corrupt(noised: NoisedTargets, rate: float, base_share: float, options: dict[str, Any]) -> None:
    """Give each evaluation, with probability `rate`, a wrong token to build `x_t` from; the target stays the true one.

    With probability `base_share` that is a sample of the base's distribution without the target, else the token of
    another position of the same answer (a run of neighbouring targets), drawn uniformly among those that differ from
    the target; where none differs it is a sample, too. So the share of wrong tokens is `rate`, not less.
    """
    shape, targets = noised.time.shape, noised.targets
    corrupted = torch.rand(shape, **options) < rate
    sampled = torch.rand(shape, **options) < base_share
    uniform = torch.rand(shape, **options)
    noised.uniforms = torch.rand(shape, dtype=torch.float64, **options)
    first, length = answer_runs(noised.index)
    # Sorted by answer, then token: an answer keeps its slots, and tokens that equal a target are neighbours.
    own = first * (targets.max() + 1) + targets
    keys, order = own.sort(dim=1)
    start, end = torch.searchsorted(keys, own), torch.searchsorted(keys, own, right=True)
    differing = length - (end - start)
    chosen = first + (uniform * differing).long().clamp(max=(differing - 1).clamp(min=0))
    chosen = torch.where(chosen >= start, chosen + end - start, chosen).clamp(max=targets.shape[1] - 1)
    other = targets.gather(1, order).expand(shape).gather(2, chosen)
    other = torch.where(sampled | (differing == 0), -1, other)
    noised.sources = torch.where(corrupted & (noised.index >= 0), other, targets)


def answer_runs(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First slot and length, (B, Q) each, of the run of neighbouring positions that each slot of index (B, Q) is in."""
    starts = torch.ones_like(index, dtype=torch.bool)
    starts[:, 1:] = index[:, 1:] != index[:, :-1] + 1
    slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
    first = torch.where(starts, slots, 0).cummax(1).values
    length = torch.zeros_like(index).scatter_add_(1, first, torch.ones_like(index)).gather(1, first)
    return first, length


def keyed_generator(*key: int | list[int], device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator whose stream is a function of `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


# ---- microbatches -----------------------------------------------------------------------------------------------


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
