"""`python -m lm_eval_ext.sweep FILE.yaml`: a grid of settings, one output folder each, resumed where it was stopped.

    output: runs/sweep
    tasks: [gsm8k, humaneval_instruct]
    base: true                              # also the base, which is budget 1
    model_args: {pretrained: CHECKPOINT}    # of every setting
    points:                                 # settings by name: model args beside those above
      best_of_8: {token_search: best_of_8}
    trajectory: true                        # also the trajectory of model_args, ended at each of its time levels
    grid:                                   # model args with several values: all combinations
      diffusion_budget: [3, 7, 15]
      guidance_scale: [1.0, 1.5]
    controls:                               # what a curve over the budget has to be compared with
      one_evaluation: [0.02, 0.1]           # times, or the --json FILE of training.compare_budgets: its best time
      noise_free: CHECKPOINT                # trained with noise_free
      finetuned: [CHECKPOINT]               # plain models: --model hf
    run: {num_fewshot: 5, batch_size: 8}    # options of the lm_eval command line, of every setting

- `read_plan`: the YAML file, validated without loading anything
- `run_plan`: runs what is not complete; `table`: the scores of what is

A setting runs in `OUTPUT/TASK/NAME.partial`, which is renamed to `NAME` when its results are written: a folder without
that ending is complete. It holds what `lm_eval` wrote, what it printed (its log goes to the terminal) as `log.txt`, and
the setting as `setting.json`.
"""

import contextlib
import dataclasses
import gc
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from l2d.cli.files import write_files
from l2d.cli.parser import Parser, check_folder
from lm_eval_ext.arguments import SAMPLER_ARGUMENTS, SEARCH, UsageError, parse_arguments
from lm_eval_ext.harness.preflight import check_checkpoint
from lm_eval_ext.sweep_controls import read_controls
from lm_eval_ext.sweep_points import read_points

KEYS = ("output", "tasks", "base", "model_args", "points", "trajectory", "grid", "controls", "run")
OWN_OPTIONS = ("model", "model_args", "tasks", "output_path")
PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run: a task, a name that tells what the grid chose, model args, options of the command line; l2d or hf."""

    task: str
    name: str
    model_args: dict[str, Any]
    run: dict[str, Any]
    model: str = "l2d"

    def command(self, folder: Path) -> list[str]:
        """Arguments of `lm_eval` for this setting."""
        words = ["run", "--model", self.model, "--tasks", self.task, "--output_path", str(folder)]
        words += ["--model_args", json.dumps(self.model_args)]
        for option, value in self.run.items():
            if value is True:
                words.append(f"--{option}")
            elif value is False and option == "fewshot_as_multiturn":
                words += [f"--{option}", "false"]  # on by itself with a chat template
            elif value is not None and value is not False:  # 0 is a value
                words += [f"--{option}", json.dumps(value) if isinstance(value, dict) else _joined(value)]
        return words


@dataclasses.dataclass(frozen=True)
class Plan:
    """All settings of a sweep, in the order in which they run."""

    output: Path
    settings: list[Setting]

    def folder(self, setting: Setting) -> Path:
        """Where a complete setting lies."""
        return self.output / setting.task / setting.name


# ---- the file --------------------------------------------------------------------------------------------------------


def read_plan(file: str | Path) -> Plan:
    """Read and check a sweep's YAML file; `UsageError` for anything that a run would refuse."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"sweep file {str(file)!r} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"sweep file {str(file)!r} must hold a mapping with the keys {', '.join(KEYS)}.")
    for name in content:
        if name not in KEYS:
            raise UsageError(f"sweep file has the key {name!r}, which is not known: use {', '.join(KEYS)}.")
    output, tasks = content.get("output"), content.get("tasks")
    if not isinstance(output, str) or not output:
        raise UsageError(f"output={output!r} must be the name of a folder.")
    try:
        check_folder("output", output)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) and task for task in tasks):
        raise UsageError(f"tasks={tasks!r} must be a list of names of tasks.")
    shared, grid, run = (_mapping(content, name) for name in ("model_args", "grid", "run"))
    for name in run:
        if name in OWN_OPTIONS:
            raise UsageError(f"run: {name!r} is set by the sweep itself; leave it out.")
    _check_gen_kwargs(run.get("gen_kwargs"))
    points = [*read_points(content, shared, grid), *read_controls(_mapping(content, "controls"), shared)]
    _check_points([point.model_args for point in points if point.model == "l2d"])
    run = {"log_samples": True, **run}
    settings = [
        Setting(task, point.name, point.model_args, {**run, **point.run}, point.model)
        for task in tasks
        for point in points
    ]
    return Plan(Path(output), settings)


def _check_points(points: list[dict[str, Any]]) -> None:
    """Check the model args of every setting; each checkpoint is opened once. Raises `UsageError`."""
    opened: dict[str, Any] = {}
    for arguments in points:
        name = json.dumps([arguments.get(key) for key in ("pretrained", "revision", "base")])
        settings = parse_arguments({**arguments, "pretrained": opened.get(name, arguments.get("pretrained"))})
        opened[name] = settings.checkpoint
        check_checkpoint(settings)


def _check_gen_kwargs(kwargs: Any) -> None:
    """Raise `UsageError` for generation kwargs that would override what the settings differ in."""
    words = kwargs if isinstance(kwargs, dict) else _joined(kwargs).split(",")
    names = [str(word).partition("=")[0].strip() for word in words]
    for name in names:
        if name in SAMPLER_ARGUMENTS or name == SEARCH:
            raise UsageError(
                f"run: gen_kwargs sets {name!r} for every setting, the base included: put it under model_args or grid."
            )


def _mapping(content: dict[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name) or {}
    if not isinstance(value, dict):
        raise UsageError(f"{name}={value!r} must be a mapping.")
    return value


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


# ---- the runs --------------------------------------------------------------------------------------------------------


def run_plan(plan: Plan) -> list[Setting]:
    """Run every setting that is not complete; return those that failed. The table is written after each."""
    _check_options(plan)
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"output={str(plan.output)!r} cannot be created ({error.strerror}): name another folder."
        ) from error
    pending = [setting for setting in plan.settings if not _complete(plan, setting)]
    print(f"{len(plan.settings)} settings, {len(plan.settings) - len(pending)} of them complete", flush=True)
    failed = []
    for number, setting in enumerate(plan.settings, 1):
        head = f"[{number}/{len(plan.settings)}] {setting.task} {setting.name}"
        if setting not in pending:
            print(f"{head}: complete", flush=True)
            continue
        print(f"{head}: running", flush=True)
        start = time.perf_counter()
        try:
            _run(plan, setting)
        except (Exception, SystemExit) as error:  # one setting's failure must not take the others with it
            failed.append(setting)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{head}: failed, {reason} (see {plan.folder(setting)}{PARTIAL})", flush=True)
            continue
        print(f"{head}: done in {time.perf_counter() - start:.0f} s", flush=True)
        _write(plan.output, "table.md", table(plan))
    _write(plan.output, "table.md", table(plan))  # a run may have been stopped between a setting and its table
    return failed


def _check_options(plan: Plan) -> None:
    """Let the harness's own command line look at the options, before anything runs."""
    from lm_eval._cli import HarnessCLI

    argv, said = sys.argv, io.StringIO()
    try:
        sys.argv = ["lm_eval", *plan.settings[0].command(plan.output)]
        with contextlib.redirect_stderr(said):
            HarnessCLI().parse_args()
    except SystemExit as error:
        raise UsageError(f"run: {said.getvalue().strip().splitlines()[-1]}.") from error
    finally:
        sys.argv = argv


def _complete(plan: Plan, setting: Setting) -> bool:
    folder = plan.folder(setting)
    if not folder.is_dir():
        return False
    try:
        recorded = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(folder)!r} was not written by a sweep: give another output folder.") from error
    recorded = {"model": "l2d", **recorded} if isinstance(recorded, dict) else recorded  # older sweeps knew no other
    if recorded != json.loads(json.dumps(dataclasses.asdict(setting))):
        raise UsageError(f"{str(folder)!r} was written with other settings: give another output folder, or remove it.")
    return True


def _run(plan: Plan, setting: Setting) -> None:
    from lm_eval_ext.__main__ import main as lm_eval

    folder = plan.folder(setting)
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    argv = sys.argv
    try:
        with (partial / "log.txt").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            lm_eval(setting.command(partial))
    finally:
        sys.argv = argv
        gc.collect()  # the model, before the next one is loaded
    if not list(partial.glob("**/results_*.json")):
        raise RuntimeError("lm_eval wrote no results")
    _write(partial, "setting.json", json.dumps(dataclasses.asdict(setting), indent=2))
    os.replace(partial, folder)


def _write(folder: Path, name: str, text: str) -> None:
    try:
        write_files(folder, {name: text}, "output")
    except ValueError as error:
        raise UsageError(str(error)) from error


# ---- the table -------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """Scores of all complete settings, and a token's evaluations, requested and computed."""
    lines = ["| task | setting | metric | score | standard error | NFE requested / token | NFE computed / token |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for setting in plan.settings:
        for file in sorted(plan.folder(setting).glob("**/results_*.json")):
            results = json.loads(file.read_text(encoding="utf-8"))
            ours = results["config"].get("l2d") or {}
            cost = [
                _shown((ours.get(f"{name}_per_token") or {}).get("mean"), 2)
                for name in ("nfe_requested", "nfe_computed")
            ]
            for task, metrics in results["results"].items():
                for name, score, error in _scores(metrics):
                    cells = [task, setting.name, name, _shown(score, 4), _shown(error, 4), *cost]
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _scores(metrics: dict[str, Any]) -> Iterator[tuple[str, float, Any]]:
    for key, value in metrics.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            yield name, value, metrics.get(f"{metric}_stderr,{filter_name}")


def _shown(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else ""


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep of the file that is named on the command line; 1 if a setting failed."""
    parser = Parser(prog="python -m lm_eval_ext.sweep", description="Run a grid of evaluations.")
    parser.add_argument("file", help="YAML file with output, tasks, base, model_args, grid, controls and run")
    plan = read_plan(parser.parse_args(arguments).file)
    failed = run_plan(plan)
    print(table(plan))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
