"""Runs the study of a real model: `python -m training.studies.real --base BASE --out FOLDER [--minutes M]`.

* an interrupted run continues, a training from its last checkpoint; so does one whose time is over
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from huggingface_hub import snapshot_download

from l2d.cli.parser import Parser
from training.demo.plan import write_configs
from training.demo.runner import OutOfTime, run_or_exit
from training.demo.workspace import Workspace, open_workspace
from training.studies.options import chosen_methods, refused
from training.studies.real import elsewhere
from training.studies.real.data import targets_per_example, write_data
from training.studies.real.plan import LAYOUT, METHODS, Settings, build_steps, has_bf16, recipes, steps_for

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "openai/gsm8k"
LIMITS = vars(elsewhere.Limits())  # problems that models answer or score beyond worked solutions
EPOCH = 938_000  # supervised tokens of GSM8K's training split with SmolLM2's tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m training.studies.real", description="What does L2D do to a real model?")
    parser.add_argument("--base", default=BASE, help=f"folder or hub name of a chat model (default: {BASE})")
    parser.add_argument("--data", default=DATA, help=f"folder or hub name of GSM8K (default: {DATA})")
    parser.add_argument("--out", type=Path, default=Path("real"), help="folder for all results (default: real)")
    parser.add_argument(
        "--targets", type=int, default=EPOCH, help=f"supervised tokens of every training (default: an epoch, {EPOCH:,})"
    )
    parser.add_argument(
        "--held-out", type=int, default=64, help="last rows of the training split for validation (default: 64)"
    )
    parser.add_argument(
        "--problems", type=int, default=1319, help="test problems that are scored, the first ones (default: all 1,319)"
    )
    for name, usual in LIMITS.items():
        parser.add_argument(
            f"--{name}", type=int, default=usual, metavar="N", help=f"problems of {name}, 0 for none (default: {usual})"
        )
    for name, (source, _) in elsewhere.SOURCES.items():
        parser.add_argument(f"--{name}-data", default=source, help=f"folder or hub name of it (default: {source})")
    parser.add_argument("--methods", help=f"run the steps of these only, with commas: {','.join(METHODS)}")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command continues")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="steps at a time (default: 1)")
    parser.add_argument("--report", action="store_true", help="only write tables and figure of what was measured")
    parser.add_argument("--overwrite", action="store_true", help="replace the study that the folder holds")
    return parser


def main() -> None:
    """Run the command; user errors and failed steps end with a message and exit status 2 or 1."""
    options = _parser().parse_args()
    out = options.out.absolute()
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the running steps, too
    try:
        chosen = chosen_methods(options.methods, METHODS)
        settings, limits = _settings(options), _limits(options)
        if options.report:
            sys.exit(_report_only(out, settings, options.problems, limits))
        workspace = _open(options, settings, limits, out)
    except OSError as error:
        sys.exit(refused(f"OUT={options.out} cannot be written to ({error}): choose another folder with OUT=."))
    except ValueError as error:
        sys.exit(refused(str(error)))
    print(f"study in {out}: hours on 2 cores; every step's output is in logs/", flush=True)
    steps = build_steps(out, settings, options.problems, chosen)
    steps += elsewhere.build_steps(out, settings, limits, chosen)
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_or_exit(steps, workspace, options.processes, until)
    except OutOfTime as error:
        print(f"{error}; the same command continues from here", flush=True)
    write_report(out, settings, options.problems, limits)


def write_report(out: Path, settings: Settings, problems: int, limits: elsewhere.Limits) -> bool:
    """Write tables, plain values and figure of what was measured; whether anything was."""
    from training.studies.packing import write_json
    from training.studies.real.plot import draw
    from training.studies.real.report import markdown, results
    from training.studies.real.scores import read_study
    from training.studies.report import circumstances

    study = read_study(out, problems, limits)
    if study is None:
        return False
    command = f"python -m training.studies.real --out {out.name} --targets {settings.targets} --problems {problems}"
    about = {**circumstances(command), "base": Path(settings.base).name, "settings": settings.record()}
    write_json(results(study, about), out / "results.json", indent=1)
    (out / "real.md").write_text(markdown(study, about), encoding="utf-8")
    draw(study, out / "real.png")
    print(f"see {out / 'real.md'}", flush=True)
    return True


def _report_only(out: Path, settings: Settings, problems: int, limits: elsewhere.Limits) -> int:
    if write_report(out, settings, problems, limits):
        return 0
    return refused(f"OUT={out} holds nothing that was measured on problems={problems}: run the study first.")


def _settings(options: argparse.Namespace) -> Settings:
    """What was asked for. Raises `ValueError`."""
    for name in ("targets", "held_out", "problems", "processes"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1.")
    if options.minutes is not None and not options.minutes > 0:
        raise ValueError(f"minutes={options.minutes} must be above 0.")
    return Settings(_folder(options.base), _source(options.data), options.targets, options.held_out, has_bf16())


def _limits(options: argparse.Namespace) -> elsewhere.Limits:
    """How much is asked elsewhere. Raises `ValueError`."""
    limits = {name: getattr(options, name) for name in LIMITS}
    for name, value in limits.items():
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0, which leaves it out.")
    return elsewhere.Limits(**limits)


def _open(options: argparse.Namespace, settings: Settings, limits: elsewhere.Limits, out: Path) -> Workspace:
    """The folder with its data and recipes. Raises `ValueError`."""
    workspace = open_workspace(out, settings.record(), options.overwrite, LAYOUT)
    write_data(settings.data, Path(settings.base), out / "data", settings.held_out)
    elsewhere.write_problems(
        out, limits, {name: _source(getattr(options, f"{name}_data")) for name in elsewhere.SOURCES}
    )
    steps = steps_for(settings.targets, targets_per_example(out / "data"))
    write_configs(recipes(out, settings, steps), out / "configs")
    return workspace


def _folder(base: str) -> str:
    """The folder of a base; one on the hub is fetched, since all steps run offline. Raises `ValueError`."""
    if os.path.isdir(base):
        return os.path.abspath(base)
    try:
        return snapshot_download(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"base={base!r} is neither a model's folder nor a model on the hub: {error}") from error


def _source(data: str) -> str:
    return os.path.abspath(data) if os.path.exists(data) else data


if __name__ == "__main__":
    main()
