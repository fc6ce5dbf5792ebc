"""What the study asks of its models beyond worked solutions: answers to GSM8K, MMLU, and the loss of HumanEval.

* `ASKED`: greedy and sampled answers to GSM8K's questions in the training wording, and answers to MMLU's, both by
  `lm_eval`; and HumanEval's loss, by `evaluate`
* `Limits`: how many problems of each, 0 for none
* `write_problems`: rows and `lm_eval` tasks, so that all steps run offline
* `build_steps`: one step for each model and question, after everything else; they are slow on a processor
* `read_answers`: a number for every problem
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training.demo.runner import Step
from training.studies.real.data import read_split
from training.studies.real.plan import METHODS, Settings, evaluation_command, model_folder

ASKED = {
    "greedy": "GSM8K answers, greedy",
    "sampled": "GSM8K answers, sampled",
    "mmlu": "MMLU",
    "humaneval": "HumanEval, loss",
}
LOSSES = ("humaneval",)
BUDGET = 15
SOURCES = {"mmlu": ("cais/mmlu", "all"), "humaneval": ("openai/openai_humaneval", "openai_humaneval")}
_TASKS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt[0].content}}",
        "doc_to_target": "{{completion[0].content.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 320, "do_sample": False},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [",", r"\.$"]}],
    },
    "mmlu": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n"
        + "".join(f"{x}. {{{{choices[{n}]}}}}\n" for n, x in enumerate("ABCD"))
        + "Answer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
}


@dataclass(frozen=True)
class Limits:
    """How many problems are asked, the first of GSM8K's, evenly spaced ones of MMLU's; 0 for none."""

    gsm8k: int = 300
    mmlu: int = 1000
    humaneval: int = 164

    def of(self, asked: str) -> int:
        """One of `ASKED`."""
        return self.gsm8k if asked in ("greedy", "sampled") else getattr(self, asked)


def write_problems(out: Path, limits: Limits, sources: dict[str, str]) -> None:
    """Writes what the steps read: `data/mmlu-N.jsonl`, `data/humaneval.jsonl` and `tasks/*.yaml`.

    Args:
        sources: folder or hub name of `mmlu` and `humaneval`.

    Raises `ValueError` where data are not there.
    """
    mmlu, humaneval = out / "data" / f"mmlu-{limits.mmlu}.jsonl", out / "data" / "humaneval.jsonl"
    if limits.mmlu and not mmlu.exists():
        rows = _read("mmlu", sources["mmlu"])
        step = max(1, len(rows) // limits.mmlu)
        _write(mmlu, [dict(rows[number]) for number in range(0, len(rows), step)][: limits.mmlu])
    if limits.humaneval and not humaneval.exists():
        rows = _read("humaneval", sources["humaneval"])
        _write(humaneval, [{"prompt": row["prompt"], "completion": row["canonical_solution"]} for row in rows])
    (out / "tasks").mkdir(exist_ok=True)
    for name, file in (("gsm8k", out / "data" / "test.jsonl"), ("mmlu", mmlu)):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        task = {"task": f"real_{name}", **data, "num_fewshot": 0, **_TASKS[name]}
        (out / "tasks" / f"real_{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def _read(name: str, source: str) -> Any:
    return read_split(f"{name}_data", source, SOURCES[name][1], "test")


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---- steps -------------------------------------------------------------------------------------------------------


def answers_place(out: Path, asked: str, limits: Limits, name: str) -> Path:
    """Folder of `lm_eval`'s results, or file of a loss."""
    place = out / "scores" / f"{asked}-{limits.of(asked)}" / name
    return place.with_suffix(".json") if asked in LOSSES else place


def build_steps(out: Path, settings: Settings, limits: Limits, methods: list[str]) -> list[Step]:
    """One step for everything that is asked of the base and of some methods, question by question."""
    return [
        _step(out, settings, limits, asked, name) for asked in ASKED if limits.of(asked) for name in ("base", *methods)
    ]


def _step(out: Path, settings: Settings, limits: Limits, asked: str, name: str) -> Step:
    place, count = answers_place(out, asked, limits, name), limits.of(asked)
    needs = () if name == "base" else (f"train {name}",)
    folder = model_folder(out, settings, name)
    if asked in LOSSES:
        rows = ("--rows", out / "data" / f"{asked}.jsonl", "--limit", count, "--budgets", BUDGET)
        return Step(f"{asked} {name} on {count}", evaluation_command(settings, folder, place, *rows), place, needs)
    task = "gsm8k" if asked in ("greedy", "sampled") else asked
    sampled = ("--gen_kwargs", "do_sample=true,temperature=1.0") if asked == "sampled" else ()
    command = (
        *(sys.executable, "-m", "lm_eval", *_model(folder, settings, name)),
        *("--tasks", f"real_{task}", "--include_path", str(out / "tasks"), "--limit", str(count), *sampled),
        *("--apply_chat_template", "--batch_size", "8", "--device", "cpu", "--seed", "0"),
        *("--output_path", str(place), "--log_samples"),
    )
    return Step(f"{asked} {name} on {count}", command, place, needs, kind=asked)  # begins anew if it is killed


def _model(folder: Path, settings: Settings, name: str) -> tuple[str, ...]:
    """Arguments of `lm_eval` that choose the model."""
    options = METHODS[name].options if name in METHODS else {}
    l2d = options.get("method") == "l2d"
    budget = f",diffusion_budget={BUDGET}" if l2d and not options.get("noise_free") else ""
    kind = "l2d" if l2d else "hf"
    return ("--model", kind, "--model_args", f"pretrained={folder},dtype={settings.dtype}{budget}")


# ---- reading -----------------------------------------------------------------------------------------------------


def read_answers(out: Path, asked: str, limits: Limits, name: str) -> dict[str, list[float]] | None:
    """Of every problem the score in `values`, of what counts as often as `counts` says; `None` where not measured."""
    place = answers_place(out, asked, limits, name)
    if asked in LOSSES:
        if not place.exists():
            return None
        content = json.loads(place.read_text(encoding="utf-8"))
        (score,) = content["scores"].values()
        return {"values": score["nll"], "counts": content["targets"]}
    files = sorted(place.glob("*/samples_*.jsonl"))
    if not files:
        return None
    lines = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: line["doc_id"])
    metric = "acc" if asked == "mmlu" else "exact_match"
    return {"values": [float(line[metric]) for line in lines], "counts": [1] * len(lines)}
