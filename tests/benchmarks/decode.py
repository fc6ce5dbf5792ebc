"""One L2D token against one plain decode step of the same base, interleaved in one run.

    python -m tests.benchmarks.decode --shape 135m --batch-size 1 --budget 15 [--changes 0.2] [--no-speculation]

Prints `plain_step_s` (median Hugging Face greedy step with its cache), `token_s` (median; the mean where tokens are
drafted ahead and come in bursts), and their `ratio`; the change rate that was met; and `exact`, the share of tokens
equal to the sequential solver's. `--json FILE` writes the same figures. Budgets above 31 have fewer tokens and a
rougher rate unless `--tokens` says otherwise: about a quarter of the work.
"""

import argparse
import resource
import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from l2d import L2DForCausalLM
from tests.benchmarks import command
from tests.benchmarks.command import synchronize
from tests.benchmarks.models import calibrate, make_model


class PlainDecoder:
    """Greedy decoding of the base, one step at a time."""

    def __init__(self, base, prompts: torch.Tensor):
        self.base, self.cache = base, DynamicCache(config=base.config)
        self.token = self._advance(prompts)

    @torch.no_grad()
    def _advance(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.base(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def step(self) -> None:
        """One token for every row."""
        self.token = self._advance(self.token)


class Stopwatch(BaseStreamer):
    """Times the tokens of `generate`; between them it times one step of the plain decoder."""

    def __init__(self, plain: PlainDecoder, device: str):
        self.plain, self.device = plain, device
        self.tokens: list[float] = []
        self.steps: list[float] = []
        self.started: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Called after the prompt and after every token."""
        synchronize(self.device)
        now = time.perf_counter()
        if self.started is not None:
            self.tokens.append(now - self.started)
        begin = time.perf_counter()
        self.plain.step()
        synchronize(self.device)
        self.started = time.perf_counter()
        self.steps.append(self.started - begin)

    def end(self) -> None:
        """Nothing to do."""


def measure(model: L2DForCausalLM, prompts: torch.Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """All figures of one setting for batches of prompts (batches, B, L), one batch after the other."""
    sampler = {"budget": arguments.budget, "solver": arguments.solver, "speculation": arguments.speculation}
    sampler["draft_tokens"] = arguments.draft_tokens
    if arguments.guidance:
        sampler |= {"guidance_scale": 1.5, "guidance_class": "a"}
    sequential = {**sampler, "speculation": False, "draft_tokens": 0}
    length, check = prompts.shape[-1], min(arguments.check_tokens, arguments.tokens + 3)
    tokens, steps, equal = [], [], []
    counts: dict[str, list[int]] = {"passes": [], "changes": [], "nfe_computed": []}
    for number, batch in enumerate(prompts):
        watch = Stopwatch(PlainDecoder(model.base, batch), arguments.device)
        settings = dict(max_new_tokens=arguments.tokens + 3, sampler=sampler, return_record=True)
        out, record = model.generate(batch, streamer=watch, **settings)
        tokens += watch.tokens[3:]
        steps += watch.steps[3:]
        for name, values in counts.items():
            values += sum(getattr(record, name), [])
        if check and not number:
            plain = model.generate(batch, max_new_tokens=check, sampler=sequential)
            equal.append((out[:, length : length + check] == plain[:, length:]).double().mean())
    middle = statistics.fmean if arguments.draft_tokens else statistics.median  # drafted tokens come in bursts
    token, step = middle(tokens), statistics.median(steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "plain_step_s": step,
        "token_s": token,
        "ratio": token / step,
        **{f"{name}_per_token": statistics.fmean(values) for name, values in counts.items()},
        "exact": float(torch.stack(equal).mean()) if equal else None,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if arguments.device.startswith("cuda") else peak,
    }


def parse(options: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = command.parser("decode", __doc__, products=True)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--budget", type=int, nargs="+", default=[15])
    parser.add_argument("--solver", default="midpoint")
    parser.add_argument("--variant", choices=("lora", "full"), default="lora")
    parser.add_argument("--guidance", action="store_true", help="guidance with scale 1.5")
    parser.add_argument("--gain", type=float, help="strength of the path that an earlier run printed: no calibration")
    parser.add_argument("--no-speculation", dest="speculation", action="store_false")
    parser.add_argument("--draft-tokens", type=int, default=3, help="tokens that the base may draft ahead")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tokens", type=int, help="timed tokens per row (default: 30; above T = 31 4, noisier)")
    parser.add_argument("--batches", type=int, help="batches of prompts, one after the other (default: 8 rows in all)")
    parser.add_argument("--check-tokens", type=int, help="tokens compared with the sequential solver (default: 8 or 2)")
    return parser.parse_args(options)


def main(options: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write the figures, one dictionary per budget."""
    arguments = parse(options)
    base = command.start(arguments)
    generator = torch.Generator().manual_seed(3)
    batches = arguments.batches or -(-8 // arguments.batch_size)
    shape = (batches, arguments.batch_size, arguments.prompt)
    prompts = torch.randint(1, base.config.vocab_size, shape, generator=generator).to(base.device)
    classes = ["a", "b"] if arguments.guidance else None
    results = []
    budgets = arguments.budget
    model, rate = make_model(base, arguments.variant, classes, arguments.gain), None
    asked = arguments.tokens, arguments.check_tokens
    for budget in budgets:
        short = budget > 31 and asked[0] is None
        defaults = (4, 2) if short else (30, 8)
        arguments.tokens, arguments.check_tokens = (d if n is None else n for n, d in zip(asked, defaults, strict=True))
        if arguments.gain is None and (rate is None or arguments.changes is not None):  # so many changes at each T
            rate = calibrate(
                model, arguments.changes, budget, prompts.flatten(0, 1), arguments.tokens + 3, 3 if short else 8
            )
        print(f"{arguments.shape}, batch {arguments.batch_size}, {arguments.dtype}, {arguments.threads} threads, "
              f"{arguments.solver}, oneDNN {arguments.onednn}, calibration: gain and changes met {rate}")  # fmt: skip
        arguments.budget = budget
        figures = {"calibration": rate, **measure(model, prompts, arguments)}
        results.append({"budget": budget, **figures})
        print(f"T = {budget:4d}  " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, float)),
              flush=True)  # fmt: skip
    command.write(arguments, results=results)
    return results


if __name__ == "__main__":
    main()
