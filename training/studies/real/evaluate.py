"""Everything that the study asks of one model about rows that it was not trained on, in one process.

    python -m training.studies.real.evaluate MODEL OUT.json --base BASE --rows test.jsonl --limit 200

* `open_model`: an L2D checkpoint, or any other model as the base of a fresh path, whose T = 1 it is: all models are
  scored by the same code
* `evaluate`: per row, right targets and loss at every budget and at one evaluation at its best time, which other rows
  choose; with what they cost
* `decoding_cost`: the same cost where tokens are decoded, in plain decode steps

Scored by teacher forcing, as `training.compare_budgets` does, with speculation, which gives the plain solver's result.
What is measured is written after every setting: a killed evaluation continues.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from l2d import L2DConfig, L2DForCausalLM
from l2d.checkpoint.bases import base_configuration, load_base
from l2d.sampler_config import NOISE_FREE_SAMPLER, single_evaluation
from training.compare_budgets.measuring import Measurement, best_single_evaluation, measure
from training.studies.packing import write_json
from training.studies.real.data import read_part

BUDGETS = (3, 7, 15, 31)  # T = 1 is the base, which is measured itself
GATED_BUDGET = 15
EARLY_END = 0.75  # of trajectories of the same budget that end before t = 1, where the input is the path's own choice
BATCH = 8  # rows at a time
PROMPTS, TOKENS = 4, 32  # that are decoded to measure what decoding costs

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, mask and targets (E, S)."""


def open_model(folder: Path, base: Path, dtype: torch.dtype | None) -> tuple[L2DForCausalLM, bool]:
    """The model of a folder, and whether it is an L2D checkpoint, on `base`; adapters are merged into theirs."""
    options = {} if dtype is None else {"dtype": dtype}
    if base_configuration(folder).model_type == "l2d":
        return L2DForCausalLM.from_pretrained(folder, base=base, **options), True
    return L2DForCausalLM.from_base(load_base(folder, **options), L2DConfig(lora_rank=1)).eval(), False


def samplers(
    model: L2DForCausalLM, budgets: list[int], single: float | None, gates: list[float], early_gates: list[float]
) -> dict[str, dict[str, Any]]:
    """Name -> sampler settings of all that is measured of an L2D checkpoint.

    Args:
        single: time of one evaluation, which `early_gates`, of `early_confidence`, ask first. gates: of
            `skip_confidence`. Both at `GATED_BUDGET`.
    """
    if model.config.noise_free:
        return {"single": dict(NOISE_FREE_SAMPLER)}
    chosen = {} if single is None else {"single": single_evaluation(single)}
    whole: dict[str, Any] = {"budget": GATED_BUDGET}
    ended: dict[str, Any] = {**whole, "final_time": EARLY_END}
    gated = {gated_setting(p): {**whole, "skip_confidence": p} for p in gates}
    if single is not None:
        for p in early_gates:
            gate = {"early_confidence": p, "early_time": single}
            gated |= {
                early_gate(whole_setting(), p): {**whole, **gate},
                early_gate(ended_setting(), p): {**ended, **gate},
            }
    early = {ended_setting(): ended} if GATED_BUDGET in budgets else {}
    return {**{f"T{budget}": {"budget": budget} for budget in budgets}, **early, **gated, **chosen}


def whole_setting() -> str:
    """What results call trajectories that are not gated."""
    return f"T{GATED_BUDGET}"


def ended_setting() -> str:
    """What results call those that end early."""
    return f"{whole_setting()}-t{EARLY_END:g}"


def gated_setting(p: float) -> str:
    """What results call a gate by the base's confidence."""
    return f"{whole_setting()}-p{p:g}"


def early_gate(setting: str, p: float) -> str:
    """What results call a gate, of one of these trajectories, by the confidence of one evaluation."""
    return f"{setting}-e{p:g}"


def record(measured: Measurement) -> dict[str, Any]:
    """Plain values: per row right targets and loss in nats, and evaluations and passes per target."""
    targets = measured.counts.sum().item()
    return {
        "right": measured.right.int().tolist(),
        "nll": [round(value, 4) for value in measured.nll_sums.tolist()],
        "evaluations": round(measured.computed.sum().item() / targets, 4),
        "passes": round(measured.passes.sum().item() / targets, 4),
    }


def decoding_cost(model: L2DForCausalLM, rows: Rows, sampler: dict[str, Any]) -> dict[str, float]:
    """What a greedily decoded token costs on one thread: evaluations, passes, and processor time in plain decode steps.

    The base's own greedy decoding of as many tokens from the same prompts is what the time is divided by.
    """
    ids, _, targets = rows
    ours, plain, evaluations, passes = 0.0, 0.0, 0, 0
    length: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    for row, first in zip(ids[:PROMPTS], targets[:PROMPTS].int().argmax(1).tolist(), strict=True):
        prompt = row[None, :first]
        begun = time.process_time()
        model.base.generate(prompt, attention_mask=torch.ones_like(prompt), **length)
        between = time.process_time()
        _, made = model.generate(prompt, sampler=sampler, return_record=True, **length)
        ours, plain = ours + time.process_time() - between, plain + between - begun
        evaluations += sum(map(sum, made.nfe_computed))
        passes += sum(map(sum, made.passes))
    tokens = TOKENS * len(ids[:PROMPTS])
    return {"evaluations": evaluations / tokens, "passes": passes / tokens, "plain_steps": round(ours / plain, 3)}


class Progress:
    """What was measured, in a file beside the final one after every part, so that nothing is measured twice."""

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.draft = file, file.with_name(f"{file.stem}-unfinished.json")
        self.parts: dict[str, Any] = {"settings": settings}
        if self.draft.exists():
            found = json.loads(self.draft.read_text(encoding="utf-8"))
            self.parts = found if found["settings"] == settings else self.parts

    def measured(self, name: str, measure: Any) -> Any:
        """The part `name`: measured now, or before."""
        if name not in self.parts:
            self.parts[name] = measure()
            write_json(self.parts, self.draft)
        return self.parts[name]

    def finish(self, content: dict[str, Any]) -> None:
        """Write the final file."""
        write_json(content, self.file)
        self.draft.unlink(missing_ok=True)


def evaluate(
    model: L2DForCausalLM,
    l2d: bool,
    rows: Rows,
    choosing: Rows | None,
    budgets: list[int],
    gates: list[float],
    early_gates: list[float],
    progress: Progress,
) -> dict[str, Any]:
    """Everything that is measured of a model, as plain values.

    Args:
        l2d: whether it is more than the base of a fresh path.
        rows: scored. choosing: rows that choose the time of one evaluation, which else is not measured.
    """
    times: dict[str, float] = {}
    single = None
    if l2d and choosing is not None and not model.config.noise_free:
        times = progress.measured("times", lambda: _times(model, choosing))
        single = times["best"]
    wanted: dict[str, dict[str, Any]] = {"plain": {"budget": 1}}
    if l2d:
        wanted = samplers(model, budgets, single, gates, early_gates)
    scores = {}
    for name, sampler in wanted.items():

        def measured(sampler: dict[str, Any] = sampler) -> dict[str, Any]:
            found = record(measure(model, *rows, sampler, BATCH))
            return {**found, "decoding": decoding_cost(model, rows, sampler)} if l2d else found

        scores[name] = progress.measured(name, measured)
        share = sum(scores[name]["right"]) / rows[2].sum().item()
        print(f"{name}: token accuracy {share:.4f}", flush=True)
    return {"targets": rows[2].sum(1).tolist(), "times": times, "scores": scores}


def _times(model: L2DForCausalLM, rows: Rows) -> dict[str, float]:
    """Loss of one evaluation at each time, and the best time."""
    best, tried = best_single_evaluation(model, *rows, batch_size=BATCH)
    losses = {f"{one.sampler.final_time:g}": round(one.nll.value, 5) for one in tried}
    return {**losses, "best": best.sampler.final_time}


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m training.studies.real.evaluate", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a checkpoint, an adapter or a plain model")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base, with the tokenizer")
    parser.add_argument("--rows", type=Path, required=True, help="rows to score")
    parser.add_argument("--limit", type=int, help="of these, the first so many")
    parser.add_argument("--choosing", type=Path, help="rows that choose the time of one evaluation (default: none)")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    for name, gate in (("--gates", "skip_confidence"), ("--early-gates", "early_confidence")):
        parser.add_argument(name, default="", help=f"of {gate}, at T = {GATED_BUDGET} (default: none)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all models")
    options = parser.parse_args(arguments)
    settings = {name: str(value) for name, value in vars(options).items()}
    torch.set_num_threads(1)
    model, l2d = open_model(options.model, options.base, getattr(torch, options.dtype))
    rows = read_part(options.rows, options.base, options.limit)
    choosing = None if options.choosing is None else read_part(options.choosing, options.base)
    progress = Progress(options.out, settings)
    budgets = [int(word) for word in options.budgets.split(",")]
    gates, early_gates = (
        [float(word) for word in text.split(",") if word] for text in (options.gates, options.early_gates)
    )
    found = evaluate(model, l2d, rows, choosing, budgets, gates, early_gates, progress)
    progress.finish({"model": options.model.name, **found})


if __name__ == "__main__":
    main()
