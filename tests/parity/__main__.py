"""Command line: compare the model with every fixture of a folder.

    python -m tests.parity DIR [--json FILE] [--case NAME] [--quantity WORD ...]

Prints the largest deviation per case and quantity, what failed or was skipped and why, and `N passed, M failed`.
Exit status: 0 if nothing failed, 1 if something did, 2 if the folder or a case cannot be read.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from tests.parity.fixtures import MalformedFixture, load_cases
from tests.parity.report import failure_lines, summary_line, table
from tests.parity.runner import run_case


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity", description="Compare with fixtures of released L2D."
    )
    parser.add_argument("folder", type=Path, help="folder with NAME.json and NAME.safetensors pairs")
    parser.add_argument("--json", type=Path, help="also write every single comparison to this file")
    parser.add_argument("--case", help="check this case only")
    parser.add_argument(
        "--quantity",
        nargs="+",
        help="report only quantities that contain one of these words; tensors without a check are then not listed",
    )
    options = parser.parse_args(arguments)
    try:
        cases = load_cases(options.folder, options.case)
    except MalformedFixture as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the fixtures were made
    try:
        results = [result for case in cases for result in run_case(case, options.quantity)]
    finally:
        torch.set_num_threads(threads)
    for line in [*table(results), *failure_lines(results), ""]:
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")
    if not results:
        print(f"error: no quantity contains any of {', '.join(options.quantity or [])}.", file=sys.stderr)
        return 2
    print(summary_line(results))
    return 1 if any(result.status == "FAIL" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
