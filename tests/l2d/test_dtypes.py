"""A base in another dtype is what transformers loads in that dtype: parameters, buffers and logits, bit for bit.

Run: `python -m pytest tests/l2d/test_dtypes.py` (about 10 seconds)

`base.to(dtype)` is not: it also rounds the rotary frequencies, which are computed in float32 while loading.
"""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from l2d import L2DConfig, L2DForCausalLM
from l2d.checkpoint.loading import in_dtype
from l2d.cli.session import load_session
from lm_eval_ext.model import L2DLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDS = torch.randint(3, 400, (1, 900), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def stored(tmp_path_factory, make_base, make_l2d):
    """`stored(dtype)`: folders of a base that is stored in that dtype, and of a checkpoint on it."""
    folders: dict[str, tuple] = {}

    def folder_of(dtype: str):
        if dtype not in folders:
            base = tmp_path_factory.mktemp(f"base-{dtype}")
            AutoModelForCausalLM.from_pretrained(make_base("llama"), dtype=DTYPES[dtype]).save_pretrained(base)
            folders[dtype] = base, make_l2d(base)
        return folders[dtype]

    return folder_of


def check_same(base: torch.nn.Module, reference: torch.nn.Module) -> None:
    tensors = (itertools.chain(model.named_parameters(), model.named_buffers()) for model in (base, reference))
    for (name, own), (other_name, other) in zip(*tensors, strict=True):
        assert name == other_name and own.dtype == other.dtype and torch.equal(own, other), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored_dtype", DTYPES)
@torch.no_grad()
def test_budget_1_is_the_base_in_every_dtype(stored, stored_dtype, dtype):
    base, checkpoint = stored(stored_dtype)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
    logits = reference(IDS).logits
    as_stored = AutoModelForCausalLM.from_pretrained(base)
    for given in (None, as_stored):  # loaded by name, and handed over
        model = L2DForCausalLM.from_pretrained(checkpoint, base=given, dtype=DTYPES[dtype])
        check_same(model.base, reference)
        assert torch.equal(model(IDS).logits, logits)
        assert torch.equal(model.paths.base_logits(model.paths.main_path(IDS)), logits)
        assert model.base.config._name_or_path == str(base)
    assert as_stored.dtype == DTYPES[stored_dtype]


@pytest.mark.parametrize("variant", ["lora", "full"])
@torch.no_grad()
def test_every_way_to_load_gives_the_same_base(make_base, make_l2d, variant):
    base = make_base("llama")
    checkpoint = make_l2d(base, variant)
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lm = L2DLM(str(checkpoint), device="cpu", batch_size=1, dtype="bfloat16", diffusion_budget=1)
    session = load_session(checkpoint, dtype="bfloat16", device="cpu")
    fresh = L2DForCausalLM.from_base(str(base), dtype=torch.bfloat16)
    for model in (lm.model, session.model, fresh):
        check_same(model.base, reference)
    copies = [p.dtype for name, p in session.model.trained_parameters() if ".twin." in name]
    assert set(copies) == {torch.bfloat16 if variant == "full" else torch.float32}


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gemma3_text", {}), ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16})],
)
def test_a_base_that_is_handed_over_is_loaded_anew(make_base, family, settings):
    """Scaled embeddings and routers, with a round trip: what was rounded before is computed again."""
    base = make_base(family, **settings)
    for first, second in itertools.permutations(DTYPES.values(), 2):
        reference = AutoModelForCausalLM.from_pretrained(base, dtype=first)
        check_same(in_dtype(reference, first), reference)
        buffers = dict(AutoModelForCausalLM.from_pretrained(base, dtype=second).named_buffers())
        for name, buffer in in_dtype(reference, second).named_buffers():
            assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name


def int8(base):
    """Quantized weights in layers of torch's own class."""
    for layer in base.model.layers:
        for linear in (part for part in layer.modules() if type(part) is torch.nn.Linear):
            linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return base


def dynamic(base):
    """Layers of another class, the output head included."""
    return torch.ao.quantization.quantize_dynamic(base, {torch.nn.Linear}, dtype=torch.qint8)


def dynamic_body(base):
    """The same without the output head."""
    head, base = base.lm_head, dynamic(base)
    base.lm_head = head
    return base


@pytest.mark.parametrize(
    ("quantize", "variant", "said"),
    [
        (int8, "full", "has a q_proj of the class .*cannot train on: load the base unquantized"),
        (dynamic_body, "full", "has a q_proj of the class .*cannot train on: load the base unquantized"),
        (dynamic_body, "lora", "has a q_proj of the class .*cannot train on: load the base unquantized"),
        (dynamic, "lora", "output head, a .*, has quantized weights: .* load the base unquantized"),
    ],
)
def test_quantized_bases_are_refused_where_they_cannot_be_trained(make_base, quantize, variant, said):
    base = quantize(AutoModelForCausalLM.from_pretrained(make_base("llama")))
    with pytest.raises(ValueError, match=said):
        L2DForCausalLM.from_base(base, L2DConfig(variant=variant))


def test_a_quantized_base_keeps_its_dtype(make_base):
    base = int8(AutoModelForCausalLM.from_pretrained(make_base("llama")))
    with pytest.raises(ValueError, match="quantized base: leave dtype out"):
        in_dtype(base, torch.bfloat16)
