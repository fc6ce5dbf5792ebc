"""Does more compute help this checkpoint? The budgets against one evaluation at its best time.

    python -m training.compare_budgets CHECKPOINT --data validation.jsonl

- `measure`: token accuracy, exact match and loss of one sampler setting, by teacher forcing
- `best_single_evaluation`: the time at which one evaluation of the path does best
- `compare`, `comparison`: a budget against one evaluation, paired by example, with a 95 % interval
- `main`: the table, the best time with its `lm_eval` arguments, and the verdict

An answer is exactly right when every one of its tokens, the end token included, is the most likely one given the true
tokens before it: then, and only then, greedy decoding gives that answer. So one pass over the data measures what
decoding would, and one setting costs about as much as scoring does.

Legend: E examples, S positions.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2d.checkpoint.opening import Checkpoint, open_checkpoint
from l2d.cli.parser import Parser
from l2d.cli.session import load_session
from l2d.sampler_config import SamplerConfig
from l2d.statistics import Estimate, Paired, mean, paired, ratio, shown, verdict

if TYPE_CHECKING:
    import torch

    from l2d.modeling import L2DForCausalLM
    from training.data.options import DataArguments

TIMES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
BUDGETS = (1, 3, 7, 15, 31)
_SINGLE = {"solver": "euler", "budget": 2, "start_time": 0.0, "mc_samples": 1}


def single_evaluation(time: float) -> dict[str, Any]:
    """Sampler settings of one evaluation of the path, at `time`: the one before it, at t = 0, is the base's own."""
    return {**_SINGLE, "final_time": time}


# ---- measuring ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one sampler setting reached, per example (E,) float64.

    Attributes:
        counts, right: targets, and correct ones. nll_sums: summed negative log-probability of the targets in nats.
        computed, passes: evaluations that the network computed, and batched passes of the path, summed over targets.
    """

    sampler: SamplerConfig
    counts: "torch.Tensor"
    right: "torch.Tensor"
    nll_sums: "torch.Tensor"
    computed: "torch.Tensor"
    passes: "torch.Tensor"

    @property
    def exact(self) -> "torch.Tensor":
        """(E,) float64: 1 where the whole answer is right."""
        return (self.right == self.counts).double()

    @property
    def accuracy(self) -> Estimate:
        """Share of right tokens, with the error over examples."""
        return ratio(self.right.numpy(), self.counts.numpy())

    @property
    def exact_match(self) -> Estimate:
        """Share of answers that are right as a whole."""
        return mean(self.exact.numpy())

    @property
    def nll(self) -> Estimate:
        """Mean negative log-probability of a target in nats, with the error over examples."""
        return ratio(self.nll_sums.numpy(), self.counts.numpy())

    def record(self) -> dict[str, Any]:
        """Plain values; an error is `None` where it is not known, as for one example."""
        values: dict[str, Any] = {"sampler": self.sampler.to_dict()}
        for name in ("accuracy", "exact_match", "nll"):
            estimate: Estimate = getattr(self, name)
            values |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
        return values


def measure(
    model: "L2DForCausalLM",
    ids: "torch.Tensor",
    mask: "torch.Tensor",
    is_target: "torch.Tensor",
    sampler: dict[str, Any],
    batch_size: int = 32,
) -> Measurement:
    """Score the answers of right-padded rows.

    Args:
        ids, mask, is_target: (E, S), tokens, which of them are no padding, and which are targets.
        sampler: changes to the checkpoint's sampler settings.
        batch_size: rows at a time; changes nothing but memory and speed.

    Raises `ValueError` for a row without a target, and for settings that the model cannot follow.
    """
    import torch

    settings, counts = model.sampler(sampler), is_target.sum(1).double().cpu()
    if not bool((counts > 0).all()):
        raise ValueError("is_target marks no target in some row: leave out examples without an answer.")
    right, nll_sums, computed, passes = (torch.zeros_like(counts) for _ in range(4))
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        width = int(mask[rows].sum(1).max())
        targets = is_target[rows, :width].bool()
        scored = model.score(ids[rows, :width], mask[rows, :width], continuation_mask=targets, sampler=settings)
        right[rows] = (scored.greedy & targets).sum(1).double().cpu()
        nll_sums[rows] = -scored.logprobs.double().masked_fill(~targets, 0).sum(1).cpu()
        computed[rows] = scored.nfe_computed.sum(1).double().cpu()
        passes[rows] = scored.passes.sum(1).double().cpu()
    return Measurement(settings, counts, right, nll_sums, computed, passes)


def best_single_evaluation(
    model: "L2DForCausalLM",
    ids: "torch.Tensor",
    mask: "torch.Tensor",
    is_target: "torch.Tensor",
    times: Sequence[float] = TIMES,
    batch_size: int = 32,
) -> tuple[Measurement, list[Measurement]]:
    """The best of `times` as `choose_best` says, and what all of them reached.

    Arguments as for `measure`; the time is `Measurement.sampler.final_time`. Use data that were not trained on.
    """
    measurements = [measure(model, ids, mask, is_target, single_evaluation(time), batch_size) for time in times]
    return choose_best(measurements), measurements


def choose_best(measurements: Sequence[Measurement]) -> Measurement:
    """The lowest loss among those within one paired standard error of the highest exact match.

    The highest exact match alone would be chosen by noise: times differ less in it than examples do.
    """
    highest = max(measurements, key=lambda one: one.exact_match.value)
    behind = [(one, compare(highest, one)) for one in measurements]
    close = [one for one, difference in behind if difference.value <= (difference.stderr or 0.0)]
    return min(close, key=lambda one: one.nll.value)


def compare(one: Measurement, other: Measurement) -> Paired:
    """Exact match of `one` minus that of `other` on the same examples."""
    return paired(one.exact.numpy(), other.exact.numpy())


def comparison(budget: Measurement, single: Measurement) -> str:
    """In one sentence, whether a budget is better than one evaluation, worse, or not told apart from it."""
    difference = compare(budget, single)
    word = {"better": "better than", "worse": "worse than"}.get(verdict(difference), "not told apart from")
    return (
        f"The largest budget, T = {budget.sampler.budget}, is {word} one evaluation at t = "
        f"{single.sampler.final_time:g}: exact match {budget.exact_match.value:.3f} against "
        f"{single.exact_match.value:.3f}, paired difference {shown(difference, signed=True)} (95 % interval)."
    )


# ---- the command -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What was asked for, checked: the checkpoint, and the sampler settings of the single evaluations and of the
    budgets."""

    checkpoint: Checkpoint
    singles: list[dict[str, Any]]
    budgets: list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; user errors end with one line on standard error and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        plan = _check(options)
        ids, mask, is_target = _read_data(options, plan.checkpoint)
        session = load_session(plan.checkpoint, dtype=options.dtype, device=options.device)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    ids, mask, is_target = (part.to(session.model.device) for part in (ids, mask, is_target))
    singles, budgets = (
        [_told(measure(session.model, ids, mask, is_target, sampler, options.batch_size)) for sampler in part]
        for part in (plan.singles, plan.budgets)
    )
    report(options, plan.checkpoint, singles, budgets)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training.compare_budgets", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub name of an L2D checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a checkpoint on the hub")
    parser.add_argument("--data", required=True, help="file, folder or hub name of data that were not trained on")
    parser.add_argument("--split", default="train", help="of the data; files have the split train (the default)")
    parser.add_argument("--dataset_config", help="configuration (subset) of the data set")
    parser.add_argument("--columns", help="JSON, as in a recipe; default: those of the checkpoint's recipe.yaml")
    parser.add_argument("--times", help=f"of single evaluations; default: {_joined(TIMES)}")
    parser.add_argument("--budgets", help=f"evaluations per token; default: {_joined(BUDGETS)}")
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
    singles, budget_samplers = [single_evaluation(time) for time in times], [{"budget": budget} for budget in budgets]
    for sampler in [*singles, *budget_samplers]:
        settings = checkpoint.sampler(**sampler)
        if settings.adaptive and not settings.is_base:
            raise ValueError(
                f"budgets={_joined(budgets)} cannot be met by solver={settings.solver!r}, which this checkpoint "
                "stores: give budgets=1, or store another solver in its config.json."
            )
    checkpoint.check_files()
    return _Plan(checkpoint, singles, budget_samplers)


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


def _read_data(
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


def _told(measurement: Measurement) -> Measurement:
    """Progress, where someone is looking."""
    if sys.stderr.isatty():
        print(_name(measurement), f"exact match {measurement.exact_match.value:.3f}", file=sys.stderr)
    return measurement


# ---- the report --------------------------------------------------------------------------------------------------


def report(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    singles: list[Measurement],
    budgets: list[Measurement],
) -> None:
    """Print table, best time, arguments and verdict, and write them to `options.json` if that is set."""
    best, largest = choose_best(singles), budgets[-1]
    arguments = model_args(checkpoint, best.sampler)
    sentence = comparison(largest, best)
    print(table([*budgets, *singles], best))
    print(f"\nbest single evaluation: t = {best.sampler.final_time:g}")
    print(f"  lm_eval --model l2d --model_args {arguments} --tasks ...")
    print(sentence)
    if len(singles) > 1:
        print("The time was chosen on these data: judge both on other data before you believe the difference.")
    if options.json is None:
        return
    content = {
        "checkpoint": checkpoint.name,
        "revision": checkpoint.revision,
        "commit": checkpoint.commit,
        "data": options.data,
        "examples": len(best.counts),
        "targets": int(best.counts.sum()),
        "best_time": best.sampler.final_time,
        "model_args": arguments,
        "verdict": sentence,
        "difference": compare(largest, best).record(),
        "single_evaluations": [one.record() for one in singles],
        "budgets": [one.record() for one in budgets],
    }
    draft = f"{options.json}.partial"
    Path(draft).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, options.json)


def model_args(checkpoint: Checkpoint, sampler: SamplerConfig) -> str:
    """Arguments of `lm_eval --model l2d` for one evaluation, beside what the checkpoint stores."""
    stored = checkpoint.settings.default_sampler()
    named = {"diffusion_budget": "budget", "solver": "solver", "final_time": "final_time"}
    named |= {name: name for name in ("start_time", "mc_samples") if getattr(stored, name) != _SINGLE[name]}
    where = [f"pretrained={checkpoint.name}"]
    where += [f"revision={checkpoint.revision}"] if checkpoint.revision is not None else []
    return ",".join([*where, *(f"{name}={_word(getattr(sampler, f))}" for name, f in named.items())])


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(measurements: list[Measurement], best: Measurement) -> str:
    """One line per setting with 95 % intervals; the last column compares exact match with the best single one's."""
    lines = [["setting", "exact match", "token accuracy", "NLL per token", "exact match - best single"]]
    for one in measurements:
        cells = [shown(estimate, 4) for estimate in (one.exact_match, one.accuracy, one.nll)]
        lines.append([_name(one), *cells, "best" if one is best else shown(compare(one, best), 4, signed=True)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _name(one: Measurement) -> str:
    sampler = one.sampler
    if sampler.solver == _SINGLE["solver"] and sampler.budget == _SINGLE["budget"]:
        return f"one evaluation, t = {sampler.final_time:g}"
    return "T = 1 (the base)" if sampler.is_base else f"T = {sampler.budget}"


if __name__ == "__main__":
    main()
