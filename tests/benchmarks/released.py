"""One L2D token of this package, one as the released implementation finds it, and one plain decode step, in one run.

    python -m tests.benchmarks.released --shape 135m --budget 15 [--changes 0.2] [--json FILE]

The released procedure is `tests.parity.released_solver.released_solve`, after a step of the main path: torchdiffeq
evaluates the path one time after the other, and every evaluation computes the vocabulary's embeddings, its modulation
and the LoRA deltas again, with PyTorch's own products. Its network is ours, so this is the cost of the procedure, not
that of its code, which was 50 plain steps where it was measured (135M shape, float32, batch 1, T = 15).

Prints the medians, both ratios to the plain step, and how many times faster this package is.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from l2d import L2DForCausalLM
from l2d.sampler_config import levels_for_budget
from tests.benchmarks import command
from tests.benchmarks.command import synchronize
from tests.benchmarks.decode import PlainDecoder, Stopwatch
from tests.benchmarks.models import calibrate, make_model
from tests.parity.released_solver import ReleasedSolver, released_solve


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


@torch.no_grad()
def released_token(model: L2DForCausalLM, prompt: torch.Tensor, budget: int) -> Callable[[], torch.Tensor]:
    """What finds the token after `prompt` (1, L) as the released procedure does; the main path has been run."""
    state = model.paths.main_path(prompt).last()
    index = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)  # of the new positions, of which there is one
    noise = torch.randn(1, 1, model.config.diffusion_dim, generator=torch.Generator().manual_seed(4)).to(prompt.device)
    levels = levels_for_budget("midpoint", budget)

    def solve() -> torch.Tensor:
        x0 = noise * model.config.noise_std
        return released_solve(model, state, index, x0, ReleasedSolver("midpoint", levels)).final_logits.argmax(-1)

    return solve


@contextlib.contextmanager
def as_released(model: L2DForCausalLM) -> Iterator[None]:
    """Nothing is merged, packed or kept from one evaluation to the next, and all products are PyTorch's own."""
    model.train().eval()  # takes merged deltas apart
    hook = model.path.register_forward_pre_hook(lambda path, _: path.vocabulary.forget())
    enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled
        hook.remove()


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
        with as_released(model):
            theirs.append(timed(released_token(model, prompt, arguments.budget), arguments.device))
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


def parse(options: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = command.parser("released", __doc__, products=True)
    parser.add_argument("--budget", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=12, help="timed tokens per prompt")
    parser.add_argument("--prompts", type=int, default=8)
    return parser.parse_args(options)


def main(options: list[str] | None = None) -> dict[str, float]:
    """Measure, print and write the figures."""
    arguments = parse(options)
    base = command.start(arguments)
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(1, base.config.vocab_size, (arguments.prompts, 1, 64), generator=generator).to(base.device)
    model = make_model(base, "lora")
    rate = calibrate(model, arguments.changes, arguments.budget, prompts.flatten(0, 1), arguments.tokens + 3)
    figures = {"changes": rate[1], **measure(model, prompts, arguments)}
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    command.write(arguments, **figures)
    return figures


if __name__ == "__main__":
    main()
