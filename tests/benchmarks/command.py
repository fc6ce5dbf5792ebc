"""What the benchmarks' command lines have in common: the base, where it runs, and how figures are written.

- `parser`: `--shape`, `--threads`, `--device`, `--dtype`, `--json`
- `start`: sets threads and products, and makes the base
- `write`: settings and figures as JSON
- `synchronize`: waits for the device
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tests.benchmarks.models import SHAPES, make_base


def parser(name: str, description: str | None, products: bool = False) -> argparse.ArgumentParser:
    """A parser for `tests.benchmarks.NAME`; the first line of `description` is shown.

    `products`: with the switch for oneDNN, and `--changes` for the path.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}", description=(description or "").partition("\n")[0]
    )
    made.add_argument("--shape", choices=SHAPES, default="135m")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    made.add_argument("--json", type=Path, help="file for settings and figures")
    if products:
        made.add_argument("--changes", type=float, help="changes per token to scale the path to (default: at least 1)")
        made.add_argument("--no-onednn", dest="onednn", action="store_false", help="PyTorch's own products everywhere")
    return made


def start(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """The base of a command."""
    torch.set_num_threads(arguments.threads)
    torch.backends.mkldnn.enabled = getattr(arguments, "onednn", True)
    return make_base(arguments.shape, getattr(torch, arguments.dtype), arguments.device)


def write(arguments: argparse.Namespace, **figures: Any) -> None:
    """Settings and figures to the file of `--json`, if one was named."""
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "memory_of")}
        arguments.json.write_text(json.dumps({**settings, **figures}, indent=1) + "\n", encoding="utf-8")


def synchronize(device: str) -> None:
    """Wait for the accelerator, if there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
