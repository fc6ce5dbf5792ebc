"""Matrix products of inference on a CPU, through oneDNN where it is faster than PyTorch's default.

- `linear`: `functional.linear`, by oneDNN for large float32 weights on a CPU
- `serves`: whether oneDNN is used for a weight
- `packed_linear`: the same for a weight that is used many times, packed once
- `slow_dtype`: whether products in a dtype are slow on this processor

PyTorch gives float32 products to MKL, which does not use the wide vector units of every CPU (on AMD's it reaches less
than half of oneDNN's speed), and to oneDNN on request only. Sums are taken in another order: results agree to rounding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

_LEAST = 1 << 17  # elements of a weight; below it the products are too small to matter
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_PACK: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def serves(weight: torch.Tensor) -> bool:
    """Whether oneDNN is the faster library for products with `weight`."""
    return bool(
        _ONEDNN is not None
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.numel() >= _LEAST
        and torch.backends.mkldnn.enabled
    )


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`functional.linear` for inputs (..., K), a weight (N, K) and a bias (N,) or `None`."""
    if inputs.dtype != weight.dtype or torch.is_grad_enabled() or not inputs.numel() or not serves(weight):
        return functional.linear(inputs, weight, bias)
    return _ONEDNN(inputs, weight, bias, "none", [], "")


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of inputs (..., K) with the result of `linear`; it keeps `weight` (N, K), or a packed copy.

    For inference only: no gradients. A closure, because packed weights can be neither copied nor pickled.
    """
    if _PACK is None or not serves(weight):
        return lambda inputs: functional.linear(inputs, weight, bias)
    kept = _PACK(weight.detach(), None)
    # torch.compile leaves it as it is: its own compiler takes no weights that are packed already.
    return torch.compiler.disable(lambda inputs: _ONEDNN(inputs, kept, bias, "none", [], ""))


def slow_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` is an x86 processor without instructions for products in `dtype`, which then take several times
    as long as in float32.
    """
    narrow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "NO AVX")
    return narrow and dtype in (torch.bfloat16, torch.float16)
