"""Log-likelihoods of given continuations at budget T against the base's own scoring of the same requests.

    python -m tests.benchmarks.scoring --shape 135m --context 512 --continuation 1 32 --budget 15 [--changes 0.2]

Both score the same continuation positions with `L2DForCausalLM.score` (budget 1 is the base), interleaved; medians.
"""

import argparse
import statistics
import time

import torch

from tests.benchmarks import command
from tests.benchmarks.command import synchronize
from tests.benchmarks.models import calibrate, make_model


def measure(model, context: int, continuation: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds per batch of requests for the base and for L2D, and their ratio."""
    generator = torch.Generator().manual_seed(5)
    shape = (arguments.batch_size, context + continuation)
    ids = torch.randint(1, model.base.config.vocab_size, shape, generator=generator).to(model.device)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[:, context:] = True
    seconds: dict[int, list[float]] = {1: [], arguments.budget: []}
    output = None
    for _ in range(arguments.repeats + 1):
        for budget in seconds:
            synchronize(arguments.device)
            begin = time.perf_counter()
            output = model.score(ids, continuation_mask=wanted, sampler={"budget": budget})
            synchronize(arguments.device)
            seconds[budget].append(time.perf_counter() - begin)
    base, ours = (statistics.median(values[1:]) for values in seconds.values())
    passes = output.passes[wanted].double().mean()
    return {"base_s": base, "l2d_s": ours, "ratio": ours / base, "passes_per_token": float(passes)}


def parse(options: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = command.parser("scoring", __doc__, products=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--continuation", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--budget", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(options)


def main(options: list[str] | None = None) -> list[dict[str, float]]:
    """Measure, print and write the figures, one dictionary per length of the continuation."""
    arguments = parse(options)
    base = command.start(arguments)
    model = make_model(base, "lora")
    rate = calibrate(model, arguments.changes, arguments.budget)
    print(f"{arguments.shape}, batch {arguments.batch_size}, {arguments.dtype}, {arguments.threads} threads, "
          f"T = {arguments.budget}, oneDNN {arguments.onednn}, calibration: gain and changes met {rate}")  # fmt: skip
    results = []
    for continuation in arguments.continuation:
        figures = measure(model, arguments.context, continuation, arguments)
        results.append({"continuation": continuation, **figures})
        print(
            f"context {arguments.context}, {continuation:3d} tokens  "
            + "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        )
    command.write(arguments, results=results)
    return results


if __name__ == "__main__":
    main()
