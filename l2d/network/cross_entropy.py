"""Cross-entropy over a large vocabulary without a (tokens x vocabulary) tensor.

- `chunked_cross_entropy`: hidden states through a frozen head to losses and tokens, a few rows at a time

Each row's loss depends on its own hidden state alone, and the head is frozen. So the forward pass also computes the
gradient of each row while its logits are alive, and the backward pass only scales it: no logits are kept or recomputed.
Softmax and loss are in float32 (float64 for float64 logits).
Legend: N rows, H hidden size, V vocabulary, C rows of a chunk.
"""

from collections.abc import Callable
from typing import Any

import torch

from l2d.network.embeddings import at_least_float32
from l2d.network.memory import logit_rows

Head = Callable[[torch.Tensor], torch.Tensor]
_ON_CPU = 1 << 24  # logits (C, V) that are alive at a time: 64 MiB
_SHARE = 1 / 256  # of an accelerator's memory


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits are computed at a time, at least 1."""
    return logit_rows(vocabulary, device, _ON_CPU, _SHARE)


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `targets` under `head(hidden)`, and the most likely tokens.

    Args:
        hidden: (N, H), the only tensor that receives gradients.
        targets: (N,) int64.
        head: hidden states (C, H) to logits (C, V), row by row; its weights must be frozen.
        rows: C, rows of logits that exist at the same time.

    Returns losses (N,) in float32 or float64, and tokens (N,) int64.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _ChunkedCrossEntropy.apply(hidden, targets, head, rows)
    with torch.no_grad():
        chunks = [_losses(head(part), target)[:2] for part, target in _chunks(hidden, targets, rows)]
    return torch.cat([loss for loss, _ in chunks]), torch.cat([chosen for _, chosen in chunks])


def _chunks(hidden: torch.Tensor, targets: torch.Tensor, rows: int) -> zip:
    return zip(hidden.split(rows), targets.split(rows), strict=True)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (C,), most likely tokens (C,), and log-probabilities (C, V) of logits (C, V)."""
    full = at_least_float32(logits)
    logprobs = torch.log_softmax(full, dim=-1)  # one kernel, and no copy of the logits beside its result
    return -logprobs.gather(1, targets[:, None]).squeeze(1), full.argmax(-1), logprobs


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int):
        """Losses (N,) and tokens (N,); keeps the gradient of every row's loss, (N, H), and no logits."""
        gradient = torch.empty_like(hidden)
        losses, chosen = [], []
        for number, (part, target) in enumerate(_chunks(hidden, targets, rows)):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                logits = head(part)
            loss, tokens, logprobs = _losses(logits.detach(), target)
            slope = logprobs.exp_()  # softmax - one_hot, for every row on its own
            slope.scatter_add_(1, target[:, None], slope.new_full((len(target), 1), -1.0))
            own = torch.autograd.grad(logits, part, slope.to(logits.dtype))[0]
            gradient[number * rows : number * rows + len(target)] = own
            losses.append(loss)
            chosen.append(tokens)
            del logits, logprobs, slope  # before those of the next chunk
        ctx.save_for_backward(gradient)
        most_likely = torch.cat(chosen)
        ctx.mark_non_differentiable(most_likely)
        return torch.cat(losses), most_likely

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor, _: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None
