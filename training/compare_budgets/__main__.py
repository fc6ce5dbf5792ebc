"""Does more compute help this checkpoint? `python -m training.compare_budgets CHECKPOINT --data validation.jsonl`

* everything that can be refused is refused before data and weights are loaded
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2d.checkpoint.opening import Checkpoint, open_checkpoint
from l2d.cli.parser import Parser
from l2d.cli.session import load_session
from l2d.sampler_config import single_evaluation
from training.compare_budgets.measuring import BUDGETS, GATES, TIMES, Measurement, choose_best, measure
from training.compare_budgets.report import report, told
from training.compare_budgets.rows import read_rows


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What was asked for, checked: the checkpoint, and the sampler settings of the single evaluations, of the budgets,
    and of the largest of these with gates; `early_confidence` asks the best single evaluation."""

    checkpoint: Checkpoint
    singles: list[dict[str, Any]]
    budgets: list[dict[str, Any]]
    gates: list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; user errors end with one line on standard error and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        plan = _check(options)
        ids, mask, is_target = read_rows(options, plan.checkpoint)
        session = load_session(plan.checkpoint, dtype=options.dtype, device=options.device)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    ids, mask, is_target = (part.to(session.model.device) for part in (ids, mask, is_target))

    def measured(samplers: list[dict[str, Any]]) -> list[Measurement]:
        return [told(measure(session.model, ids, mask, is_target, one, options.batch_size)) for one in samplers]

    singles, budgets = measured(plan.singles), measured(plan.budgets)
    best = choose_best(singles).sampler.final_time
    gates = measured([{**one, "early_time": best} if one["early_confidence"] < 1 else one for one in plan.gates])
    report(options, plan.checkpoint, singles, budgets, gates)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training.compare_budgets", description="Does more compute help this checkpoint?")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub name of an L2D checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a checkpoint on the hub")
    parser.add_argument("--data", required=True, help="file, folder or hub name of data that were not trained on")
    parser.add_argument("--split", default="train", help="of the data; files have the split train (the default)")
    parser.add_argument("--dataset_config", help="configuration (subset) of the data set")
    parser.add_argument("--columns", help="JSON, as in a recipe; default: those of the checkpoint's recipe.yaml")
    parser.add_argument("--times", help=f"of single evaluations; default: {_joined(TIMES)}")
    parser.add_argument("--budgets", help=f"evaluations per token; default: {_joined(BUDGETS)}")
    parser.add_argument(
        "--skip_confidence",
        "--skip-confidence",
        help="the base's answers from these probabilities on, at the largest budget; default: none",
    )
    parser.add_argument(
        "--early_confidence",
        "--early-confidence",
        help="the best single evaluation's answers from these probabilities on, at the largest budget; default: none",
    )
    parser.add_argument("--limit", type=int, help="use the first N examples only")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=32)
    parser.add_argument("--base", help="name or folder of the base, where it is not where it was")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the base's weights")
    parser.add_argument("--device", help="for example cpu or cuda:0")
    parser.add_argument("--json", help="file to write the figures to")
    return parser


def _joined(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _check(options: argparse.Namespace) -> _Plan:
    """Everything that can be refused without data and weights. Raises `ValueError`."""
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be a whole number of at least 1.")
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(f"json={options.json!r} is in a folder that does not exist: make it, or name another file.")
    checkpoint = open_checkpoint(options.checkpoint, options.revision, options.base)
    noise_free = checkpoint.settings.noise_free
    times = _numbers("times", options.times, float, (1.0,) if noise_free else TIMES)
    budgets = _numbers("budgets", options.budgets, int, (1,) if noise_free else BUDGETS)
    asked = {name: text for name in GATES if (text := getattr(options, name)) is not None}
    ungated = dict.fromkeys(GATES, 1.0) if asked else {}  # compared with no gate, whatever the checkpoint stores
    singles = [{**single_evaluation(time), **ungated} for time in times]
    budget_samplers = [{"budget": budget, **ungated} for budget in budgets]
    largest = singles[-1] if noise_free else budget_samplers[-1]
    gates = [gate for name, text in asked.items() for gate in _gates(name, text, largest)]
    for sampler in [*singles, *budget_samplers, *gates]:
        settings = checkpoint.sampler(**sampler)
        if settings.adaptive and not settings.is_base:
            raise ValueError(
                f"budgets={_joined(budgets)} cannot be met by solver={settings.solver!r}, which this checkpoint "
                "stores: give budgets=1, or store another solver in its config.json."
            )
    checkpoint.check_files()
    return _Plan(checkpoint, singles, budget_samplers, gates)


def _gates(name: str, text: str, sampler: dict[str, Any]) -> list[dict[str, Any]]:
    """`sampler` with a gate at each probability of a list with commas."""
    if sampler["budget"] == 1:
        raise ValueError(f"{name} says where to spend a budget, and budgets=1 has none: give a larger one.")
    return [{**sampler, name: p} for p in _numbers(name, text, float, (0.5, 0.9))]


def _numbers(name: str, text: str | None, kind: type, default: Sequence[float]) -> list[Any]:
    """Distinct numbers of a list with commas, in rising order."""
    if text is None:
        return list(default)
    try:
        values = sorted({kind(word) for word in text.split(",")})
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(
            f"{name}={text!r} must be {what} with commas between them, e.g. {_joined(default)}."
        ) from error
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name}={text!r} must be finite numbers.")
    return values


if __name__ == "__main__":
    main()
