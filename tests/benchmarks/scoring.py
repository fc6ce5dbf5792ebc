"""Log-likelihoods of given continuations at budget T against the base's own scoring of the same requests.

    python -m tests.benchmarks.scoring --shape 135m --context 512 --continuation 1 32 --budget 15 [--changes 0.2]

Both score the same continuation positions with `L2DForCausalLM.score` (budget 1 is the base), interleaved; medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from tests.benchmarks.decode import synchronize
from tests.benchmarks.models import SHAPES, calibrate, make_base, make_model


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
    rounds = output.rounds[wanted].double().mean()
    return {"base_s": base, "l2d_s": ours, "ratio": ours / base, "rounds_per_token": float(rounds)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scoring", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--continuation", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--budget", type=int, default=15)
    parser.add_argument("--changes", type=float, help="changes per token to scale the path to (default: at least 1)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-onednn", dest="onednn", action="store_false", help="PyTorch's own products everywhere")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.mkldnn.enabled = arguments.onednn
    base = make_base(arguments.shape, getattr(torch, arguments.dtype), arguments.device)
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
    if arguments.json:
        arguments.json.write_text(json.dumps({**vars(arguments), "json": None, "results": results}, indent=1))


if __name__ == "__main__":
    main()
