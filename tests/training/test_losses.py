"""Cross-entropy in chunks equals the plain one. `python -m pytest tests/training/test_losses.py`"""

import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from l2d.network.cross_entropy import chunk_rows, chunked_cross_entropy

HIDDEN, VOCABULARY = 12, 97


def head(dtype: torch.dtype = torch.float64):
    """A frozen head with a norm and a soft cap."""
    torch.manual_seed(1)
    norm = torch.nn.RMSNorm(HIDDEN, dtype=dtype).requires_grad_(False)
    linear = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    return lambda hidden: torch.tanh(linear(norm(hidden)) / 3) * 3


def inputs(count: int, dtype: torch.dtype = torch.float64):
    """Hidden states that receive gradients, targets, and weights of the losses."""
    torch.manual_seed(2)
    hidden = torch.randn(count, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(VOCABULARY, (count,)), torch.rand(count)


@pytest.mark.parametrize("rows", [1, 5, 7, 20, 100])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_losses_tokens_and_gradients(rows, dtype, tolerance):
    """Whatever the chunk, also where rows weigh differently."""
    hidden, targets, weights = inputs(20, dtype)
    weights[3] = 0
    logits = head(dtype)(hidden)
    expected = cross_entropy(logits, targets, reduction="none")
    gradient = torch.autograd.grad((expected * weights).sum(), hidden)[0]
    losses, tokens = chunked_cross_entropy(hidden, targets, head(dtype), rows)
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(tokens, logits.argmax(-1))
    found = torch.autograd.grad((losses * weights).sum(), hidden)[0]
    torch.testing.assert_close(found, gradient, rtol=tolerance, atol=tolerance)
    assert (found[3] == 0).all()
    with torch.no_grad():
        again, _ = chunked_cross_entropy(hidden, targets, head(dtype), rows)
    assert torch.equal(again, losses.detach())


def test_gradient_check():
    hidden, targets, _ = inputs(6)
    assert torch.autograd.gradcheck(lambda h: chunked_cross_entropy(h, targets, head(), 4)[0], (hidden,))


def test_bfloat16_logits_are_summed_in_float32():
    hidden, targets, _ = inputs(20, torch.bfloat16)
    losses, _ = chunked_cross_entropy(hidden, targets, head(torch.bfloat16), 6)
    expected = cross_entropy(head(torch.bfloat16)(hidden).float(), targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    losses.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and torch.isfinite(hidden.grad).all()


def test_no_rows():
    hidden, targets, _ = inputs(0)
    losses, tokens = chunked_cross_entropy(hidden, targets, head(), 4)
    losses.sum().backward()
    assert losses.shape == tokens.shape == (0,) and hidden.grad.shape == (0, HIDDEN)


class Largest(TorchDispatchMode):
    """Largest number of elements of tensors as wide as the vocabulary that were alive together."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[weakref.ref, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[-1] == VOCABULARY:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (weakref.ref(tensor), tensor.numel())
        self.alive = {key: entry for key, entry in self.alive.items() if entry[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def test_logits_of_one_chunk_at_a_time():
    hidden, targets, _ = inputs(400)
    with Largest() as largest:
        losses, _ = chunked_cross_entropy(hidden, targets, head(), 10)
        losses.sum().backward()
    assert 0 < largest.most <= 6 * 10 * VOCABULARY  # logits, what softmax and soft cap make of them: of one chunk
    assert not largest.alive or max(size for _, size in largest.alive.values()) <= 10 * VOCABULARY


def test_rows_of_a_chunk():
    assert chunk_rows(128256, torch.device("cpu")) * 128256 * 4 <= 64 * 2**20
    assert chunk_rows(1 << 40, torch.device("cpu")) == 1
