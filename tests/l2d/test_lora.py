"""Fused LoRA products are PEFT's own layer, to rounding; where they do not apply, it is PEFT's own layer.

Run: `python -m pytest tests/l2d/test_lora.py` (about 10 seconds)
"""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

from l2d import L2DForCausalLM
from l2d.network import lora
from l2d.network.diffusion_path import NoisedTargets
from l2d.network.lora import FusedLinear, fuse_products

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}


def layer(dtype=torch.float64, bias=True, dropout=0.0) -> nn.ModuleDict:
    """A linear layer of 12 inputs and 20 outputs with trained deltas of rank 3, as PEFT makes it."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"one": nn.Linear(12, 20, bias=bias, dtype=dtype)}).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["one"], lora_dropout=dropout)
    inject_adapter_in_model(config, module, adapter_name="deltas")
    nn.init.normal_(module["one"].lora_B["deltas"].weight)
    return module.to(dtype)


def results(module: nn.ModuleDict, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of the deltas, for one gradient of the output."""
    x = x.clone().requires_grad_()
    output = module["one"](x)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 2
    slope = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, [x, *trained], slope)]


@pytest.fixture
def products(monkeypatch):
    """How many fused products were made."""
    made = []
    apply = lora._Product.apply
    monkeypatch.setattr(lora._Product, "apply", lambda *given: made.append(1) or apply(*given))
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 12), (1, 7, 12), (2, 3, 12), (0, 12)])
def test_results_and_gradients_are_those_of_peft(dtype, bias, shape, products):
    plain = layer(dtype, bias)
    fused = copy.deepcopy(plain)
    fuse_products(fused)
    x = torch.randn(shape, dtype=dtype)
    expected = results(plain, x)
    assert not products and type(fused["one"]) is FusedLinear and type(plain["one"]) is Linear
    for found, known in zip(results(fused, x), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    assert products and fused.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_they_are_those_of_peft_to_the_rounding_of_its_dtype(bias, products):
    plain = layer(torch.float32, bias)
    plain["one"].base_layer.bfloat16()
    fused = copy.deepcopy(plain)
    fuse_products(fused)
    x = torch.randn(7, 12, dtype=torch.bfloat16)
    found = []
    for module in (plain, fused, copy.deepcopy(plain).float()):
        exact = module is not plain and module is not fused
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            found.append(results(module, x.float() if exact else x))
    assert products and [one.dtype for one in found[1]] == [one.dtype for one in found[0]]
    for theirs, ours, exact in zip(*found, strict=True):
        scale = exact.abs().max()
        assert (ours - exact).abs().max() <= max((theirs - exact).abs().max(), 0.016 * scale)


@pytest.mark.parametrize("frozen", ["input", "lora_A", "lora_B"])
def test_only_what_is_asked_for_gets_a_gradient(frozen):
    module = layer()
    fuse_products(module)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=frozen != "input")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name and frozen not in name)
    module["one"](x).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


@pytest.mark.parametrize("case", ["no_grad", "autocast", "dtype", "dropout", "disabled", "merged", "trained base"])
def test_anything_else_is_left_to_peft(case, products):
    plain = layer(torch.float32, dropout=0.5 if case == "dropout" else 0.0)
    x = torch.randn(4, 12)
    if case == "disabled":
        plain["one"].enable_adapters(False)
    if case == "merged":
        plain["one"].merge()
    if case == "trained base":
        plain["one"].base_layer.requires_grad_(True)
    if case == "dtype":
        plain["one"].base_layer.bfloat16()
        x = x.bfloat16()
    fused = copy.deepcopy(plain)
    fuse_products(fused)
    found = []
    for module in (plain, fused):
        torch.manual_seed(1)
        with torch.set_grad_enabled(case != "no_grad"), torch.autocast("cpu", torch.bfloat16, case == "autocast"):
            found.append(module["one"](x))
    assert torch.equal(*found) and not products


def test_a_models_losses_and_gradients(make_l2d, base_dir, products, monkeypatch):
    model = L2DForCausalLM.from_pretrained(make_l2d(base_dir, variant="lora")).double().train()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (2, 6), generator=generator)
    index = torch.tensor([[1, 3, 4], [2, 3, -1]])
    time, noise = torch.rand(2, 2, 3, generator=generator), torch.randn(2, 2, 3, 16, generator=generator)
    noised = NoisedTargets(index, torch.randint(3, 100, (2, 3), generator=generator), time, noise, None)

    def run() -> list[torch.Tensor]:
        nll = model(input_ids=ids, noised_targets=noised).nll
        trained = [parameter for _, parameter in model.trained_parameters()]
        return [nll.detach(), *torch.autograd.grad(nll.sum(), trained)]

    fused = run()
    count = len(products)
    assert count == sum(isinstance(m, FusedLinear) for m in model.path.modules()) > 0
    monkeypatch.setattr(FusedLinear, "forward", Linear.forward)
    for found, known in zip(fused, run(), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-10)
    assert len(products) == count
