"""Runs the study: `python -m training.studies.compute --out FOLDER`.

* trains every method on every task, from two to five bases, and measures it at every budget and against the controls
* leaves `study.md`, `study.png` and `results.json` in the folder, with every model and log
* an interrupted run continues; a finished one is not overwritten without `--overwrite`
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from training.demo.plan import write_configs
from training.demo.runner import run_or_exit
from training.demo.workspace import open_workspace
from training.studies.options import chosen_methods, refused
from training.studies.packing import write_json
from training.studies.plan import LAYOUT, METHODS, build_steps, recipes
from training.studies.tasks import TASKS


def main() -> None:
    """Run the command; user errors and failed steps end with a message and exit status 2 or 1."""
    parser = argparse.ArgumentParser(prog="python -m training.studies.compute", description="Does more compute help?")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder for all results (default: study)")
    parser.add_argument(
        "--only", choices=list(TASKS), help="run the steps of one task; the same command without continues"
    )
    parser.add_argument("--methods", help=f"run the steps of these only, with commas: {','.join(METHODS)}")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="steps at a time (default: 2)")
    parser.add_argument("--quick", action="store_true", help="twenty steps per training: shows that all works, no more")
    parser.add_argument("--overwrite", action="store_true", help="replace the study that the folder holds")
    options = parser.parse_args()
    started, out = time.monotonic(), options.out.absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the running steps, too
    try:
        if options.processes < 1:
            raise ValueError(f"processes={options.processes} must be at least 1.")
        chosen = chosen_methods(options.methods, METHODS)
        workspace = open_workspace(out, recipes(out, options.quick), options.overwrite, LAYOUT)
    except OSError as error:
        sys.exit(refused(f"OUT={options.out} cannot be written to ({error}): choose another folder with OUT=."))
    except ValueError as error:
        sys.exit(refused(str(error)))
    print(f"study in {out}: about an hour on 2 cores; every step's output is in logs/", flush=True)
    for folder in ("data", "runs"):
        (out / folder).mkdir(exist_ok=True)
    write_configs(recipes(out, options.quick), out / "configs")
    steps = build_steps(out, list(TASKS), options.quick, list(METHODS))
    tasks = [options.only] if options.only else list(TASKS)
    run_or_exit(build_steps(out, tasks, options.quick, chosen), workspace, options.processes)
    write_report(out, options.quick)
    if all(workspace.complete(step.name, step.output) for step in steps):
        workspace.finish()
    print(f"\ndone in {time.monotonic() - started:.0f} s; see {out / 'study.md'}")


def write_report(out: Path, quick: bool = False) -> None:
    """Write tables, plain values and figure of all tasks that were measured."""
    from training.studies.plot import draw
    from training.studies.report import circumstances, markdown, results
    from training.studies.scores import read_scores

    tasks = {task: scores for task in TASKS if (scores := read_scores(out, task)) is not None}
    about = circumstances(f"python -m training.studies.compute --out {out.name}" + " --quick" * quick)
    write_json(results(tasks, about), out / "results.json", indent=1)
    (out / "study.md").write_text(markdown(tasks, about), encoding="utf-8")
    draw(tasks, out / "study.png")


if __name__ == "__main__":
    main()
