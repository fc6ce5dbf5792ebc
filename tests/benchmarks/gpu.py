"""Everything that needs a GPU, in one command: facts, correctness, ratios, memory and a real study.

    python -m tests.benchmarks.gpu [--minutes 8] --json FILE [--base DIR --data DIR]

Parts run in this order, each within its share of the time, and FILE is written after every figure:

- `facts`: device, versions, attention kernels
- `checks`: T = 1 is the base, bit for bit; fast tokens are the sequential solver's, alone and in batches; scores,
  losses and gradients are the CPU's. In float32 and bfloat16, on a tiny model
- `decode`: a token in plain Hugging Face steps, and in those of its static cache, which it compiles by itself
- `compiled`: the same with `compile_path`, next to the plain path, for one setting; tokens are compared
- `scoring` and `training`: as `tests.benchmarks.scoring` and `.training` measure them; `training` with peak memory
- `study`: `python -m training.studies.real` for the time that is left, where base and data are at hand

What was not reached, and what failed, stands in FILE with its reason. `--quick` is a miniature for any machine.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from l2d import L2DForCausalLM
from l2d.network.diffusion_path import NoisedTargets
from tests.benchmarks import command, decode, exactness, scoring, training
from tests.benchmarks.models import calibrate, make_base, make_model, scale_path

SHARES = {
    "facts": 0.02, "checks": 0.13, "decode": 0.4, "compiled": 0.15, "scoring": 0.08, "training": 0.15, "study": 1.0
}  # fmt: skip
"""Of the time that is left when a part begins, at most."""
Figures = Iterator[dict[str, Any]]


def facts(arguments: argparse.Namespace) -> Figures:
    """What it runs on."""
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"threads": torch.get_num_threads(), "device": arguments.device}
    if arguments.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(arguments.device)
        found |= {"name": properties.name, "gib": properties.total_memory / 2**30, "cuda": torch.version.cuda}
        found["capability"] = list(torch.cuda.get_device_capability(arguments.device))
        backends = torch.backends.cuda
        found["kernels"] = {
            "flash": backends.flash_sdp_enabled(), "efficient": backends.mem_efficient_sdp_enabled(),
            "cudnn": backends.cudnn_sdp_enabled(), "math": backends.math_sdp_enabled(),
        }  # fmt: skip
    yield found


# ---- checks ------------------------------------------------------------------------------------------------------


def checks(arguments: argparse.Namespace) -> Figures:
    """Shares of equal tokens, and differences to the CPU relative to the largest value."""
    for dtype in (torch.float32, torch.bfloat16):
        models = [_tiny(dtype, device) for device in ("cpu", arguments.device)]
        name = str(dtype).removeprefix("torch.")
        ids, mask = exactness.prompts(4, 0, models[0].base.config.vocab_size)
        yield {"dtype": name, "check": "T = 1 is the base", "equal_bits": _is_the_base(models[1], ids)}
        for solver in list(exactness.SOLVERS)[: 1 if arguments.quick else None]:
            for guided in (False, True):
                tokens = 50 if arguments.quick else 500
                figures = exactness.compare(models[1], solver, guided, tokens, 10 if arguments.quick else 25)
                yield {"dtype": name, "check": "fast is sequential", "solver": solver, "guided": guided, **figures}
        yield {"dtype": name, "check": "batch-mates", "equal": _mates(models[1], ids, mask)}
        scores = [model.score(ids.to(model.device)).logprobs.cpu() for model in models]
        yield {"dtype": name, "check": "scores", "largest_difference": _apart(*scores)}
        (loss, gradients), (other, others) = (_step(model, ids) for model in models)
        apart = max(_apart(*pair) for pair in zip(gradients, others, strict=True))
        yield {"dtype": name, "check": "training step", "loss_difference": abs(loss - other), "gradients": apart}


def _tiny(dtype: torch.dtype, device: str) -> L2DForCausalLM:
    """The tiny model of the exactness benchmark; its weights are drawn on the CPU, so they are the same everywhere."""
    model = make_model(make_base("tiny", torch.float32, "cpu"), "lora", ["a", "b"])
    scale_path(model, 3.0)
    model.base.to(dtype)
    return model.to(device).eval()


@torch.no_grad()
def _is_the_base(model: L2DForCausalLM, ids: torch.Tensor) -> bool:
    ids = ids.to(model.device)
    return torch.equal(model.paths.base_logits(model.paths.main_path(ids)), model.base(ids).logits)


def _mates(model: L2DForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Share of tokens that a row has alone and in a batch."""
    settings: dict[str, Any] = {"max_new_tokens": 12, "request_keys": [str(n) for n in range(len(ids))]}
    ids, mask = ids.to(model.device), mask.to(model.device)
    together = model.generate(ids, attention_mask=mask, **settings)
    equal = []
    for row in range(len(ids)):
        settings["request_keys"] = [str(row)]
        alone = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **settings)
        equal.append((alone[0, ids.shape[1] :] == together[row, ids.shape[1] :]).double().mean())
    return float(torch.stack(equal).mean())


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / one.double().abs().max().clamp(min=1e-12))


def _step(model: L2DForCausalLM, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one step; all that is random is drawn on the CPU."""
    generator = torch.Generator().manual_seed(7)
    index = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
    time_ = torch.rand(2, *index.shape, generator=generator)
    noise = torch.randn(2, *index.shape, model.config.diffusion_dim, generator=generator)
    noised = NoisedTargets(*(t.to(model.device) for t in (index, ids[:, 1:], time_, noise)))
    loss = model(ids.to(model.device), noised_targets=noised).nll.mean()
    loss.backward()
    gradients = [p.grad.cpu() for _, p in model.trained_parameters() if p.grad is not None]
    model.zero_grad()
    return loss.item(), gradients


# ---- ratios ------------------------------------------------------------------------------------------------------


def decode_ratios(arguments: argparse.Namespace) -> Figures:
    """`tests.benchmarks.decode` for batches, budgets, rates of change, with and without drafts; the shortest first."""
    quick = arguments.quick
    batches, budgets, rates = ((1,), (7,), (1.0,)) if quick else ((1, 8, 32), (15, 127), (0.2, 1.0))
    tokens, length = (4, 8) if quick else (24, 64)
    model, prompts = _model_and_prompts(arguments, max(*batches, 8), length)
    compiled = {}
    for batch in batches:
        compiled[batch] = _static_step(model, prompts[:batch], tokens, arguments.device)
        yield {"batch": batch, "static_cache_step_s": compiled[batch]}
    for budget, rate in itertools.product(budgets, rates):
        if quick:
            scale_path(model, 3.0)
            met = None
        else:
            met = calibrate(model, rate, budget, prompts[:8], 8)
        for batch, drafts in itertools.product(batches, (0, 3)):
            figures = _decoding(arguments, model, prompts[None, :batch], budget, drafts, tokens)
            ratio = figures["token_s"] / compiled[batch]
            named = {"batch": batch, "budget": budget, "changes": rate, "calibration": met, "drafts": drafts}
            yield {**named, **figures, "ratio_to_static_cache": ratio}


def compiled_ratios(arguments: argparse.Namespace) -> Figures:
    """One setting of `decode`, plain and with `compile_path`: the seconds that compiling took, and equal tokens."""
    quick = arguments.quick
    budget, tokens, length = (3, 4, 8) if quick else (15, 48, 64)
    model, prompts = _model_and_prompts(arguments, 1, length)
    scale_path(model, 3.0)
    plain = model.generate(prompts, max_new_tokens=tokens, sampler={"budget": budget})
    for compiled in (False, True):
        begin = time.perf_counter()
        if compiled:
            model.compile_path("aot_eager" if quick else "inductor")
        out = model.generate(prompts, max_new_tokens=tokens, sampler={"budget": budget})  # compiles for what follows
        command.synchronize(arguments.device)
        seconds = time.perf_counter() - begin
        equal = float((out == plain)[:, length:].double().mean())
        figures = _decoding(arguments, model, prompts[None], budget, 3, tokens)
        yield {"compiled": compiled, "first_s": seconds, "equal_to_plain": equal, **figures}


def _model_and_prompts(arguments: argparse.Namespace, rows: int, length: int) -> tuple[L2DForCausalLM, torch.Tensor]:
    model = make_model(make_base(arguments.shape, getattr(torch, arguments.dtype), arguments.device), "lora")
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(1, model.base.config.vocab_size, (rows, length), generator=generator)
    return model, prompts.to(model.device)


def _decoding(
    arguments: argparse.Namespace, model: L2DForCausalLM, prompts: torch.Tensor, budget: int, drafts: int, tokens: int
) -> dict[str, float]:
    """`tests.benchmarks.decode` for batches of prompts (batches, B, L)."""
    settings = SimpleNamespace(
        budget=budget, solver="midpoint", speculation=True, draft_tokens=drafts, guidance=False, tokens=tokens,
        check_tokens=tokens, device=arguments.device,
    )  # fmt: skip
    return decode.measure(model, prompts, settings)  # type: ignore[arg-type]  # a namespace


def _static_step(model: L2DForCausalLM, prompts: torch.Tensor, tokens: int, device: str) -> float:
    """Seconds of one plain step with transformers' static cache, which it compiles on an accelerator."""

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        model.base.generate(prompts, max_new_tokens=count, do_sample=False, cache_implementation="static")
        command.synchronize(device)
        return time.perf_counter() - begin

    seconds(3 * tokens)  # compiles for this length
    return max(1e-9, seconds(3 * tokens) - seconds(tokens)) / (2 * tokens)


def _common(arguments: argparse.Namespace) -> list[str]:
    options = ["--shape", arguments.shape, "--dtype", arguments.dtype, "--device", arguments.device]
    return [*options, "--threads", str(torch.get_num_threads())]


def scoring_ratios(arguments: argparse.Namespace) -> Figures:
    """`tests.benchmarks.scoring`."""
    small = ["--context", "8", "--continuation", "2", "--repeats", "1", "--budget", "3"]
    whole = ["--continuation", "1", "32", "256"]
    yield from scoring.main([*_common(arguments), *(small if arguments.quick else whole)])


def training_ratios(arguments: argparse.Namespace) -> Figures:
    """`tests.benchmarks.training`, one draw and four, peak memory included."""
    for draws in (1,) if arguments.quick else (1, 4):
        options = [*_common(arguments), "--draws", str(draws)]
        if arguments.quick:
            options += ["--steps", "1", "--batch-size", "1", "--length", "16", "--no-memory"]
        yield {"draws": draws, **training.main(options)}


def study(arguments: argparse.Namespace) -> Figures:
    """The real study for the time that is left; its folder stays beside FILE and can be continued."""
    module = "training.studies.real"
    if importlib.util.find_spec(module) is None:
        yield {"skipped": f"{module} is not part of this checkout"}
        return
    if arguments.base is None or arguments.data is None:
        yield {"skipped": "no --base and --data: name the folders of a chat model and of GSM8K"}
        return
    from training.studies.real.elsewhere import SOURCES  # problems of other kinds, whose data are not asked for

    minutes = max(0.1, (arguments.deadline - time.monotonic()) / 60 - 0.5)
    out = arguments.json.with_suffix(".study")
    options = ["--base", str(arguments.base), "--data", str(arguments.data), "--out", str(out)]
    options += [word for name in SOURCES for word in (f"--{name}", "0")]
    process = [sys.executable, "-m", module, *options, "--minutes", f"{minutes:.1f}"]  # an epoch, or what fits
    done = subprocess.run(process, capture_output=True, text=True, timeout=60 * minutes + 120)
    yield {"command": process[1:], "status": done.returncode, "output": (done.stdout + done.stderr)[-4000:]}


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "facts": facts, "checks": checks, "decode": decode_ratios, "compiled": compiled_ratios, "scoring": scoring_ratios,
    "training": training_ratios, "study": study,
}  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All parts; what is in the file is what was found so far."""
    results: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(arguments).items()}}

    def write() -> None:
        with tempfile.NamedTemporaryFile("w", dir=arguments.json.parent, delete=False) as file:
            json.dump(results, file, indent=1)
        Path(file.name).replace(arguments.json)

    for name, part in PARTS.items():
        begin, results[name] = time.monotonic(), {"figures": []}
        end = begin + SHARES[name] * (arguments.deadline - begin)
        try:
            for figures in part(arguments):
                results[name]["figures"].append(figures)
                print(name, json.dumps(figures), flush=True)
                write()
                if time.monotonic() > end and name not in ("facts", "study"):
                    results[name]["stopped"] = "its share of the time was over; the rest was not measured"
                    break
        except Exception as error:  # noqa: BLE001  # the other parts are worth having
            results[name]["failed"] = "".join(traceback.format_exception_only(error)).strip()
            print(name, "failed:", traceback.format_exc(), file=sys.stderr, flush=True)
        results[name]["seconds"] = time.monotonic() - begin
        write()
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return results


def parse(options: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = command.parser("gpu", __doc__)
    parser.set_defaults(device="cuda", shape="1b", dtype="bfloat16")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--base", type=Path, help="folder of a chat model, for the study")
    parser.add_argument("--data", type=Path, help="folder of GSM8K, for the study")
    parser.add_argument("--quick", action="store_true", help="a miniature of every part")
    arguments = parser.parse_args(options)
    if arguments.json is None:
        parser.error("--json is missing: name the file for the figures.")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here; --device cpu --shape tiny --quick is a miniature.")
    arguments.deadline = time.monotonic() + 60 * arguments.minutes
    return arguments


def main(options: list[str] | None = None) -> dict[str, Any]:
    """Run all parts and write the file."""
    arguments = parse(options)
    torch.set_num_threads(arguments.threads)
    return run(arguments)


if __name__ == "__main__":
    main()
