"""What runs on accelerators, tried on devices that pretend. `python -m pytest tests/l2d/test_devices.py`

- the pretended devices refuse and count as CUDA does
- bases that are spread over devices, decoding, scoring and training there; how often the host waits
- deltas, and tokens, in half precision; the attention kernels and the memory that are used
"""

import accelerate
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import l2d.sampling.evaluator
from l2d import L2DConfig, L2DForCausalLM
from l2d.network.attention import SiteLayout
from l2d.network.diffusion_path import NoisedTargets
from l2d.network.memory import logit_rows
from l2d.sampling.fixed_shapes import FixedCalls
from tests.conftest import randomise_path
from tests.pretend_device import PretendDevices


def test_pretended_devices_refuse_what_cuda_refuses():
    with PretendDevices():
        here, there, other = (torch.ones(3, device=d) for d in ("cpu", "cuda:0", "cuda:1"))
        assert [str(t.device) for t in (here, there[1:], (other + 1).view(3, 1))] == ["cpu", "cuda:0", "cuda:1"]
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([there, other]),
            lambda: there @ other,
            lambda: here[torch.tensor([0], device="cuda:0")],
            lambda: torch.nn.functional.embedding(torch.tensor([0]), there[:, None]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert (there + torch.tensor(1.0)).device == there.device  # a scalar
        assert there[torch.tensor([0, 1])].device == there.device  # indices may be on the CPU
        assert other.to(there).device == there.device and here.to(1).device == other.device


def test_pretended_devices_keep_gradients_where_weights_are():
    with PretendDevices():
        layer = torch.nn.Linear(2, 2).to("cuda:1")
        layer(torch.ones(1, 2, device="cuda:1").to("cuda:0").to("cuda:1")).sum().backward()
        assert layer.weight.grad is not None and str(layer.weight.grad.device) == "cuda:1"
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("work", "launches", "waits"),
    [
        (lambda x: x.view(4).unsqueeze(0)[:, 1:].t(), 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x * 2 + 1, 2, 0),
        (lambda x: torch.nn.functional.rms_norm(x, (2,)), 1, 0),
        (lambda x: bool(x.sum() > 0), 2, 1),
        (lambda x: x.tolist(), 0, 1),
        (lambda x: torch.nonzero(x), 1, 1),
        (lambda x: x[x > 0], 2, 1),
        (lambda x: x.masked_fill(x > 0, 1.0), 2, 0),
        (lambda x: x.cpu(), 1, 1),
        (lambda x: torch.ones(2, 2).to(x.device), 1, 1),
        (lambda x: torch.ones(2, 2).to(x.device, non_blocking=True), 1, 0),
        (lambda x: torch.tensor([1.0], device=x.device), 1, 1),
        (lambda x: torch.arange(3, device=x.device), 1, 0),
    ],
)
def test_pretended_devices_count(work, launches, waits):
    with PretendDevices() as devices:
        x = torch.ones(2, 2, device="cuda:0")
        devices.reset()
        work(x)
        assert (devices.launches.total(), devices.synchronisations.total()) == (launches, waits)


SMALL = dict(diffusion_dim=16, input_width=16, conditioning_width=16, frequency_width=16, lora_rank=4, noise_std=2.0)
IDS = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def small_base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0, initializer_range=0.25,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def small_model(base: LlamaForCausalLM, **settings) -> L2DForCausalLM:
    model = L2DForCausalLM.from_base(base, L2DConfig(**SMALL, **settings)).eval()
    randomise_path(model)
    return model


def answers(model: L2DForCausalLM, device: str, samplers: list[dict]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens for every sampler, and scores."""
    ids, mask = IDS.to(device), MASK.to(device)
    tokens = [model.generate(ids, attention_mask=mask, max_new_tokens=4, sampler=one).cpu() for one in samplers]
    return tokens, model.score(ids, sampler=samplers[-1]).logprobs.cpu()


def spread_over_two(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """The base with its second layer and all that follows on the second device."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{number}": number for number in range(2)}
    return accelerate.dispatch_model(base, places, force_hooks=True)


SAMPLERS = [{"budget": 1}, {"budget": 7, "speculation": False, "draft_tokens": 0}, {"budget": 7}]
GUIDED = {"budget": 7, "guidance_scale": 1.5, "guidance_class": "a"}
SAMPLED = {"budget": 5, "choice": "sample", "choice_temperature": 1.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"warm_start": True, "guidance_classes": ["a"]},
        {"carried_state": True},
        {"warm_start": True, "own_values_rank": 4, "own_keys_rank": 4},
    ],
)
def test_a_base_that_is_spread_over_devices_gives_the_same_answers(settings):
    """Generated tokens and scores."""
    samplers = [*SAMPLERS, SAMPLED]
    if settings.get("guidance_classes"):
        samplers = [SAMPLERS[0], *({**one, "guidance_scale": 1.5, "guidance_class": "a"} for one in samplers[1:])]
    tokens, scores = answers(small_model(small_base(), **settings), "cpu", samplers)
    with PretendDevices():
        spread = small_model(spread_over_two(small_base()), **settings)
        parameters = dict(spread.trained_parameters())
        assert {str(p.device) for name, p in parameters.items() if ".layers.1." in name} == {"cuda:1"}
        again, others = answers(spread, "cuda:0", samplers)
    assert all(torch.equal(*pair) for pair in zip(tokens, again, strict=True))
    assert torch.equal(scores, others)


def test_a_base_of_which_a_part_is_offloaded_is_refused(tmp_path):
    small_base().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "lm_head": "cpu"}
    settings = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", **settings)
    for build in (
        lambda: L2DForCausalLM.from_base(base),
        lambda: L2DForCausalLM(L2DConfig(), base=base),
        lambda: L2DForCausalLM.from_base(str(tmp_path / "base"), **settings),
    ):
        with pytest.raises(ValueError, match="a part of the base would be offloaded"):
            build()


@pytest.mark.parametrize(("sampler", "most"), [({"budget": 1}, 1), ({"draft_tokens": 0}, 2), ({}, 2), (SAMPLED, 8)])
def test_the_host_waits_at_most_so_often_per_token(sampler, most):
    """Once for the evaluations that differ, once for the tokens and what ends; a fresh path differs nowhere."""
    with PretendDevices() as devices:
        model = L2DForCausalLM.from_base(small_base().to("cuda:0"), L2DConfig(**SMALL)).eval()
        ids, counts = IDS.to("cuda:0"), []
        for length in (5, 5, 9):  # the first prepares what is kept
            devices.reset()
            model.generate(ids, max_new_tokens=length, sampler=sampler)
            counts.append(devices.synchronisations.total())
    assert (counts[2] - counts[1]) / 4 <= most


@pytest.mark.parametrize("place", [lambda base: base.to("cuda:0"), spread_over_two], ids=["one device", "two devices"])
@pytest.mark.parametrize("kind", ["published", "corrupted", "rollout"])
def test_a_training_step_is_the_same_on_devices(place, kind):
    generator = torch.Generator().manual_seed(7)
    settings = {"carried_state": True, "own_values_rank": 4, "own_keys_rank": 4} if kind == "rollout" else {}
    noised = {
        "index": torch.arange(7).expand(2, -1),
        "targets": IDS.roll(-1, 1)[:, :-1],
        "time": torch.rand(3, 2, 7, generator=generator),
        "noise": torch.randn(3, 2, 7, 16, generator=generator),
    }
    if kind == "corrupted":
        noised["sources"] = torch.full((3, 2, 7), -1)
        noised["uniforms"] = torch.rand(3, 2, 7, generator=generator, dtype=torch.float64)
    if kind == "rollout":
        noised["time"] = torch.linspace(0, 0.75, 4)[:, None, None, None].expand(4, 3, 2, 7)

    def step(model, device):
        there = {name: value.to(device) for name, value in noised.items()}
        given = NoisedTargets(**there, unscored=2 if kind == "rollout" else None)
        loss = model(IDS.to(device), noised_targets=given).nll.mean()
        loss.backward()
        return loss.item(), {n: p.grad.cpu() for n, p in model.trained_parameters() if p.grad is not None}

    loss, gradients = step(small_model(small_base(), **settings), "cpu")
    with PretendDevices():
        other, others = step(small_model(place(small_base()), **settings), "cuda:0")
    assert other == loss and gradients.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in gradients.items())


class RowDependent:
    """Products and attention whose rounding depends on how many rows are computed together, as on an accelerator."""

    def __init__(self, monkeypatch):
        for owner, name in (
            (torch.nn.functional, "linear"),
            (torch, "addmm"),
            (torch.nn.functional, "scaled_dot_product_attention"),
        ):
            monkeypatch.setattr(owner, name, self.rounded(getattr(owner, name), name))

    def rounded(self, product, name):
        def computed(*arguments, **settings):
            result = product(*arguments, **settings)
            if result.dtype != torch.bfloat16:
                return result
            count = result.shape[-2] if "attention" in name else result.numel() // result.shape[-1]
            if "attention" in name and settings.get("attn_mask") is not None:
                count += 1000  # another kernel
            factor = 1 + ((count * 2654435761 >> 7) % 9 - 4) / 256  # a few units in the last place
            return (result.float() * factor).bfloat16()

        return computed


ROW_DEPENDENT = [{"draft_tokens": 0, "speculation": False}, {"draft_tokens": 0}, {"draft_tokens": 3}]


def tokens_of_each(settings: dict) -> list[torch.Tensor]:
    model = small_model(small_base(torch.bfloat16).to("cuda:0"), guidance_classes=["a"])
    common = dict(attention_mask=MASK.to("cuda:0"), max_new_tokens=6)
    return [model.generate(IDS.to("cuda:0"), sampler={**settings, **one}, **common).cpu() for one in ROW_DEPENDENT]


@pytest.mark.parametrize("settings", [{"budget": 5, "choice": "sample", "choice_temperature": 1.0}, GUIDED])
def test_tokens_in_half_precision_do_not_depend_on_what_is_computed_together(settings, monkeypatch):
    """With products whose rounding depends on the number of rows; without calls of one shape they do depend on it."""
    with PretendDevices():
        RowDependent(monkeypatch)
        slow, fast, drafted = tokens_of_each(settings)
        assert torch.equal(slow, fast) and torch.equal(slow, drafted)
        monkeypatch.setattr(l2d.sampling.evaluator, "evaluations_per_row", lambda *arguments: None)
        slow, fast, drafted = tokens_of_each(settings)
        assert not torch.equal(slow, fast) or not torch.equal(slow, drafted)


def test_calls_of_one_shape_hold_every_evaluation_once():
    rows = torch.tensor([0] * 5 + [2] * 3 + [3])
    calls = FixedCalls.make(rows, 4, 2)
    assert len(calls.filled) == 3 and calls.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    places = [filled[own] for filled, own in zip(calls.filled, calls.own, strict=True)]
    assert torch.cat(places)[calls.order].tolist() == list(range(9))
    for own, evaluations in zip(calls.own, places, strict=True):
        assert torch.equal(calls.rows[own], rows[evaluations])


def test_attention_uses_flash_and_efficient_kernels_not_cudnn():
    """For the base by itself, too: at T = 1 it must compute the same."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    small_model(small_base())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


@torch.no_grad()
def test_masks_are_laid_out_for_cuda():
    """The memory-efficient kernel takes rows that are a multiple of 16 numbers apart as they are."""
    model = small_model(small_base())
    state = model.paths.main_path(IDS, MASK)
    layout = SiteLayout(state, torch.tensor([0, 0, 1]), torch.tensor([4, 6, 7]))
    for number in range(len(layout.groups)):
        bias = layout.bias(number, None, 2, state.layers[0].keys)
        assert bias.stride(-1) == 1 and all(stride % 16 == 0 for stride in bias.stride()[:-1])
        mask = layout.mask(number, None)
        assert torch.equal(bias == 0, mask.repeat(1, 1, 2 if mask.shape[2] > 1 else 1, 1))
        assert bool((bias[bias != 0] == -torch.inf).all())


def test_logits_alive_at_once_follow_the_memory_of_the_device():
    vocabulary, cpu = 128_256, torch.device("cpu")
    assert logit_rows(vocabulary, cpu, 6 << 20, 1 / 64) == 49 and logit_rows(10**9, cpu, 6 << 20, 1 / 64) == 1
    with PretendDevices(memory=80 << 30) as devices:
        device = torch.device("cuda", 0)
        assert logit_rows(vocabulary, device, 6 << 20, 1 / 64) > 2000  # twice through the head, not 42 times
        devices.memory = 8 << 30
        assert 500 < logit_rows(vocabulary, device, 6 << 20, 1 / 256) < 600


@torch.no_grad()
def test_deltas_in_half_precision_are_rounded_less_than_the_projections():
    model = small_model(small_base(torch.bfloat16))
    layer = model.path.layers[0].twin.self_attn.q_proj
    inputs = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = inputs.double() @ layer.get_base_layer().weight.double().T
    exact += inputs.double() @ layer.get_delta_weight("diffusion").double().T
    errors = [(layer(inputs).double() - exact).square().mean().sqrt()]
    model.paths.prepare_inference()
    errors.append((layer(inputs).double() - exact).square().mean().sqrt())
    assert "forward" in vars(layer) and errors[1] < 2.5 * errors[0] < 0.02 * exact.std()
    model.paths.release()
    assert "forward" not in vars(layer)
