"""Write a base as a plain model: `python -m l2d dequantize SOURCE TARGET [--gguf-file NAME] [--dtype DTYPE]`.

A GGUF file or a quantized model becomes a model of plain numbers, and an adapter is merged into its base.
"""

import argparse
import os

from l2d.checkpoint.opening import check_base
from l2d.cli.parser import check_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m l2d dequantize`."""
    parser.add_argument("source", metavar="SOURCE", help="folder or hub name of a model or of a PEFT adapter")
    parser.add_argument("target", metavar="TARGET", help="folder to write, which must be new or empty")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the hub")
    parser.add_argument("--gguf-file", metavar="NAME", help="GGUF file in the source to read")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; by default that of the source"
    )


def run(given: argparse.Namespace) -> None:
    """Write model, generation settings and tokenizer into the target. Raises `ValueError`."""
    if os.path.isdir(given.target) and os.listdir(given.target):
        raise ValueError(f"TARGET={given.target!r} holds something: name a new folder.")
    check_folder("TARGET", given.target)
    check_base(given.source, given.gguf_file)
    import torch

    from l2d.checkpoint.bases import load_plain_base
    from l2d.checkpoint.loading import load_tokenizer

    place = {"revision": given.revision, "gguf_file": given.gguf_file}
    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    base = load_plain_base(given.source, dtype=dtype, **place)
    tokenizer = load_tokenizer(given.source, **place)
    base.save_pretrained(given.target)
    tokenizer.save_pretrained(given.target)
    print(
        f"{given.target}: {base.config.model_type}, {base.num_parameters():,} weights in {base.dtype}".replace(
            "torch.", ""
        )
    )
