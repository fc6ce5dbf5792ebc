"""What the comparison says: a table, verdicts, and the arguments that go with them.

- `report`: all of it, printed and as JSON; `told`: progress
- `comparison`, `gate_verdict`: verdicts, one sentence each
- `model_args`: arguments of `lm_eval` for one evaluation
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from l2d.checkpoint.opening import Checkpoint
from l2d.sampler_config import SINGLE, SamplerConfig
from l2d.statistics import shown, verdict
from training.compare_budgets.measuring import (
    Measurement,
    cheapest_gate,
    choose_best,
    compare,
    compare_tokens,
)


def told(measurement: Measurement) -> Measurement:
    """The measurement, which is told where someone is looking."""
    if sys.stderr.isatty():
        print(setting_name(measurement), f"exact match {measurement.exact_match.value:.3f}", file=sys.stderr)
    return measurement


def report(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    singles: list[Measurement],
    budgets: list[Measurement],
    gates: list[Measurement],
) -> None:
    """Print table, best time, arguments and verdicts, and write them to `options.json` if that is set."""
    best, largest = choose_best(singles), budgets[-1]
    arguments = model_args(checkpoint, best.sampler)
    sentence = comparison(largest, best)
    print(table([*budgets, *gates, *singles], best))
    print(f"\nbest single evaluation: t = {best.sampler.final_time:g}")
    print(f"  lm_eval --model l2d --model_args {arguments} --tasks ...")
    print(sentence)
    ungated = singles[-1] if largest.sampler.is_base else largest
    if gates:
        print(gate_verdict(gates, ungated))
    chosen = ["time"] * (len(singles) > 1) + ["gate"] * (len(gates) > 1)
    if chosen:
        what = f"{' and '.join(chosen)} {'were' if len(chosen) > 1 else 'was'}"
        print(f"The {what} chosen on these data: judge it on other data before you believe the difference.")
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
        "gates": [{**one.record(), "difference": compare_tokens(one, ungated).record()} for one in gates],
    }
    draft = f"{options.json}.partial"
    Path(draft).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, options.json)


# ---- verdicts ----------------------------------------------------------------------------------------------------


def comparison(budget: Measurement, single: Measurement) -> str:
    """In one sentence, whether a budget is better than one evaluation, worse, or not told apart from it."""
    difference = compare(budget, single)
    word = {"better": "better than", "worse": "worse than"}.get(verdict(difference), "not told apart from")
    return (
        f"The largest budget, T = {budget.sampler.budget}, is {word} one evaluation at t = "
        f"{single.sampler.final_time:g}: exact match {budget.exact_match.value:.3f} against "
        f"{single.exact_match.value:.3f}, paired difference {shown(difference, signed=True)} (95 % interval)."
    )


def gate_verdict(gates: list[Measurement], ungated: Measurement) -> str:
    """In one sentence, which gate computes least at the accuracy of `ungated`, and how much less."""
    gate = cheapest_gate(gates, ungated)
    if gate is None:
        return f"No gate keeps token accuracy within one standard error of {setting_name(ungated)}."
    less, all_of_it = gate.evaluations.value, ungated.evaluations.value
    sampler = gate.sampler
    if sampler.early_confidence < 1:
        arguments = f"early_confidence={sampler.early_confidence:g},early_time={sampler.early_time:g}"
    else:
        arguments = f"skip_confidence={sampler.skip_confidence:g}"
    return (
        f"{arguments} computes {less:.2f} evaluations a token in place of "
        f"{all_of_it:.2f}, the fewest within one standard error: token accuracy "
        f"{shown(compare_tokens(gate, ungated), 4, signed=True)} (95 % interval)."
    )


def model_args(checkpoint: Checkpoint, sampler: SamplerConfig) -> str:
    """Arguments of `lm_eval --model l2d` for one evaluation, beside what the checkpoint stores."""
    stored = checkpoint.settings.default_sampler()
    named = {"diffusion_budget": "budget", "solver": "solver", "final_time": "final_time"}
    named |= {
        name: name for name in ("start_time", "mc_samples", "early_confidence") if getattr(stored, name) != SINGLE[name]
    }
    where = [f"pretrained={checkpoint.name}"]
    where += [f"revision={checkpoint.revision}"] if checkpoint.revision is not None else []
    return ",".join([*where, *(f"{name}={_word(getattr(sampler, f))}" for name, f in named.items())])


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- the table ---------------------------------------------------------------------------------------------------


def table(measurements: list[Measurement], best: Measurement) -> str:
    """One line per setting with 95 % intervals; the last column compares exact match with the best single one's.

    Evaluations are those that the network computed for a target.
    """
    header = ["setting", "evaluations", "exact match", "token accuracy", "NLL per token", "exact match - best single"]
    lines = [header]
    for one in measurements:
        cells = [shown(estimate, 4) for estimate in (one.exact_match, one.accuracy, one.nll)]
        last = "best" if one is best else shown(compare(one, best), 4, signed=True)
        lines.append([setting_name(one), f"{one.evaluations.value:.2f}", *cells, last])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def setting_name(one: Measurement) -> str:
    """What the table calls a setting."""
    sampler = one.sampler
    gate = f", base from p = {sampler.skip_confidence:g}" if sampler.skip_confidence < 1 else ""
    gate += f", one evaluation from p = {sampler.early_confidence:g}" if sampler.early_confidence < 1 else ""
    if sampler.solver == SINGLE["solver"] and sampler.budget == SINGLE["budget"]:
        return f"one evaluation, t = {sampler.final_time:g}{gate}"
    return "T = 1 (the base)" if sampler.is_base else f"T = {sampler.budget}{gate}"
