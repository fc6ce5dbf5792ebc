"""Models for benchmarks: random bases of real shapes, and paths whose token changes at a chosen rate.

- `make_base`: a random Llama of a named shape
- `make_model`: an L2D model around it
- `calibrate`: scales the path until the chosen token changes about as often as asked
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from l2d import L2DConfig, L2DForCausalLM

SHAPES = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    ),
    "135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
    "1b": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ),
}  # fmt: skip


def make_base(shape: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A random Llama of `shape`, without end tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def scale_path(model: L2DForCausalLM, gain: float) -> None:
    """Random weights everywhere, with the output modulation scaled by `gain`: the strength of the whole path."""
    generator = torch.Generator(model.device).manual_seed(1)
    for name, parameter in model.trained_parameters():
        width = parameter.shape[-1] if parameter.dim() > 1 else 16
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device=model.device) / width**0.5)
        if name.startswith("path.output_modulation.2"):
            parameter.mul_(gain)


def change_rate(model: L2DForCausalLM, prompts: torch.Tensor, budget: int, tokens: int, **sampler) -> float:
    """Mean number of changes of the chosen token per generated token, over at least `tokens` tokens."""
    _, record = model.generate(
        prompts,
        max_new_tokens=-(-tokens // len(prompts)),
        sampler={"budget": budget, "draft_tokens": 0, **sampler},
        return_record=True,
    )
    changes = [c for row in record.changes for c in row]
    return sum(changes) / len(changes)


def calibrate(
    model: L2DForCausalLM,
    changes: float | None,
    budget: int,
    prompts: torch.Tensor | None = None,
    tokens: int = 20,
    rounds: int = 8,
) -> tuple[float, float]:
    """Scale the path until the chosen token changes about `changes` times per trajectory: gain and rate that were met.

    The rate is measured roughly at T = 15 first, then at `budget` until it is within a tenth of what was asked for, at
    most `rounds` times, on `tokens` tokens after each of `prompts` (B, L). It differs much between prompts: give those
    that will be timed.
    `changes=None`: at least once at T = 15.
    """
    if prompts is None:
        generator = torch.Generator().manual_seed(2)
        prompts = torch.randint(1, model.base.config.vocab_size, (16, 64), generator=generator).to(model.device)
    target, budget = (1.15, 15) if changes is None else (changes, budget)
    low, high = 0.1, 100.0
    for _ in range(5):  # the rate rises with the gain
        gain = (low * high) ** 0.5
        scale_path(model, gain)
        low, high = (low, gain) if change_rate(model, prompts, 15, 48) >= target else (gain, high)
    gain, best = (low * high) ** 0.5, None
    for _ in range(rounds):
        scale_path(model, gain)
        rate = change_rate(model, prompts, budget, tokens * len(prompts))
        enough = changes is not None or rate >= 1.0
        if enough and (best is None or abs(rate - target) < abs(best[1] - target)):
            best = (gain, rate)
        if enough and abs(rate - target) <= 0.1 * target:
            break
        gain *= min(3.0, max(0.3, target / max(rate, 1e-9))) ** 0.7  # the rate rises a little faster than the gain
    if best is None:
        raise SystemExit("no scaling of the random path changes the token at least once per trajectory.")
    scale_path(model, best[0])
    return best


def make_model(
    base: LlamaForCausalLM, variant: str, classes: list[str] | None = None, gain: float | None = None
) -> L2DForCausalLM:
    """An L2D model around `base` with a random path of strength `gain`, which `None` leaves to `calibrate`."""
    model = L2DForCausalLM.from_base(base, L2DConfig(variant=variant, guidance_classes=classes)).eval()
    if gain is not None:
        scale_path(model, gain)
    return model
