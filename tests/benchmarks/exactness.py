"""Tokens of the fast solver against those of the plain sequential one: the share that is equal.

    python -m tests.benchmarks.exactness [--tokens 500] [--dtype float64] [--json FILE]

For every solver, with and without guidance: at least `--tokens` tokens of left-padded prompts, spread over batches of
1, 4 and 8 rows, on a tiny random base whose path changes the chosen token about once per trajectory. In float64 all
tokens must be equal, in float32 at least 99.9 %; the exit status says whether they were. The fast side has everything
on: speculation along the trajectory, drafted tokens, merged deltas.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from tests.benchmarks.models import calibrate, make_base, make_model

SOLVERS = {"midpoint": 15, "euler": 15, "heun3": 16, "rk4": 17}
SHARES = {1: 0.1, 4: 0.3, 8: 0.6}  # of the tokens, by rows of the batch
LEAST = {"float64": 1.0, "float32": 0.999}


def prompts(rows: int, seed: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random left-padded prompts (rows, 12) and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (rows, 12), generator=generator)
    padding = torch.randint(0, 8, (rows, 1), generator=generator)
    mask = (torch.arange(12) >= padding).long()
    return ids * mask, mask


def compare(model, solver: str, guided: bool, tokens: int, length: int = 25) -> dict[str, float]:
    """Share of equal tokens, number of tokens and changes per token of one solver."""
    sampler = {"solver": solver, "budget": SOLVERS[solver]}
    if guided:
        sampler |= {"guidance_scale": 1.5, "guidance_class": "a"}
    equal = total = changes = 0
    for rows, share in SHARES.items():
        for seed in range(-(-int(tokens * share) // (rows * length))):
            ids, mask = (t.to(model.device) for t in prompts(rows, seed, model.base.config.vocab_size))
            common = dict(attention_mask=mask, max_new_tokens=length, return_record=True)
            fast, record = model.generate(ids, sampler=sampler, **common)
            slow, _ = model.generate(ids, sampler={**sampler, "speculation": False, "draft_tokens": 0}, **common)
            equal += int((fast == slow)[:, 12:].sum())
            total += rows * length
            changes += sum(map(sum, record.changes))
    return {"equal": equal / total, "tokens": total, "changes_per_token": changes / total}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.exactness", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=500, help="per solver, guided and not; 2000: ten minutes")
    parser.add_argument("--dtype", choices=LEAST, nargs="+", default=list(LEAST))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = make_model(make_base("tiny", torch.float32, "cpu"), "lora", ["a", "b"])
    calibrate(model, None, 15)
    results, failed = [], False
    for dtype in arguments.dtype:
        model = model.to(getattr(torch, dtype))
        for solver in SOLVERS:
            for guided in (False, True):
                figures = compare(model, solver, guided, arguments.tokens)
                results.append({"dtype": dtype, "solver": solver, "guided": guided, **figures})
                good = figures["equal"] >= LEAST[dtype]
                failed |= not good
                print(
                    f"{dtype}  {solver:9s} {'guided' if guided else '      '}  equal {figures['equal']:.5f} of "
                    f"{figures['tokens']}, {figures['changes_per_token']:.2f} changes  {'ok' if good else 'FAIL'}",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
