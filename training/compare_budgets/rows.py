"""The examples that a checkpoint is measured on: read as a recipe reads them.

- `read_rows`: tokens, mask and targets of what the command was given
- `encode_split`: the same before padding, of any data that a recipe could name

Legend: E examples, S positions.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2d.checkpoint.opening import Checkpoint

if TYPE_CHECKING:
    import torch

    from training.data.options import DataArguments


def read_rows(
    options: argparse.Namespace, checkpoint: Checkpoint
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Tokens, mask and targets (E, S) of the examples. Raises `ValueError`."""
    import torch

    from l2d.checkpoint.loading import load_tokenizer
    from training.budget_metrics import padded
    from training.data.options import DataArguments

    recipe = _recipe(checkpoint.folder)
    data = DataArguments(
        dataset=options.data,
        dataset_config=[options.dataset_config] if options.dataset_config else None,
        train_split=options.split,
        columns=options.columns if options.columns is not None else recipe.get("columns"),
        unroll=recipe.get("unroll", False),
    )
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {checkpoint.name!r} has no end-of-sequence token: set it in its folder.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded, summary = encode_split(data, tokenizer, checkpoint.settings.longest or sys.maxsize, options.limit)
    print(summary, flush=True)
    return padded(list(encoded), tokenizer.pad_token_id, torch.device("cpu"))


def encode_split(data: "DataArguments", tokenizer: Any, longest: int, limit: int | None = None) -> tuple[Any, str]:
    """The first `limit` examples of `data` with `input_ids` and `labels`, without those that are longer than
    `longest`, and a line that says how many there are. Raises `ValueError`."""
    from training.config import L2DTrainingConfig
    from training.data.loading import load_split
    from training.data.ready import encode

    examples = load_split("data", data)
    if limit is not None:
        examples = examples.select(range(min(limit, len(examples))))
    training = L2DTrainingConfig(output_dir="unused", report_to="none", too_long="drop", bf16=False)
    return encode(examples, tokenizer, training, longest, "data")


def _recipe(folder: str) -> dict[str, Any]:
    """What the checkpoint was trained with, where it says so."""
    import yaml

    file = Path(folder) / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    return recipe if isinstance(recipe, dict) else {}
