"""Runs the demo: `python -m training.demo --out FOLDER`.

* trains a tiny base, L2D as published and with corrupted targets, a noise-free path and two finetuning baselines, and
  evaluates all of them through `lm_eval`, offline, on the CPU
* leaves `report.md`, `accuracy.png`, the harness's leaderboard and `trace.html` in the folder, with every model, log
  and result file
* an interrupted run continues; a finished one is not overwritten without `--overwrite`
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

from l2d.cli.parser import Parser
from training.demo.plan import LAYOUT, build_steps, recipes, write_recipes
from training.demo.runner import ROOT, environment, run_or_exit
from training.demo.workspace import Workspace, open_workspace


def main() -> None:
    """Run the command; user errors and failed steps end with a message and exit status 2 or 1."""
    parser = Parser(prog="python -m training.demo", description="A small real run of everything.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for all results (default: demo)")
    parser.add_argument("--overwrite", action="store_true", help="replace the demo that the folder holds")
    options = parser.parse_args()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the running steps, too
    try:
        workspace = open_workspace(options.out, recipes(options.out.absolute()), options.overwrite, LAYOUT)
    except OSError as error:
        sys.exit(_refused(f"OUT={options.out} cannot be written to ({error}): choose another folder with OUT=."))
    except ValueError as error:
        sys.exit(_refused(str(error)))
    print(f"demo in {workspace.folder}: about 10 minutes on 2 cores; every step's output is in logs/", flush=True)
    write_recipes(workspace.folder)
    run_or_exit(build_steps(workspace.folder), workspace)
    report(workspace)
    workspace.finish()
    print(f"\ndone in {time.monotonic() - started:.0f} s")


def _refused(message: str) -> int:
    print("error:", message, file=sys.stderr)
    return 2


def report(workspace: Workspace) -> None:
    """Write report, figure and pages, and print the table, what it shows, and where everything is."""
    from training.demo.plot import draw
    from training.demo.report import changed_prompt, findings, markdown, read_demo, terminal_table

    out = workspace.folder
    demo = read_demo(out)
    sentences = findings(demo)
    (out / "report.md").write_text(markdown(demo, sentences), encoding="utf-8")
    draw(demo, out / "accuracy.png")
    print("\nexact match with 95 % intervals over problems; all but the base were trained on products only\n")
    print(terminal_table(demo))
    for heading, lines in sentences.items():
        print(f"\n{heading}:")
        print("\n".join(f"- {line}" for line in lines))
    print()
    write_pages(out, changed_prompt(demo))
    for name in ("report.md", "accuracy.png", "leaderboard.html", "trace.html", "trace.json", "base", "l2d"):
        print(f"{name:17s} {out / name}")


def write_pages(out: Path, prompt: str) -> None:
    """The harness's leaderboard over all results, and the trace of a problem that only the larger budget solves."""
    commands = {
        "pages": ("lm_eval_ext.leaderboard", out / "results", "--out", out, "--title", "Demo"),
        "trace": ("l2d", "trace", out / "l2d", "--prompt", prompt, "--budget", "15")
        + ("--max-new-tokens", "8", "--out", out / "trace.html"),
    }
    for name, command in commands.items():
        call = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(call, cwd=ROOT, env=environment(out), capture_output=True, text=True)
        (out / "logs" / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            raise SystemExit(f"error: {' '.join(call)} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        if name == "trace":
            print(done.stdout)


if __name__ == "__main__":
    main()
