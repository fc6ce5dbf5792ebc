"""Quantized linear layers of a base: recognised, read as numbers, and differentiated through.

- `is_quantized`, `plain_linear`, `known_linear`: of which kind a base or a layer is
- `weight_parts`: the tensors that make up a quantized weight, the same before and after its first use
- `dequantized`, `as_plain`: the values that they stand for, of a layer and of a base
- `FrozenLinear`: a quantized layer of the base inside the diffusion path

Known are bitsandbytes' 4 and 8 bit layers and torchao's weights in plain linear layers. No library of these is imported
here: where a layer of theirs exists, it already is.

On some processors bitsandbytes packs a 4-bit weight anew in its first forward pass, rounds its scales to bfloat16, and
from then on gives no gradients. `weight_parts` and `dequantized` read both layouts.
Legend: O outputs, I inputs, P values that share a scale.
"""

import sys
from typing import Any

import torch
from torch import nn

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PACKED_ROWS = 32  # of a weight, which bitsandbytes interleaves for the processor


# ---- of which kind -----------------------------------------------------------------------------------------------


def plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` holds its values as floating-point numbers, and not as codes of a library."""
    return tensor.dtype in _PLAIN_DTYPES and not _of_torchao(tensor) and not hasattr(tensor, "quant_state")


def _of_torchao(tensor: torch.Tensor) -> bool:
    return type(tensor).__module__.split(".")[0] == "torchao"


def _of_bitsandbytes(module: Any, name: str) -> bool:
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, getattr(library.nn, name))


def plain_linear(module: Any) -> bool:
    """Whether `module` multiplies with a weight of plain numbers, and does nothing else."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and plain_tensor(module.weight)


def quantized_linear(module: Any) -> bool:
    """Whether `module` is a linear layer with a quantized weight that can be read here."""
    if _of_bitsandbytes(module, "Linear4bit"):
        return True
    if _of_bitsandbytes(module, "Linear8bitLt"):
        return not module.state.has_fp16_weights
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and _of_torchao(module.weight)


def known_linear(module: Any) -> bool:
    """Whether the path can be trained on top of `module`: a plain or a quantized linear layer."""
    return plain_linear(module) or quantized_linear(module)


def is_quantized(base: nn.Module) -> bool:
    """Whether any weight of `base` is kept as codes."""
    return any(not plain_tensor(parameter) for parameter in base.parameters())


# ---- values ------------------------------------------------------------------------------------------------------


def weight_parts(module: Any) -> list[torch.Tensor] | None:
    """Codes and scales of a quantized linear layer, in one layout for good; `None` for other modules."""
    if not quantized_linear(module):
        return None
    if _of_bitsandbytes(module, "Linear4bit"):
        return list(_codes_and_scales(module))
    if _of_bitsandbytes(module, "Linear8bitLt"):
        return list(_int8(module))
    return _leaves(module.weight)


def _leaves(tensor: Any) -> list[torch.Tensor]:
    """The plain tensors that a tensor of torchao consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [leaf for name in names for leaf in _leaves(getattr(tensor, name))]


def _codes_and_scales(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (O, I) uint8 of 4 bits, and scales (O I / P,) of a layer of bitsandbytes, one for P codes in a row."""
    from bitsandbytes.functional import dequantize_blockwise

    weight, state = module.weight, module.weight.quant_state
    if state is None:
        raise ValueError("a 4-bit layer of the base holds no codes: move the base to its device before it is used.")
    packed = weight.data.contiguous().view(torch.uint8)
    outputs, inputs = state.shape
    if getattr(state, "packing_format_for_cpu", False):
        halves = packed.reshape(-1, _PACKED_ROWS)
        codes = torch.cat([halves & 15, halves >> 4], dim=-1)
        codes = codes.reshape(outputs // _PACKED_ROWS, inputs // 2, _PACKED_ROWS, 2).transpose(1, 2)
        return codes.reshape(outputs, inputs), state.absmax.T.reshape(-1)
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=-1).reshape(-1)[: outputs * inputs].reshape(outputs, inputs)
    if not state.nested:
        return codes, state.absmax.reshape(-1)
    return codes, dequantize_blockwise(state.absmax, state.state2).reshape(-1) + state.offset


def _int8(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (O, I) int8 and scales (O,) of a layer of bitsandbytes."""
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data, scales


@torch.no_grad()
def dequantized(module: Any) -> torch.Tensor:
    """The weight (O, I) that a quantized linear layer stands for; float32, or what its library gives."""
    if _of_bitsandbytes(module, "Linear4bit"):
        from bitsandbytes.functional import QuantState, dequantize_4bit

        codes, scales = _codes_and_scales(module)
        state, flat = module.weight.quant_state, codes.flatten()
        halves = nn.functional.pad(flat, (0, len(flat) % 2)).reshape(-1, 2)
        layout = {"code": state.code, "blocksize": state.blocksize, "quant_type": state.quant_type}
        layout |= {"shape": codes.shape, "dtype": torch.float32}
        return dequantize_4bit(halves[:, :1] << 4 | halves[:, 1:], QuantState(scales.float(), **layout))
    if _of_bitsandbytes(module, "Linear8bitLt"):
        codes, scales = _int8(module)
        return codes.float() * (scales.float() / 127)[:, None]
    return module.weight.dequantize()


@torch.no_grad()
def as_plain(base: Any) -> Any:
    """`base` itself, with every quantized linear layer replaced by a plain one of the dtype of `base`."""
    for name, module in list(base.named_modules()):
        if quantized_linear(module):
            weight = dequantized(module).to(base.dtype)
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.detach().to(base.dtype), requires_grad=False)
            base.set_submodule(name, plain)
    if is_quantized(base):
        raise ValueError(
            f"{type(base).__name__} has quantized weights of a kind that cannot be read: load it unquantized."
        )
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(base)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(base).pop(name, None)
    base._weight_conversions = None  # those of the codes, which saving would undo
    return base


# ---- in the diffusion path ---------------------------------------------------------------------------------------


class _ThroughFrozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, linear: nn.Module) -> torch.Tensor:
        """Outputs (..., O) of the layer's own forward pass for inputs (..., I)."""
        ctx.linear = linear
        return linear(inputs.detach())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradients (..., I) of the inputs, from the values that the layer's codes stand for."""
        return gradient @ dequantized(ctx.linear).to(gradient.dtype), None


_Linear: Any = nn.Linear  # whose `weight` is a parameter, for type checkers


class FrozenLinear(_Linear):
    """A quantized linear layer of the base, to which PEFT adds deltas: the same module, and gradients for its inputs.

    Forward it is the layer itself, as the main path runs it. Libraries differentiate their layers in other layouts than
    those that inference uses, or not at all, so the gradient is computed here.
    """

    def __init__(self, linear: Any):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self._linear = (linear,)  # the base's, whose weights are not ours

    @property
    def weight(self) -> torch.Tensor:
        """Where the layer is, and that its deltas are float32; the weight is not to be had as a tensor."""
        return torch.empty(0, dtype=torch.float32, device=self._linear[0].weight.device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (..., I) to outputs (..., O)."""
        return _ThroughFrozen.apply(inputs, self._linear[0])
