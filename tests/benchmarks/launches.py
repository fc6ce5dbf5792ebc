"""Kernels launched and host synchronisations per generated token, which bound small batches on an accelerator.

    python -m tests.benchmarks.launches [--layers 16] [--dtype float32] [--device cuda] [--lines 20] [--json FILE]

Batch 1, greedy, T = 15, a fresh path: the chosen token never changes and every drafted token is kept. Counts do not
depend on the width, so the base is narrow. Without an accelerator the device is pretended (`tests/pretend_device.py`):
what PyTorch dispatches counts as one kernel each, without views and allocations. With `--device cuda` torch's profiler
counts what was launched. `--lines` prints the source lines that launch and wait most.
"""

import argparse
import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import command
from tests.benchmarks.models import make_model
from tests.pretend_device import PretendDevices

SETTINGS = {
    "T = 1": {"budget": 1},
    "T = 15, accepted drafts": {"budget": 15},
    "T = 15, no drafts": {"budget": 15, "draft_tokens": 0},
    "T = 15, no speculation": {"budget": 15, "draft_tokens": 0, "speculation": False},
}
_TOKENS = (5, 9)  # what a run of 9 costs more than one of 5: one draft of three tokens, and the token after them
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
Count = Callable[[Callable[[], None]], tuple[collections.Counter, collections.Counter]]


@contextmanager
def pretended() -> Iterator[Count]:
    """A function that counts on a pretended device."""
    with PretendDevices() as devices:

        def count(work: Callable[[], None]) -> tuple[collections.Counter, collections.Counter]:
            devices.reset()
            work()
            return devices.launches.copy(), devices.synchronisations.copy()

        yield count


@contextmanager
def profiled() -> Iterator[Count]:
    """A function that counts on a real device, by torch's profiler."""

    def count(work: Callable[[], None]) -> tuple[collections.Counter, collections.Counter]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
            work()
        names = [(event.name, event.device_type) for event in run.events()]
        kernels = collections.Counter(n for n, device in names if device == torch.autograd.DeviceType.CUDA)
        return kernels, collections.Counter(n for n, _ in names if n in _WAITS)

    yield count


def per_token(count: Count, generate: Callable[[int], None]) -> tuple[dict[str, float], dict[str, float]]:
    """Launches and synchronisations of one more token, by line (or by kernel)."""
    generate(_TOKENS[0])
    few, many = (count(lambda length=length: generate(length)) for length in _TOKENS)
    differences = []
    for less, more in zip(few, many, strict=True):
        keys = less.keys() | more.keys()
        differences.append({key: (more[key] - less[key]) / (_TOKENS[1] - _TOKENS[0]) for key in keys})
    return differences[0], differences[1]


def parse(options: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = command.parser("launches", __doc__)
    parser.set_defaults(device="pretended")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--lines", type=int, default=0, help="source lines to print for every setting")
    return parser.parse_args(options)


def main(options: list[str] | None = None) -> list[dict]:
    """Count, print and write the figures, one dictionary per setting; the first is plain decoding."""
    arguments = parse(options)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=arguments.layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()
    real = arguments.device.startswith("cuda")
    results = []
    with profiled() if real else pretended() as count:
        model = make_model(base.to(arguments.device if real else "cuda:0"), "lora")
        prompt = torch.arange(1, 17, device=model.device)[None]
        plain: dict[str, float] = {}
        for name, sampler in {"plain decoding": None, **SETTINGS}.items():

            def generate(length: int, sampler: dict | None = sampler) -> None:
                if sampler is None:
                    base.generate(prompt, max_new_tokens=length, do_sample=False)
                else:
                    model.generate(prompt, max_new_tokens=length, sampler=sampler)

            launches, waits = per_token(count, generate)
            plain = plain or launches
            figures = {"launches": sum(launches.values()), "synchronisations": sum(waits.values())}
            figures["ratio"] = figures["launches"] / sum(plain.values())
            results.append({"setting": name, **figures})
            print(f"{name:26s}" + "  ".join(f"{key} {value:8.2f}" for key, value in figures.items()), flush=True)
            for title, lines in (("launches", launches), ("synchronisations", waits)):
                for line, number in sorted(lines.items(), key=lambda item: -item[1])[: arguments.lines]:
                    if number:
                        print(f"    {title:18s}{line:32s}{number:8.2f}")
    command.write(arguments, results=results)
    return results


if __name__ == "__main__":
    main()
