"""Linear layers with LoRA deltas, trained without passes over their outputs that products can take along.

- `fuse_products`: let the layers that PEFT made compute so
- `FusedLinear`: PEFT's layer with `y = x W' + b + s (x A') B'` as three products forward and five backward

PEFT scales and adds the delta in passes of their own, over (N, O) forward and backward, which on a CPU are as slow as
the small products; here each delta is added by the product that makes it. Results agree to rounding. So they do under
autocast, where the frozen weight has its dtype and the deltas are cast to it. Everything else (other dtypes, quantized
layers, dropout, merged deltas, compiling, inference) is PEFT's own.

Legend: N rows, I inputs, O outputs, R rank.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _Product(torch.autograd.Function):
    """`x W' + b + s (x A') B'` for x (N, I), a frozen W (O, I) and b (O,), A (R, I), B (O, R) and a number s."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, down: Any, up: Any, scaling: float):
        """(N, O)."""
        inner = x @ down.t()
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scaling = scaling
        return functional.linear(x, weight, bias).addmm_(inner, up.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):
        """Gradients of x, A and B."""
        x, weight, down, up, inner = ctx.saved_tensors
        of_x = of_down = of_up = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            of_inner = (gradient @ up).mul_(ctx.scaling)  # (N, R)
            if ctx.needs_input_grad[0]:
                of_x = (gradient @ weight).addmm_(of_inner, down)
            if ctx.needs_input_grad[3]:
                of_down = of_inner.t() @ x
        if ctx.needs_input_grad[4]:
            of_up = (gradient.t() @ inner).mul_(ctx.scaling)
        return of_x, None, None, of_down, of_up, None


class FusedLinear(Linear):
    """PEFT's `Linear`, which it falls back to wherever more than the plain case is asked for."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Inputs (..., I) to outputs (..., O)."""
        base: Any = self.base_layer
        (name, *others), known = self.active_adapters or [""], self.lora_A
        if args or kwargs or others or name not in known or not self._is_plain(x, base, name):
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        rows = x.reshape(-1, x.shape[-1])
        down, up = down.to(x.dtype), up.to(x.dtype)  # which differ under autocast alone
        output = _Product.apply(rows, base.weight, base.bias, down, up, self.scaling[name])
        return output.view(*x.shape[:-1], output.shape[-1])

    def _is_plain(self, x: torch.Tensor, base: Any, name: str) -> bool:
        """Whether one delta is trained on a frozen, unquantized weight, everything in one dtype."""
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        weight = base.weight
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        allowed = {torch.get_autocast_dtype(device), torch.float32} if autocast else {x.dtype}
        return (
            torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not (self.disable_adapters or self.merged or self.lora_variant)
            and type(base) is nn.Linear
            and not (weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
            and isinstance(self.lora_dropout[name], nn.Identity)
            and x.dtype == weight.dtype
            and (not autocast or x.dtype == torch.get_autocast_dtype(device))
            and {down.dtype, up.dtype} <= allowed
            and weight.shape == (up.shape[0], down.shape[-1])  # which a sharded weight is not until it is gathered
        )


def fuse_products(module: nn.Module) -> None:
    """Turn PEFT's `Linear` layers in `module` into `FusedLinear`s, which have the same tensors under the same names."""
    for layer in module.modules():
        if type(layer) is Linear:
            layer.__class__ = FusedLinear
