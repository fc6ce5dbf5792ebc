"""One L2D token of this package, one as the released implementation finds it, and one plain decode step, in one run.

    python -m tests.benchmarks.released --shape 135m --budget 15 [--changes 0.2] [--json FILE]

The released procedure is `l2d.released.released_solve`, after a step of the main path: torchdiffeq asks the path once
per evaluation, one after the other, and every evaluation makes the vocabulary's embeddings, its modulation and the LoRA
deltas anew, with PyTorch's own products. Its network is ours, so this is the procedure's cost and not that of its code,
which was 50 plain steps where it was measured (135M shape, float32, batch 1, T = 15).

Prints the medians, both ratios to the plain step, and how many times faster this package is.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from l2d import L2DForCausalLM
from l2d.budget import levels_for_budget
from l2d.released import released_solve
from tests.benchmarks.decode import PlainDecoder, Stopwatch, synchronize
from tests.benchmarks.models import SHAPES, calibrate, make_base, make_model


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


@torch.no_grad()
def released_token(model: L2DForCausalLM, prompt: torch.Tensor, budget: int) -> Callable[[], torch.Tensor]:
    """What finds the token after `prompt` (1, L) as the released procedure does; the main path has been run."""
    state = model.main_path(prompt).last()
    index = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)  # of the new positions, of which there is one
    noise = torch.randn(1, 1, model.config.diffusion_dim, generator=torch.Generator().manual_seed(4)).to(prompt.device)
    levels = levels_for_budget("midpoint", budget)

    def solve() -> torch.Tensor:
        x0 = noise * model.config.noise_std
        return released_solve(model, state, index, x0, method="midpoint", steps=levels).final_logits.argmax(-1)

    return solve


def measure(model: L2DForCausalLM, prompts: torch.Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Medians over prompts (N, 1, L): `tokens` of ours and plain steps for each, and one of the released procedure."""
    ours, steps, theirs = [], [], []
    for prompt in prompts:
        watch = Stopwatch(PlainDecoder(model.base, prompt), arguments.device)
        model.generate(
            prompt, streamer=watch, max_new_tokens=arguments.tokens + 3, sampler={"budget": arguments.budget}
        )
        ours.append(statistics.fmean(watch.tokens[3:]))  # drafted tokens come in bursts
        steps += watch.steps[3:]
        model.train().eval()  # deltas apart again
        enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        forget = model.path.register_forward_pre_hook(lambda path, _: path.vocabulary.forget())
        theirs.append(timed(released_token(model, prompt, arguments.budget), arguments.device))
        forget.remove()
        torch.backends.mkldnn.enabled = enabled
    token, step = statistics.fmean(ours), statistics.median(steps)
    released = step + statistics.median(theirs)
    return {
        "plain_step_s": step,
        "token_s": token,
        "released_s": released,
        "ratio": token / step,
        "released_ratio": released / step,
        "times_faster": released / token,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.released", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--budget", type=int, default=15)
    parser.add_argument("--changes", type=float, help="changes per token to scale the path to (default: at least 1)")
    parser.add_argument("--tokens", type=int, default=12, help="timed tokens per prompt")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = make_base(arguments.shape, getattr(torch, arguments.dtype), arguments.device)
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(1, base.config.vocab_size, (arguments.prompts, 1, 64), generator=generator).to(base.device)
    model = make_model(base, "lora")
    rate = calibrate(model, arguments.changes, arguments.budget, prompts.flatten(0, 1), arguments.tokens + 3)
    figures = {"changes": rate[1], **measure(model, prompts, arguments)}
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({**vars(arguments), "json": None, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
